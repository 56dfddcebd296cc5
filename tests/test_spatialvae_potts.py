from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import logsumexp

from spatialvae import InputError, inference, potts
from spatialvae.graph import knn_graph


def lattice(rows, columns, torus=False):
    """Adjacency matrix of a 4-connected grid."""
    at = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(at[:-1], at[1:]), (at[:, :-1], at[:, 1:])]
    if torus:
        pairs = [(at, np.roll(at, -1, 0)), (at, np.roll(at, -1, 1))]
    i, j = (np.concatenate([pair[end].ravel() for pair in pairs]) for end in (0, 1))
    upper = sp.coo_array((np.ones(len(i)), (i, j)), shape=(at.size, at.size))
    return sp.csr_array(upper + upper.T)


def zero_sum(matrix):
    centred = matrix - matrix.mean(0)
    centred = centred - centred.mean(1, keepdims=True)
    return (centred + centred.T) / 2


def enumerated(couplings, fields, adjacency):
    """Every labelling, and the logarithm of its weight."""
    n, k = fields.shape
    states = np.array(list(itertools.product(range(k), repeat=n)))
    edges = sp.triu(adjacency).tocoo()
    weight = fields[np.arange(n), states].sum(1) + couplings[states[:, edges.row], states[:, edges.col]].sum(1)
    return states, weight


@pytest.fixture
def small():
    rng = np.random.default_rng(3)
    matrix = rng.normal(0, 0.6, (3, 3))
    return (matrix + matrix.T) / 2 + 0.5 * np.eye(3), rng.normal(0, 0.4, (8, 3)), lattice(2, 4)


@pytest.mark.parametrize("clusters", [False, True])
def test_sample_potts__frequencies_of_all_labellings(small, clusters):
    couplings, fields, adjacency = small
    states, weight = enumerated(couplings, fields, adjacency)
    truth = np.exp(weight - logsumexp(weight))
    seen, state, draws = np.zeros(len(states)), None, 20_000
    powers = 3 ** np.arange(7, -1, -1)
    for draw in range(draws):
        state = potts.sample_potts(couplings, fields, adjacency, 2, draw, state, clusters)
        seen[state @ powers] += 1
    marginal = [np.array([(states == a).T @ p for a in range(3)]) for p in (truth, seen / draws)]
    assert abs(marginal[0] - marginal[1]).max() < 0.02
    edges = sp.triu(adjacency).tocoo()
    alike = (states[:, edges.row] == states[:, edges.col]).T
    np.testing.assert_allclose(alike @ (seen / draws), alike @ truth, atol=0.02)


def test_log_partition__within_its_error_of_enumeration(small):
    couplings, fields, adjacency = small
    truth = logsumexp(enumerated(couplings, fields, adjacency)[1])
    off = []
    for seed in range(20):
        value, error = potts.log_partition(couplings, fields, adjacency, steps=30, chains=100, seed=seed)
        off.append((value - truth) / error)
    assert np.abs(np.mean(off)) < 0.8
    assert 0.6 < np.std(off) < 1.6
    value, error = potts.log_partition(0 * couplings, fields, adjacency, 5, 4)
    assert (value, error) == pytest.approx((logsumexp(fields, 1).sum(), 0), abs=1e-9)


def test_fit_potts__maximises_the_pseudo_likelihood_of_free_symmetric_couplings():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    adjacency = lattice(9, 9)
    labels = rng.integers(0, 3, 81)
    model = potts.fit_potts(labels, adjacency)
    near = adjacency @ np.eye(3)[labels]

    def unpacked(theta):  # any symmetric couplings: 7 free numbers, as many as zero-sum couplings, fields and degree
        pairs = np.zeros((3, 3))
        pairs[np.triu_indices(3)] = np.r_[theta[:5], 0]
        return pairs + np.triu(pairs, 1).T, np.r_[theta[5:], 0]

    def cost(theta):
        pairs, field = unpacked(theta)
        score = field + near @ pairs
        return -(score[np.arange(81), labels] - logsumexp(score, 1)).sum()

    best = minimize(cost, np.zeros(7), method="BFGS")
    assert model.log_likelihood == pytest.approx(-best.fun, abs=0.01)
    np.testing.assert_allclose(model.couplings, zero_sum(unpacked(best.x)[0]), atol=0.02)
    np.testing.assert_allclose(model.couplings.sum(0), 0, atol=1e-9)


