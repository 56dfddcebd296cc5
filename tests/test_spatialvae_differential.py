from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from spatialvae import InputError, SpatialVAE, differential

SCVI = {
    "proba_de", "proba_not_de", "bayes_factor", "scale1", "scale2", "pseudocounts", "delta", "lfc_mean", "lfc_median",
    "lfc_std", "lfc_min", "lfc_max", "raw_mean1", "raw_mean2", "non_zeros_proportion1", "non_zeros_proportion2",
    "raw_normalized_mean1", "raw_normalized_mean2", "is_de_fdr_0.05", "comparison", "group1", "group2",
}  # fmt: skip


def simulated(seed, n=400, genes=120, changed=0.3):
    """Three cell types, each with changes of 30 % of the genes. Returns the table and the true log2 expression."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n)
    change = rng.normal(0, 1, (3, genes)) * (rng.random((3, genes)) < changed)
    rate = (rng.gamma(0.7, 1, genes) + 0.05) * 2 ** change[kind]
    share = rate / rate.sum(1, keepdims=True)
    counts = rng.poisson(rng.gamma(6, 50, n)[:, None] * share * rng.gamma(4, 1 / 4, share.shape))
    obs = pd.DataFrame({"kind": kind.astype(str), "side": rng.integers(2, size=n)}, [f"c{i}" for i in range(n)])
    table = anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    )
    return table, np.log2(np.stack([share[kind == k].mean(0) for k in range(3)]))


def fitted(table, steps):
    SpatialVAE.setup_anndata(table, spatial_key=None, labels_key="kind")
    model = SpatialVAE(table)
    model.train(max_steps=steps, progress=False)
    return model


@pytest.fixture(scope="module")
def trained():
    table, truth = simulated(0)
    return table, truth, fitted(table, 400)


def test_shrunk__has_the_posterior_of_a_known_prior():
    """Half of the changes are 0, half N(0, 1): the false discovery rate and the coverage of intervals are as stated."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000) * (rng.random(4000) < 0.5)
    variance = rng.uniform(0.02, 0.5, truth.shape)
    change = differential.shrunk(truth + np.sqrt(variance) * rng.normal(size=truth.shape), variance)
    differs = change.beyond(0.25) + 1 - change.beyond(-0.25)
    bins = np.digitize(differs, [0.2, 0.4, 0.6, 0.8, 0.95])
    stated, found = (np.array([v[bins == b].mean() for b in range(6)]) for v in (differs, np.abs(truth) >= 0.25))
    np.testing.assert_allclose(found, stated, atol=0.06)
    called = differential.is_de(differs, 0.05)
    assert (np.abs(truth[called]) < 0.25).mean() == pytest.approx(0.05, abs=0.02)
    drawn = change.draws(rng)
    assert drawn.mean(0) == pytest.approx((change.weight * change.mean).sum(1), abs=0.15)


def test_is_de__calls_while_the_expected_share_of_wrong_ones_is_small():
    np.testing.assert_array_equal(differential.is_de(np.array([0.5, 0.99, 0.9, 0.97]), 0.05), [False, True, True, True])
    assert not differential.is_de(np.array([0.9, 0.5]), 0.05).any()


def test_differential_expression__finds_what_changed(trained):
    _, truth, model = trained
    found = model.differential_expression(group1="0", group2="1")
    assert set(found.columns) == SCVI
    change = truth[0] - truth[1]
    called, real = found["is_de_fdr_0.05"].to_numpy(), np.abs(change) >= 0.25
    assert (called & real).sum() > 0.6 * (np.abs(change) >= 0.5).sum()
    assert (called & ~real).sum() <= 0.15 * called.sum()
    assert np.corrcoef(found["lfc_mean"], change)[0, 1] > 0.9
    z = (found["lfc_mean"] - change) / found["lfc_std"].clip(0.05)
    assert z.abs().median() < 1.2
    vanilla = model.differential_expression(group1="0", group2="1", mode="vanilla")
    assert ((vanilla["proba_m1"] > 0.99) == (vanilla["bayes_factor"] > np.log(99))).all()


def test_differential_expression__between_halves_of_one_type_finds_nothing(trained):
    table, _, model = trained
    found = model.differential_expression(groupby="side", group1="0", group2="1", within="kind")
    assert list(found["kind"].unique()) == ["0", "1", "2"]
    assert len(found) == 3 * table.n_vars
    assert found["is_de_fdr_0.05"].sum() <= 2


def test_differential_expression__takes_rows_masks_and_queries():
    table, _ = simulated(0, n=60, genes=10)
    model = fitted(table, 10)
    mask = (table.obs["kind"] == "2").to_numpy()
    asked = {"idx2": "kind == '1'", "all_stats": False}
    one = model.differential_expression(idx1=mask, **asked)
    pd.testing.assert_frame_equal(one, model.differential_expression(idx1=np.flatnonzero(mask), **asked))
    assert "comparison" not in one
    assert len(model.differential_expression(groupby="side", group1=0, all_stats=False)) == table.n_vars
    assert len(model.differential_expression(all_stats=False)) == 3 * table.n_vars
    by_number = model.differential_expression(groupby="side", group1=[0], group2=1, all_stats=False)
    assert list(by_number["comparison"].unique()) == ["0 vs 1"]
    table.obs["some"] = table.obs["kind"].astype(str).where(~mask)
    assert set(model.differential_expression(groupby="some", all_stats=False)["group1"]) == {"0", "1"}
    for wrong, message in (
        ({"groupby": "nope"}, "groupby is 'nope'"),
        ({"group1": "9"}, "0 and 60 cells"),
        ({"mode": "new"}, "mode is 'new'"),
        ({"idx1": mask[:5]}, "5 values"),
        ({"idx1": [0.5]}, "whole numbers from 0 to 59"),
        ({"idx1": "nope == 1"}, "'nope == 1' is not a query of obs"),
        ({"group1": "1", "group2": "1"}, "expected two groups of 'kind'"),
    ):
        with pytest.raises(InputError, match=message):
            model.differential_expression(**wrong)
