from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from spatialvae import InputError, SpatialVAE, likelihoods, posterior, sampling


def tissue(n=300, genes=10, seed=0):
    """Cells of varying depth whose expression varies smoothly in the plane, with negative binomial counts."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    program = np.sin(xy[:, 0] / 15) + 0.4 * rng.normal(size=n)
    loading = np.where(np.arange(genes) % 2, 0.8, -0.8)
    share = np.exp(program[:, None] * loading)
    share /= share.sum(1, keepdims=True)
    counts = rng.poisson(rng.uniform(40, 160, n)[:, None] * share * rng.gamma(8, 1 / 8, share.shape))
    names = [f"c{i}" for i in range(n)], [f"g{i}" for i in range(genes)]
    table = anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"program": program}, index=names[0]),
        var=pd.DataFrame(index=names[1]),
        obsm={"spatial": xy},
    )
    table.layers["share"] = share
    return table


@pytest.fixture(scope="module")
def trained():
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, n_latent=4)
    model.train(max_steps=1000, progress=False)
    return table, model


@pytest.mark.parametrize("theta", [None, 3.0])
def test_sample__has_the_moments_of_its_likelihood(theta):
    rng, mean = np.random.default_rng(0), np.array([0.3, 4.0, 30.0])
    x = likelihoods.sample(np.tile(mean, (40_000, 1)), None if theta is None else np.full(3, theta), None, rng)
    np.testing.assert_allclose(x.mean(0), mean, rtol=0.03)
    np.testing.assert_allclose(x.var(0), mean + (0 if theta is None else mean**2 / theta), rtol=0.06)
    zeros = likelihoods.sample(np.full((40_000, 1), 30.0), None, np.array(0.4), rng)
    assert (zeros == 0).mean() == pytest.approx(0.4, abs=0.01)


def test_latent_draws__have_the_mean_and_variance_of_the_posterior(trained):
    _, model = trained
    module, section = model.module, model._section
    rows = np.arange(section.cells.n_cells)
    of_niche, of_cell = posterior.posterior(module, section, module.sites(section))
    drawn = [(niche, cell) for _, niche, cell in posterior.latent_draws(module, section, rows, 100)]
    niche, cell = (np.concatenate([part.numpy() for part in parts], 1) for parts in zip(*drawn, strict=True))
    for (mean, variance), found in ((of_niche, niche), (of_cell, cell)):
        z = (found.mean(0) - mean.numpy()) / np.sqrt(variance.numpy() / 100)
        assert 0.8 < z.std() < 1.2
        np.testing.assert_allclose(found.var(0).mean(0), variance.numpy().mean(0), rtol=0.05)


def test_expression__from_draws_covers_the_truth_and_keeps_its_shapes(trained):
    table, model = trained
    drawn = model.get_normalized_expression(n_samples=100, return_mean=False, return_numpy=True)
    assert drawn.shape == (100, *table.shape)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    truth = table.layers["share"]
    assert 0.85 < ((low < truth) & (truth < high)).mean() < 0.95
    some = model.get_normalized_expression(indices=[5, 2], gene_list=["g3"], n_samples=100)
    assert list(some.index) == ["c5", "c2"]
    np.testing.assert_allclose(some["g3"], drawn[:, [5, 2], 3].mean(0), atol=0.02)
    with pytest.raises(InputError, match="return_numpy=True"):
        model.get_normalized_expression(n_samples=2, return_mean=False)
    with pytest.raises(InputError, match="n_samples is 0"):
        model.posterior_predictive_sample(n_samples=0)
    with pytest.raises(InputError, match="indices select no cell"):
        model.get_normalized_expression(indices=np.zeros(300, bool))
    with pytest.raises(InputError, match="rows from 0 to 299"):
        model.get_normalized_expression(indices=[300])


def test_predictive_sample__keeps_totals_and_knows_of_other_cells_nothing_but_places(trained):
    table, model = trained
    drawn = model.posterior_predictive_sample(n_samples=20)
    assert drawn.shape == (*table.shape, 20)
    np.testing.assert_allclose(drawn.sum(1).mean(), table.X.sum(1).mean(), rtol=0.02)
    held, known = table[::4].copy(), table[np.arange(table.n_obs) % 4 > 0].copy()
    asked = model.posterior_predictive_sample(held, n_samples=30, given=known)
    shuffled = held.copy()
    shuffled.X = held.X.toarray()[:, ::-1].copy()
    np.testing.assert_array_equal(asked, model.posterior_predictive_sample(shuffled, n_samples=30, given=known))
    apart = model.posterior_predictive_sample(held, n_samples=30)
    truth = held.X.toarray()
    scores = [np.corrcoef(x.mean(-1).ravel(), truth.ravel())[0, 1] for x in (asked, apart)]
    assert 0.5 < scores[0] < scores[1]


def test_predictive_intervals__hold_the_counts_of_held_out_cells(trained):
    table, model = trained
    fresh = tissue(seed=1)
    known = table
    drawn = model.posterior_predictive_sample(fresh, n_samples=200, given=known).astype(float)
    noise = np.random.default_rng(0).random(drawn.shape[:2])
    x = fresh.X.toarray()[..., None]
    rank = (drawn < x).mean(-1) + noise * (drawn == x).mean(-1)  # uniform if the draws are correct
    assert 0.86 < ((rank > 0.05) & (rank < 0.95)).mean() < 0.94


def test_impute__finds_missing_genes_within_their_interval(trained):
    table, model = trained
    reduced = table[:, 2:].copy()
    found = model.impute(reduced, n_samples=100)
    assert list(found.var_names) == ["g0", "g1"]
    truth = table.X[:, :2].toarray()
    for i in range(2):
        assert np.corrcoef(found.X[:, i], truth[:, i])[0, 1] > 0.6
    assert found.X.sum() == pytest.approx(truth.sum(), rel=0.1)
    inside = (found.layers["low"] <= truth) & (truth <= found.layers["high"])
    assert 0.87 < inside.mean() < 0.98  # bounds are whole numbers: intervals contain more than 90 %
    with pytest.raises(InputError, match="has all genes"):
        model.impute(table)


def test_sample_tissue__is_smooth_and_follows_cells_held_fixed(trained):
    table, model = trained
    d = model.module.shape.n_niche
    where = np.random.default_rng(5).uniform(0, 100, (400, 2))
    near = sampling.cKDTree(where).query(where, 2)[1][:, 1]
    prior = model.sample_tissue(where)
    niche = prior.obsm["X_spatialvae"][:, 0]
    assert np.corrcoef(niche, niche[near])[0, 1] > 0.5
    assert prior.X.shape == (400, table.n_vars)
    np.testing.assert_array_equal(prior.obsm["spatial"], where)
    truth = np.sin(where[:, 0] / 15)
    given = model.sample_tissue(where, given=table).obsm["X_spatialvae"][:, :d]
    assert abs(np.corrcoef(given[:, 0], truth)[0, 1]) > 0.8 > abs(np.corrcoef(niche, truth)[0, 1])
    alone = model.sample_prior(4000).obsm["X_spatialvae"]
    np.testing.assert_allclose(alone[:, :d].var(0), model.module.niche_variance, rtol=0.1)
    expected = model.module.cells_around(*model.module.unknown_niche(1)).moments()[1][0].detach()
    np.testing.assert_allclose(alone[:, d:].var(0), expected, rtol=0.1)


def test_sample_tissue__says_what_is_wrong(trained):
    table, model = trained
    where = np.random.default_rng(5).uniform(0, 100, (20, 3))
    for asked, message in (
        ({"coordinates": where, "given": table}, "coordinates of 3 axes cannot be joined with coordinates of 2 axes"),
        ({"coordinates": where[:0]}, "coordinates has no rows"),
        ({"coordinates": "here"}, "is not an array of numbers"),
        ({"coordinates": where, "library_size": np.ones(3)}, "one number for each of 20 cells"),
        ({"coordinates": where, "library_size": "latent"}, "one number for each of 20 cells"),
    ):
        with pytest.raises(InputError, match=message):
            model.sample_tissue(**asked)


def test_sample_prior__without_coordinates():
    table = tissue(60)
    SpatialVAE.setup_anndata(table, spatial_key=None)
    model = SpatialVAE(table)
    for cells in ("model", "table"):
        assert model.sample_prior(5, cells).shape == (5, table.n_vars)


def test_sample_tissue__rearranges_the_cells_of_the_table(trained):
    table, model = trained
    made = model.sample_tissue(table.obsm["spatial"], cells="table")
    depth = np.asarray(table.X.sum(1)).ravel()
    near = sampling.cKDTree(table.obsm["spatial"]).query(table.obsm["spatial"], 2)[1][:, 1]
    z = made.obsm["X_spatialvae"][:, model.module.shape.n_niche]
    assert len(np.unique(z)) == table.n_obs
    known = model.get_latent_representation(which="cell")[:, 0]
    assert np.corrcoef(z, z[near])[0, 1] == pytest.approx(np.corrcoef(known, known[near])[0, 1], abs=0.15)
    # cells lie elsewhere: patterns of one arrangement may correlate by chance
    others = [model.sample_tissue(table.obsm["spatial"], seed=seed, cells="table") for seed in (1, 2)]
    arrangements = [each.obsm["X_spatialvae"][:, model.module.shape.n_niche] for each in (made, *others)]
    assert np.mean([abs(np.corrcoef(values, known)[0, 1]) for values in arrangements]) < 0.5
    assert made.X.sum() == pytest.approx(depth.sum(), rel=0.03)


def test_sample_tissue__has_the_types_of_the_table():
    """Two distinct types, intermixed over the whole tissue."""
    rng, rate = np.random.default_rng(0), np.where(np.arange(10) % 2, 30.0, 2.0)
    kind = rng.random(300) < 0.5
    table = tissue()
    table.X = sp.csr_matrix(rng.poisson(np.where(kind[:, None], rate, rate[::-1])).astype(np.float32))
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, n_latent=3)
    model.train(max_steps=300, progress=False)

    def share(made):
        return made.X.toarray()[:, ::2].sum(1) / np.maximum(made.X.toarray().sum(1), 1)

    assert model.module.shape.n_types > 1
    between = {}
    given = {"coordinates": table.obsm["spatial"], "library_size": np.full(300, 160.0)}
    for cells in ("model", "table"):
        made = [model.sample_tissue(cells=cells, seed=seed, **given) for seed in range(2)]
        assert made[0].X.sum(1).mean() == pytest.approx(160, rel=0.05)
        between[cells] = np.mean([np.abs(share(one) - 0.5) < 0.25 for one in made])
    assert (np.abs(share(table) - 0.5) < 0.25).mean() == 0
    assert max(between.values()) < 0.05
    with pytest.raises(InputError, match="cells is 'nope'"):
        model.sample_prior(3, cells="nope")
    with pytest.raises(InputError, match="library_size must be positive"):
        model.sample_tissue(table.obsm["spatial"], library_size=np.zeros(300))