def test_fit_potts__intervals_hold_what_they_say():
    off = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        adjacency = knn_graph(rng.uniform(0, 30, (1500, 2)), 5).adjacency(symmetric=True)
        matrix = rng.normal(0, 0.3, (3, 3))
        truth = zero_sum(matrix + matrix.T)
        labels = potts.sample_potts(truth, np.tile([0.3, 0, -0.3], (1500, 1)), adjacency, 60, seed)
        model = potts.fit_potts(labels, adjacency)
        off.append(((model.couplings - truth) / model.coupling_errors)[np.triu_indices(3)])
    assert 0.87 <= (np.abs(off) < 1.96).mean() <= 0.99
    assert abs(np.mean(off)) < 0.4


def test_interactions__finds_who_sits_beside_whom():
    labels = np.repeat([0, 1, 2], 12)[np.arange(36 * 36) // 36]  # stripes: 0 | 1 | 2
    labels = np.where(np.random.default_rng(0).random(len(labels)) < 0.2, 2 - labels, labels)
    table = potts.interactions(potts.fit_potts(labels, lattice(36, 36)), ["a", "b", "c"])
    pair = table.set_index(["label", "neighbour"])
    assert pair.loc[("b", "b"), "coupling"] > 0
    assert pair.loc[("b", "b"), "fdr"] < 0.01
    assert pair.loc[("a", "b"), "coupling"] < 0
    assert (table["low"] < table["coupling"]).all()


def test_smooth_labels__mends_isolated_errors_and_keeps_borders():
    truth = (np.arange(900) % 30 >= 15).astype(int)
    rng = np.random.default_rng(0)
    odds = np.eye(2)[truth] + rng.normal(0, 1, (900, 2))
    labels, probability = potts.smooth_labels(odds, lattice(30, 30))
    alone, smooth = (odds.argmax(1) != truth).mean(), (labels != truth).mean()
    assert alone > 0.15
    assert smooth < 0.03
    np.testing.assert_allclose(probability.sum(1), 1)


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 2, 2, 0], "occur"), ([0, 0, 0, 0], "at least two"), ([0, 1], "graph of 4 cells")]
)
def test_fit_potts__says_what_is_wrong_with_labels(labels, message):
    with pytest.raises(InputError, match=message):
        potts.fit_potts(np.array(labels), lattice(2, 2))


def test_adjusted__is_benjamini_and_hochbergs():
    np.testing.assert_allclose(inference.adjusted(np.array([0.01, 0.5, 0.02, 0.04])), [0.04, 0.5, 0.04, 4 * 0.04 / 3])


def test_spatial_blocks__compact_equal_and_within_samples():
    rng = np.random.default_rng(0)
    samples = np.repeat(["a", "b"], [600, 200])
    blocks = inference.spatial_blocks(rng.uniform(0, 1, (800, 2)), 8, samples)
    np.testing.assert_array_equal(np.bincount(blocks), np.full(8, 100))
    assert not set(blocks[:600]) & set(blocks[600:])


def test_fit_potts__blocks_count_gradients_that_the_model_does_not_know():
    off = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        places = rng.uniform(0, 40, (1600, 2))
        waves = rng.normal(0, 0.4, (2, 90)), rng.uniform(0, 7, 90)
        smooth = np.cos(places @ waves[0] + waves[1]).reshape(-1, 3, 30).sum(2) / 4
        labels = (smooth + rng.gumbel(size=smooth.shape)).argmax(1)
        adjacency = knn_graph(places, 6).adjacency(symmetric=True)
        fits = [potts.fit_potts(labels, adjacency, blocks=b) for b in (None, inference.spatial_blocks(places, 25))]
        off.append([(fit.couplings / fit.coupling_errors)[np.triu_indices(3, 1)] for fit in fits])
        assert fits[1].freedom == 24
    spread = np.array(off).std(axis=(0, 2))  # the three pairs are equivalent by symmetry
    assert spread[1] < spread[0]
    assert spread[1] < 1.5
