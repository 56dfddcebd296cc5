from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import reference
from merfish import datasets
from spatialvae import InputError, SpatialVAE, analysis, likelihoods, training
from spatialvae.field import laplacian_of


def tissue(n=240, genes=12, seed=0):
    """Two halves with different cell types, in two sections and two batches."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    domain = (xy[:, 0] > 50).astype(int)
    kind = np.where(rng.random(n) < 0.85, domain, 1 - domain)
    rate = np.where(kind[:, None] == (np.arange(genes) % 2), 6.0, 1.0)
    return anndata.AnnData(
        sp.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(
            {"domain": domain, "section": np.arange(n) % 2, "run": [f"run{i % 2}" for i in range(n)]},
            index=[f"c{i}" for i in range(n)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
        obsm={"spatial": xy},
    )


@pytest.fixture(scope="module")
def trained():
    table = tissue()
    SpatialVAE.setup_anndata(table, sample_key="section", batch_key="run")
    model = SpatialVAE(table)
    model.train(6, batch_size=64, progress=False)
    return table, model


def test_terms__match_a_naive_bound_cell_by_cell(trained):
    _, model = trained
    module, section = model.module, model._section
    rows = np.arange(section.cells.n_cells)
    with torch.no_grad():
        noise = module.noise(len(rows), torch.Generator().manual_seed(3))
        terms = module.terms(section, rows, noise)
        posterior = module.infer(section, rows)
        n = module.shape.n_niche
        z_niche = posterior.niche_mean + noise[:, :n] * (posterior.niche_log_variance / 2).exp()
        z_cell = posterior.cell_mean + noise[:, n:] * (posterior.cell_log_variance / 2).exp()
        shares = module.decoder(z_cell, z_niche, section.batch)[0].softmax(-1).numpy()
        prior_mean = (z_niche @ module.niche_to_cell.T).numpy()
    for i in (0, 7, 100):
        likelihood, divergence = reference.cell_bound(
            section.cells.counts.dense(np.array([i]))[0],
            shares[i],
            module.log_theta.detach().exp().numpy(),
            posterior.cell_mean[i].numpy(),
            posterior.cell_log_variance[i].exp().numpy(),
            prior_mean[i],
            module.log_residual.detach().exp().numpy(),
        )
        assert terms.log_likelihood[i].item() == pytest.approx(likelihood, rel=1e-4)
        assert terms.kl_cell[i].item() == pytest.approx(divergence, rel=1e-4)
    edges = [(i, j) for i, slots in enumerate(section.near.tolist()) for j in slots if j >= 0]
    adjacency = sp.csr_array((np.ones(len(edges)), np.array(edges).T), shape=(len(rows), len(rows)))
    joint = reference.niche_divergence(
        posterior.niche_mean.numpy().astype(float),
        posterior.niche_log_variance.exp().numpy().astype(float),
        laplacian_of(adjacency).toarray(),
        float(module.range),
        module.smooth_variance.numpy(),
    )
    assert terms.kl_niche.sum().item() == pytest.approx(joint, rel=0.02)  # the determinant is an estimate


def test_embedding__does_not_depend_on_the_order_of_cells(trained):
    table, model = trained
    order = np.random.default_rng(0).permutation(table.n_obs)
    shuffled = model.get_latent_representation(table[order].copy())
    np.testing.assert_allclose(shuffled, model.get_latent_representation()[order], atol=2e-4)


def test_embedding__of_one_section_ignores_the_other(trained):
    table, model = trained
    first = (table.obs["section"] == 0).to_numpy()
    alone = model.get_latent_representation(table[first].copy(), which="niche")
    np.testing.assert_allclose(alone, model.get_latent_representation(which="niche")[first], atol=5e-3)


def test_niche__sees_a_cell_itself_only_in_the_field(trained):
    _, model = trained
    section, niche = model._section, model.module.niche_encoder
    slots, others = section.wide[:1], torch.arange(section.cells.n_cells) != 0
    assert (slots[0] != 0).all()
    other = torch.where(others[:, None], section.features, torch.randn_like(section.features))
    found = [
        niche(section.smooth[:1], features, slots, section.distance[:1])[0] for features in (section.features, other)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert not torch.equal(found[0], niche(section.smooth[1:2], other, slots, section.distance[:1])[0])


def test_untrained_latents__are_components_and_their_niche():
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    cell = model.get_latent_representation(which="cell") * model.module.cell_variance.sqrt().numpy()
    x = table.X.toarray()
    logs = np.log1p(x / x.sum(1, keepdims=True) * np.median(x.sum(1)))
    left, values, _ = np.linalg.svd(logs - logs.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(cell), np.abs(left * values)[:, : cell.shape[1]], atol=2e-3)
    near, wide = (_adjacency(slots.numpy()) for slots in (model._section.near, model._section.wide))
    niche = model.module.field().niche(laplacian_of(near), wide, cell)
    np.testing.assert_allclose(model.get_latent_representation(which="niche"), niche, atol=2e-3)


def _adjacency(slots):
    rows, columns = np.nonzero(slots >= 0)
    return sp.csr_array((np.ones(len(rows)), (rows, slots[rows, columns])), shape=(len(slots), len(slots)))


def test_training__improves_the_bound_and_finds_the_domains(trained):
    table, model = trained
    assert model.history["elbo_validation"].iloc[-1] > model.history["elbo_validation"].iloc[0]
    labels = model.domains(2)
    agree = (labels == table.obs["domain"]).mean()
    assert max(agree, 1 - agree) > 0.9
    assert list(table.obs["spatial_domain"].cat.categories) == ["0", "1"]
    np.testing.assert_allclose(table.obsm["spatial_domain_probability"].sum(1), 1)


def test_training__same_seed_gives_the_same_bytes():
    found = []
    for _ in range(2):
        table = tissue(80)
        SpatialVAE.setup_anndata(table)
        model = SpatialVAE(table, seed=4)
        model.train(2, batch_size=32, seed=4, progress=False)
        found.append(model.get_latent_representation().tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("fault", ["not finite", "collapsed"])
def test_training__begins_again_after_a_run_that_failed(fault, monkeypatch):
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model, rates, run = SpatialVAE(table), [], training._train
    before = model.module.niche_to_cell.detach().clone()

    def fails_once(module, section, plan, report, team):
        assert torch.equal(module.niche_to_cell, before)
        history = run(module, section, plan, report, team)
        rates.append(plan.learning_rate)
        if len(rates) == 1 and fault == "not finite":
            raise FloatingPointError
        return history if len(rates) > 1 else [row | {"used_cell_dimensions": 0.0} for row in history]

    monkeypatch.setattr(training, "_train", fails_once)
    model.train(2, learning_rate=3e-3, progress=False)
    assert rates == [3e-3, 1e-3]
    assert (model.history["restart"] == 1).all()


def test_training__says_when_no_run_keeps_a_finite_bound(monkeypatch):
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    monkeypatch.setattr(likelihoods, "negative_binomial_of_logits", lambda x, *_: x.sum(-1) * torch.nan)
    with pytest.raises(FloatingPointError, match="the bound is nan in epoch 0"):
        model.train(1, progress=False)


def test_save_and_load__round_trip(trained, tmp_path):
    table, model = trained
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    again = SpatialVAE.load(tmp_path / "model", table)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    assert again.get_elbo() == model.get_elbo()
    pd.testing.assert_frame_equal(again.history, model.history)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_load__refuses_a_broken_folder(trained, tmp_path, name):
    table, model = trained
    model.save(tmp_path / "model")
    whole = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="model"):
        SpatialVAE.load(tmp_path / "model", table)
    (tmp_path / "model" / name).unlink()
    with pytest.raises(InputError, match=name):
        SpatialVAE.load(tmp_path / "model", table)


def test_normalized_expression__sums_to_one_and_knows_its_genes(trained):
    table, model = trained
    shares = model.get_normalized_expression()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    own = model.get_normalized_expression(library_size="latent", gene_list=["g3"])
    depth = np.asarray(table.X.sum(1)).ravel()
    np.testing.assert_allclose(own["g3"], shares["g3"] * depth, rtol=1e-5)
    with pytest.raises(InputError, match="not trained on gene 'nope'"):
        model.get_normalized_expression(gene_list=["g1", "nope"])


def test_model__without_coordinates_and_with_every_likelihood():
    for likelihood in ("nb", "zinb", "poisson"):
        table = tissue(60)
        SpatialVAE.setup_anndata(table, spatial_key=None)
        model = SpatialVAE(table, gene_likelihood=likelihood)
        model.train(2, batch_size=32, progress=False)
        assert model.get_latent_representation().shape == (60, 11)
        assert np.isfinite(model.get_elbo())


def test_model__in_three_dimensions_with_a_cell_alone_in_its_section():
    table = tissue(60)
    table.obsm["spatial"] = np.c_[table.obsm["spatial"], np.arange(60)]
    table.obs["section"] = ["alone"] + ["rest"] * 59
    SpatialVAE.setup_anndata(table, sample_key="section")
    model = SpatialVAE(table)
    model.train(2, batch_size=32, progress=False)
    assert np.isfinite(model.get_latent_representation()).all()


def test_marginal_likelihood__matches_draws_from_the_prior():
    """Two genes leave one dimension of each latent: the plain average over the prior converges."""
    table = tissue(60, genes=2)
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    model.train(20, batch_size=32, progress=False)
    module, section = model.module, model._section
    x = module.counts(section, np.arange(60))
    generator = torch.Generator().manual_seed(0)
    each = []
    with torch.no_grad():
        for _ in range(4000):
            z_niche = torch.randn(60, module.shape.n_niche, generator=generator)
            z_niche = z_niche * (module.smooth_variance * module.spread).sqrt()
            noise = torch.randn(60, module.shape.n_cell, generator=generator)
            z_cell = z_niche @ module.niche_to_cell.T + noise * (module.log_residual / 2).exp()
            each.append(module.log_likelihood(x, section.depth, section.batch, z_cell, z_niche))
    plain = (torch.logsumexp(torch.stack(each), 0) - np.log(4000)).mean().item()
    assert model.get_marginal_ll(n_mc_samples=1000) == pytest.approx(plain, abs=0.03)


def test_niche_given__is_the_conditional_of_the_dense_field(trained):
    """The neighbours of a cell known without doubt: the row of the precision matrix says what follows."""
    _, model = trained
    module, near = model.module, model._section.near
    dense = laplacian_of(_adjacency(near.numpy())).toarray()
    precision = np.eye(len(dense)) + float(module.range) * dense
    known = torch.randn(len(near), module.shape.n_niche, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        centre, spread = module.niche_given(known[near], torch.zeros_like(known)[near], near >= 0)
    i = 5
    others = np.arange(len(dense)) != i
    np.testing.assert_allclose(
        centre[i], -(precision[i, others] @ known.numpy()[others]) / precision[i, i], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(spread[i], module.smooth_variance.numpy() / precision[i, i], rtol=1e-4)


def test_marginal_likelihood__knows_more_with_neighbours(trained):
    table, model = trained
    asked, known = table[::5].copy(), table[np.arange(table.n_obs) % 5 > 0].copy()
    alone = model.get_marginal_ll(asked, 300)
    assert model.get_marginal_ll(asked, 300, given=known) > alone + 0.1


def test_domains__number_is_chosen_when_not_given():
    table = tissue(300)
    SpatialVAE.setup_anndata(table)
    assert len(set(SpatialVAE(table).domains())) == 2


def test_choose_number__counts_repeated_rows_once():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 2)) + 6 * np.array([[0, 0], [1, 0], [0, 1]])[np.arange(60) % 3]
    latent = np.repeat(rows, 16, 0) + 0.02 * rng.normal(size=(60 * 16, 2))
    assert analysis.choose_number(latent, overlap=16) == 3
    assert analysis.choose_number(latent) > 3


def test_load__refuses_a_table_without_its_genes(trained, tmp_path):
    table, model = trained
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match=r"lacks 1 of the 12 genes.*g11"):
        SpatialVAE.load(tmp_path / "model", table[:, :11].copy())


def spoil_counts(table):
    table.X[3, 2] = 1.5


def spoil_negative(table):
    table.X[3, 2] = -1


def spoil_places(table):
    table.obsm["spatial"][5, 1] = np.nan


def spoil_cells(table):
    table.obs_names = ["twice", "twice", *table.obs_names[2:]]


def spoil_genes(table):
    table.var_names = ["twice", "twice", *table.var_names[2:]]


def spoil_empty(table):
    table.X[7] = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_counts, r"row 3, column 2 is 1\.5"),
        (spoil_negative, "row 3, column 2 is -1"),
        (spoil_places, "not finite for 1 cells, the first 'c5'"),
        (spoil_cells, "cell names are not unique: 'twice'"),
        (spoil_genes, "gene names are not unique: 'twice'"),
        (spoil_empty, "1 cells have no counts in X, the first in row 7"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_model__names_what_is_wrong(spoil, message):
    table = tissue(40)
    table.X = table.X.toarray()
    spoil(table)

    def prepare():
        SpatialVAE.setup_anndata(table)
        SpatialVAE(table)

    with pytest.raises(InputError, match=message):
        prepare()


@pytest.mark.parametrize("key", ["layer", "spatial_key", "sample_key", "batch_key"])
def test_setup_anndata__names_a_missing_key(key):
    with pytest.raises(InputError, match="'nowhere'"):
        SpatialVAE.setup_anndata(tissue(40), **{key: "nowhere"})


def test_model__needs_setup_first():
    with pytest.raises(InputError, match="setup_anndata"):
        SpatialVAE(tissue(40))


def test_blank_words__are_not_modelled():
    table = tissue(60)
    table.var["is_blank"] = [False] * 10 + [True] * 2
    SpatialVAE.setup_anndata(table)
    assert SpatialVAE(table).genes == tuple(f"g{i}" for i in range(10))


def test_osmfish__is_bundled():
    table = datasets.osmfish()
    assert table.shape == (4839, 33)
    assert table.obs["Region"].nunique() == 11
    SpatialVAE.setup_anndata(table)
