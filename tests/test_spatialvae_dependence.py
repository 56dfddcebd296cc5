from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from spatialvae import InputError, dependence
from spatialvae.graph import knn_graph
from spatialvae.inference import spatial_blocks


def chain(seed, n=1500, depth=10.0, alone=4, blocks=40):
    """Counts, graph and blocks: A -> B -> C, D of the neighbours affects A and C, and ``alone`` independent genes."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, 50, (n, 2))
    graph = knn_graph(places, 6).adjacency(symmetric=True)
    d = rng.normal(size=n)
    near = (graph @ d) / graph.sum(1)
    near /= near.std()
    a = 0.6 * near + 0.8 * rng.normal(size=n)
    b = 0.7 * a + 0.7 * rng.normal(size=n)
    c = 0.7 * b + 0.6 * near + 0.7 * rng.normal(size=n)
    logs = np.c_[a, b, c, d, rng.normal(size=(n, alone))]
    return rng.poisson(np.exp(np.log(depth) + 0.7 * logs - 0.2)), graph, spatial_blocks(places, blocks)


def edges(found):
    return {frozenset(pair) for pair in zip(found["gene"], found["other"], strict=True)}


def test_partial_correlations__chain_with_a_confounder_in_the_neighbours():
    names, wrong = list("ABCDefgh"), 0
    for seed in range(4):
        counts, graph, blocks = chain(seed)
        size = np.ones(len(counts))
        found = edges(dependence.partial_correlations(counts, blocks, graph, size, names, seed=seed))
        assert {frozenset("AB"), frozenset("BC")} <= found
        wrong += frozenset("AC") in found
        alone = edges(dependence.partial_correlations(counts, blocks, None, size, names, seed=seed))
        assert frozenset("AC") in alone  # without the neighbours, their effect appears as an edge
    assert wrong == 0


def test_partial_correlations__noise_of_counting_does_not_join():
    rng = np.random.default_rng(0)
    hub = rng.normal(size=3000)
    logs = np.c_[hub, 0.8 * hub + 0.6 * rng.normal(size=3000), 0.8 * hub + 0.6 * rng.normal(size=3000)]
    logs = np.hstack([logs, rng.normal(size=(3000, 5))])
    counts = rng.poisson(np.exp(np.r_[0.0, 3, 3, 2, 2, 2, 2, 2] + 0.7 * logs))  # the hub has few counts
    plain = np.linalg.inv(np.corrcoef(np.log1p(counts).T))
    assert -plain[1, 2] / np.sqrt(plain[1, 1] * plain[2, 2]) > 0.2
    found = edges(
        dependence.partial_correlations(
            counts, rng.integers(0, 40, 3000), size=np.ones(3000), names=list("hab12345"), seed=1
        )
    )
    assert {frozenset("ha"), frozenset("hb")} <= found
    assert frozenset("ab") not in found


def tissue(seed, effect, n=1500):
    rng = np.random.default_rng(seed)
    places, types = rng.uniform(0, 40, (n, 2)), rng.integers(0, 3, n)
    graph = knn_graph(places, 6).adjacency(symmetric=True)
    rate = 3 * np.exp(0.4 * rng.normal(size=(n, 12)) + 0.5 * np.sin(places[:, :1] / 10))
    rate[:, 0] *= np.exp(effect * (types == 0) * (graph @ (types == 1).astype(float)))
    return rng.poisson(rate), types, graph, places


def test_neighbour_effects__finds_what_a_neighbour_does():
    counts, types, graph, places = tissue(0, 0.4)
    genes = [f"g{i}" for i in range(12)]
    table = dependence.neighbour_effects(dependence.log_expression(counts), types, graph, places, list("abc"), genes)
    first = table.iloc[0]
    assert (first["type"], first["neighbour"], first["gene"]) == ("a", "b", "g0")
    assert first["fdr"] < 0.05
    assert first["effect"] == pytest.approx(0.3, abs=0.1)  # less than 0.4: log(1 + x)
    assert table["p_value"].between(0, 1).all()


def test_neighbour_effects__of_one_type_are_not_found_in_the_types_that_it_takes_the_place_of():
    found = {"b": 0, "a": 0, "c": 0}
    for seed in range(10):
        counts, types, graph, places = tissue(seed, 0.3)
        genes = [f"g{i}" for i in range(12)]
        table = dependence.neighbour_effects(np.log1p(counts), types, graph, places, list("abc"), genes)
        called = table[(table["fdr"] < 0.1) & (table["type"] == "a") & (table["gene"] == "g0")]
        for neighbour in called["neighbour"]:
            found[neighbour] += 1
    assert found["b"] == 10
    assert found["a"] + found["c"] <= 3


def test_neighbour_effects__p_values_are_level_without_effects():
    p = []
    for seed in range(4):
        counts, types, graph, places = tissue(seed, 0)
        expression = dependence.log_expression(counts)
        p.append(dependence.neighbour_effects(expression, types, graph, places, list("abc"), list("abcdefghijkl")))
    values = np.concatenate([table["p_value"] for table in p])
    assert (values < 0.05).mean() == pytest.approx(0.05, abs=0.03)
    assert sum((table["fdr"] < 0.1).any() for table in p) <= 1


def test_neighbour_effects__smooth_expression_is_no_effect():
    """Patches of types, and independent patches of expression that are narrower than a block."""
    p = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        places = rng.uniform(0, 40, (1500, 2))
        graph = knn_graph(places, 6).adjacency(symmetric=True)
        smooth = rng.normal(size=(1500, 15))
        for _ in range(2):
            smooth = smooth + 2 * (graph @ smooth) / graph.sum(1)[:, None]
        types, expression = (smooth[:, :3] + rng.normal(size=(1500, 3))).argmax(1), np.exp(smooth[:, 3:])
        p.append(dependence.neighbour_effects(expression, types, graph, places, list("abc"), list("abcdefghijkl")))
    values = np.concatenate([table["p_value"] for table in p])
    assert (values < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert sum((table["fdr"] < 0.1).any() for table in p) <= 1


def test_variance_shares__of_genes_made_of_one_cause_each():
    rng = np.random.default_rng(0)
    n = 2000
    places, types = rng.uniform(0, 40, (n, 2)), rng.integers(0, 4, n)
    graph = knn_graph(places, 6).adjacency(symmetric=True)
    niche = np.sin(places / 8)
    signal = rng.normal(size=n)
    near = (graph @ signal) / graph.sum(1)
    unit = [x / x.std() for x in (types.astype(float), niche[:, 0], near, rng.normal(size=n))]
    expression = np.c_[unit[0] + unit[3], unit[1] + unit[3], unit[2] + unit[3], signal, unit[3]]
    shares = dependence.variance_shares(
        expression, types, niche, graph, spatial_blocks(places, 40), ["type", "niche", "neighbours", "source", "none"]
    ).set_index("gene")
    for cause in ("type", "niche", "neighbours"):
        assert shares.loc[cause, cause] == pytest.approx(0.5, abs=0.05)
    assert shares.loc["none", "rest"] > 0.97
    np.testing.assert_allclose(shares.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [(np.zeros((20, 4)), "gene '0' has no counts"), (-np.ones((20, 4)), "negative"), (np.ones((20, 2)), "2 genes")],
)
def test_partial_correlations__says_what_is_wrong(counts, message):
    with pytest.raises(InputError, match=message):
        dependence.partial_correlations(counts, np.arange(20) % 5)


def test_neighbour_effects__of_the_one_type_that_is_met():
    """Isolated pairs of a and b, and single cells: a cell has one neighbour, of the other type, or none."""
    rng = np.random.default_rng(0)
    n = 600
    places = np.repeat(rng.uniform(0, 1000, (n // 2, 2)), 2, 0)
    first = np.arange(0, n, 2)[rng.random(n // 2) < 0.5]
    rows, columns = np.r_[first, first + 1], np.r_[first + 1, first]
    graph = sp.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    expression = rng.gamma(2, 1, (n, 3))
    table = dependence.neighbour_effects(expression, np.arange(n) % 2, graph, places, ["a", "b"], ["x", "y", "z"])
    assert set(zip(table["type"], table["neighbour"], strict=True)) == {("a", "b"), ("b", "a")}


def test_neighbour_effects__says_when_types_hardly_meet():
    counts, types, graph, places = tissue(0, 0, n=100)
    with pytest.raises(InputError, match="no two types are neighbours"):
        dependence.neighbour_effects(counts.astype(float), types, graph, places, list("abc"), list("abcdefghijkl"))
