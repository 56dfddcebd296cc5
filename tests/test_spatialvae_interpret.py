from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from spatialvae import InputError, SpatialVAE, interpret
from spatialvae.inference import spatial_blocks


def waves():
    """300 cells, in which the first three genes follow a wave in space."""
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 100, (300, 2))
    rate = np.exp(1 + np.outer(np.sin(places[:, 0] / 20), [1, 1, -1, 0, 0, 0]) + 0.3 * rng.normal(size=(300, 6)))
    adata = anndata.AnnData(
        rng.poisson(rate).astype(np.float32),
        obs=pd.DataFrame({"half": np.where(places[:, 0] > 63, "right", "left")}, index=[f"c{i}" for i in range(300)]),
        var=pd.DataFrame(index=list("abcdef")),
        obsm={"spatial": places},
    )
    SpatialVAE.setup_anndata(adata)
    return adata


@pytest.fixture(scope="module")
def model():
    made = SpatialVAE(waves(), n_latent=4, n_niche=2, n_hidden=16)
    made.train(max_steps=200, progress=False)
    return made


def test_latent_programs__are_mean_derivatives_of_log_shares(model):
    programs = interpret.latent_programs(model)
    z = torch.from_numpy(model.get_latent_representation(which="cell"))
    batch, step = torch.zeros(len(z), dtype=torch.long), 1e-2
    with torch.no_grad():
        for d, name in enumerate(programs):
            shift = torch.zeros(z.shape[1])
            shift[d] = step
            log_share = [torch.log_softmax(model.module.decoder(z + s, batch)[0], -1) for s in (shift, -shift)]
            slope = ((log_share[0] - log_share[1]) / (2 * step)).mean(0)
            np.testing.assert_allclose(programs[name], slope, atol=2e-3)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_linear_decoder__log_shares_are_linear_in_its_loadings(tmp_path, likelihood):
    adata = waves()
    SpatialVAE.setup_anndata(adata, batch_key="half")
    made = SpatialVAE(adata, n_latent=4, n_niche=2, gene_likelihood=likelihood, linear_decoder=True)
    made.train(max_steps=200, progress=False)
    loadings = made.get_loadings()
    assert list(loadings.index) == list("abcdef")
    assert list(loadings.columns) == [f"cell_{i}" for i in range(4)]
    shares = np.log(made.get_normalized_expression(transform_batch="left", return_numpy=True))
    linear = made.get_latent_representation(which="cell") @ loadings.to_numpy().T
    for values in (shares, linear):
        values -= values.mean(1, keepdims=True)  # shares do not depend on a constant
    np.testing.assert_allclose(np.diff(shares, axis=0), np.diff(linear, axis=0), atol=1e-4)
    programs = interpret.latent_programs(made)
    np.testing.assert_allclose(programs - programs.mean(0), loadings, atol=1e-5)
    made.save(tmp_path)
    again = SpatialVAE.load(tmp_path, adata)
    pd.testing.assert_frame_equal(again.get_loadings(), loadings)
    assert again.get_marginal_ll(n_mc_samples=20) == made.get_marginal_ll(n_mc_samples=20)


def test_loadings__are_of_linear_decoders_only(model):
    with pytest.raises(InputError, match="linear_decoder=True"):
        model.get_loadings()


def test_programs_and_reach__tell_what_was_put_in(model):
    first = interpret.latent_programs(model)["cell_0"]
    assert np.sign(first["a"]) == np.sign(first["b"]) == -np.sign(first["c"])
    assert set(first.abs().nlargest(3).index) == {"a", "b", "c"}
    reach = interpret.neighbour_reach(model)
    assert reach["niche_share"].iloc[0] > 0.5
    assert 5 < reach["range"].iloc[0] < 300
    top = interpret.top_genes(pd.DataFrame({"p": [2.0, 0.5, -1.0]}, index=["x", "y", "z"]), 2)
    assert top.loc[0].tolist() == ["p", "x, y", "z"]


def test_domains__smooth_ones_have_shorter_borders(model):
    near = model._read(None).graphs.near
    plain, smooth = (model.domains(3, smooth=smooth) for smooth in (False, True))
    edges = near.tocoo()
    borders = [(labels[edges.row] != labels[edges.col]).mean() for labels in (plain, smooth)]
    assert borders[1] < borders[0]
    assert (plain == smooth).mean() > 0.8
    np.testing.assert_array_equal(model.adata.obs["spatial_domain"].astype(int), smooth)


def test_domain_programs__by_hand():
    expression = np.array([[0.0, 1], [0, 3], [2, 1], [2, 3]])
    found = interpret.domain_programs([expression[:1], expression[1:]], np.array([0, 0, 1, 1]), ["a", "b"])
    np.testing.assert_allclose(found, [[-2, 2], [0, 0]])


def test_disentanglement__each_latent_tells_its_own():
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 10, (600, 2))
    region, kind = (np.sin(places[:, 0] * 2) > 0).astype(int), rng.integers(0, 2, 600)
    niche, cell = (3.0 * label[:, None] + rng.normal(size=(600, 1)) for label in (region, kind))
    answers = {"region": region, "type": kind}
    table = interpret.disentanglement(niche, cell, answers, spatial_blocks(places, 20)).set_index("asked")
    assert table.loc["region", "niche"] > 0.85 > 0.65 > table.loc["region", "cell"]
    assert table.loc["type", "cell"] > 0.85 > 0.65 > table.loc["type", "niche"]
    assert (table["both"] > 0.85).all()


def test_disentanglement__of_classes_that_are_in_one_block():
    x, rare = np.random.default_rng(0).normal(size=(60, 2)), (np.arange(60) < 5).astype(int)
    found = interpret.disentanglement(x, x, {"rare": rare, "one": 0 * rare}, np.arange(60) // 20)
    assert found["chance"].tolist() == [0.5, 1]
    assert (found.loc[0, ["niche", "cell", "both"]] <= 0.5).all()  # never learned before it occurs
    assert (found.loc[1, ["niche", "cell", "both"]] == 1).all()


def test_enrichment__against_scipy_and_by_hand(tmp_path):
    from scipy.stats import mannwhitneyu

    scores = pd.Series(np.random.default_rng(0).integers(0, 9, 40).astype(float), index=[f"g{i}" for i in range(40)])
    members = [f"g{i}" for i in range(12)]
    path = tmp_path / "sets.gmt"
    path.write_text("one\tsource\t" + "\t".join(members) + "\nsmall\tsource\tg1\n")
    sets = interpret.read_gmt(path)
    ranked = interpret.ranked_enrichment(scores, sets)
    truth = mannwhitneyu(scores[members], scores.drop(members), use_continuity=False, method="asymptotic")
    assert ranked["set"].tolist() == ["one"]
    assert ranked.loc[0, "p_value"] == pytest.approx(truth.pvalue)
    assert ranked.loc[0, "auc"] == pytest.approx(truth.statistic / (12 * 28))
    drawn = interpret.over_representation(["g0", "g1", "g2"], scores.index, sets)
    assert drawn.loc[0, "p_value"] == pytest.approx(12 * 11 * 10 / (40 * 39 * 38))
    path.write_text("name only\n")
    with pytest.raises(InputError, match="line 1: 1 fields"):
        interpret.read_gmt(path)
