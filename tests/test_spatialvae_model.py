from __future__ import annotations

import copy

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score

import reference
from merfish import datasets
from spatialvae import (
    InputError,
    SpatialVAE,
    analysis,
    batches,
    evidence,
    graph,
    likelihoods,
    linear,
    neighbours,
    niche_prior,
    plots,
    training,
    units,
)
from spatialvae.counts import read_counts
from spatialvae.data import Cells
from spatialvae.module import SpatialModule


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
    model.train(max_steps=300, batch_size=64, progress=False)
    return table, model


def test_terms__match_a_naive_bound_cell_by_cell(trained):
    _, model = trained
    module, section = copy.deepcopy(model.module), model._section
    module.drop_types()
    rows = np.arange(section.cells.n_cells)
    with torch.no_grad():
        noise = module.noise(len(rows), torch.Generator().manual_seed(3))
        sites = module.sites(section)
        niche = module.solve(section.space, sites)
        terms = module.terms(section, rows, niche, noise)
        d, own = module.shape.n_niche, module.log_residual.exp().numpy()
        z_niche = niche.mean + noise[:, :d] * niche.variance.sqrt()
        prior_mean = np.zeros((len(rows), module.shape.n_cell))
        prior_mean[:, :d] = z_niche.numpy()
        precision = sites.log_precision.exp().numpy().astype(float)
        variance = 1 / (precision + 1 / own)
        mean = variance * (precision * sites.target.numpy() + prior_mean / own)
        z_cell = torch.from_numpy(mean).float() + noise[:, d:] * torch.from_numpy(variance).float().sqrt()
        logits, logit_zero = module.decoder(z_cell, section.batch)
        shares, zeros = logits.softmax(-1).numpy(), logit_zero.sigmoid().numpy()
    for i in (0, 7, 100):
        likelihood, divergence = reference.cell_bound(
            section.cells.counts.dense(np.array([i]))[0],
            shares[i],
            zeros[i],
            module.log_theta.detach().exp().numpy(),
            mean[i],
            variance[i],
            prior_mean[i],
            own,
        )
        assert terms.log_likelihood[i].item() == pytest.approx(likelihood, rel=1e-4)
        assert terms.kl_cell[i].item() == pytest.approx(divergence, rel=1e-4)


def test_niche__is_the_posterior_of_dense_algebra(trained):
    _, model = trained
    module, section = model.module, model._section
    sites = module.sites(section)
    niche = module.solve(section.space, sites)
    total = 0.0
    for d, (v, r) in enumerate(zip(module.smooth_variance.tolist(), module.range.tolist(), strict=True)):
        root = np.eye(len(niche.mean)) + r * section.space.laplacian.toarray()
        own = np.exp(module.log_residual[d].item())
        g = 1 / (own + np.exp(-sites.log_precision[:, d].numpy().astype(float)))
        covariance = np.linalg.inv(root / v + np.diag(g))
        mean = covariance @ (g * sites.target[:, d].numpy())
        np.testing.assert_allclose(niche.mean[:, d], mean, atol=2e-3)
        equal = np.linalg.inv(root / v + g.mean() * np.eye(len(g)))
        assert niche.variance[:, d].mean() == pytest.approx(equal.diagonal().mean(), rel=0.1)
        energy = mean @ root @ mean / v + np.trace(root / v @ equal)
        total += 0.5 * (energy - len(g) + np.linalg.slogdet(np.linalg.inv(equal))[1] - np.linalg.slogdet(root / v)[1])
    assert niche.divergence.sum().item() == pytest.approx(total, rel=0.01)


def test_niche__far_from_all_data_keeps_the_variance_of_the_prior(trained):
    table, model = trained
    module, section = model.module, model._section
    known = table.obsm["spatial"][:, 0] < 50
    weight, _, v, r = module._system(module.sites(section), known)
    variance = module.solve(section.space, module.sites(section), known).variance.numpy()
    for d in range(len(v)):
        precision = np.eye(len(known)) + r[d] * section.space.laplacian.toarray() + np.diag(weight[:, d])
        expected = v[d] * np.linalg.inv(precision).diagonal()
        assert np.log(variance[~known, d] / expected[~known]).mean() == pytest.approx(0, abs=0.3)
        assert np.log(variance[known, d] / expected[known]).mean() == pytest.approx(0, abs=0.1)


def test_division__judges_random_cells_and_hides_all_that_are_held_out(trained, monkeypatch):
    _, model = trained
    monkeypatch.setattr(training, "MOST_HELD", 20)
    n = model._section.cells.n_cells
    division = training.divided(model._section, training.Plan(held_out=0.5))
    assert (len(division.judged), (~division.known).sum()) == (20, n // 2)
    assert not division.known[division.judged].any()
    np.testing.assert_array_equal(np.flatnonzero(division.known), division.rows)
    assert division.judged.max() > 0.75 * n > 2 * division.judged.min()


def test_embedding__does_not_depend_on_the_order_of_cells(trained):
    table, model = trained
    order = np.random.default_rng(0).permutation(table.n_obs)
    shuffled = model.get_latent_representation(table[order].copy())
    np.testing.assert_allclose(shuffled, model.get_latent_representation()[order], atol=5e-3)


def test_embedding__of_one_section_ignores_the_other(trained):
    table, model = trained
    first = (table.obs["section"] == 0).to_numpy()
    alone = model.get_latent_representation(table[first].copy(), which="niche")
    np.testing.assert_allclose(alone, model.get_latent_representation(which="niche")[first], atol=5e-3)


def test_niche_of_others__does_not_see_the_cell(trained):
    table, model = trained
    asked, known = table[:40].copy(), table[40:].copy()
    before = model._around(asked, known)
    asked.X = asked.X[::-1]
    after = model._around(asked, known)
    torch.testing.assert_close((before.mean, before.variance), (after.mean, after.variance), rtol=0, atol=0)


def test_untrained_latents__are_directions_of_unit_variance_that_rebuild_the_components():
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    target = model.module.sites(model._section).target.numpy()
    np.testing.assert_allclose(np.cov(target.T), np.eye(target.shape[1]), atol=0.01)
    x = table.X.toarray()
    logs = np.log1p(x / x.sum(1, keepdims=True) * np.median(x.sum(1)))
    left, values, right = np.linalg.svd(logs - logs.mean(0), full_matrices=False)
    k = target.shape[1]
    expected = (left[:, :k] * values[:k]) @ right[:k]
    np.testing.assert_allclose(target @ model.module.decode.numpy().T, expected, atol=5e-3)


def test_training__improves_the_bound_and_finds_the_domains(trained):
    table, model = trained
    assert model.training_log["evidence_validation"].iloc[-1] > model.training_log["evidence_validation"].iloc[0]
    labels = model.domains(2)
    agree = (labels == table.obs["domain"]).mean()
    assert max(agree, 1 - agree) > 0.9
    assert list(table.obs["spatial_domain"].cat.categories) == ["0", "1"]
    np.testing.assert_allclose(table.obsm["spatial_domain_probability"].sum(1), 1)


def test_domains__of_a_loaded_model_are_the_same(trained, tmp_path):
    table, model = trained
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(SpatialVAE.load(tmp_path / "model", table).domains(2), model.domains(2))


def test_niche_latents__are_those_of_an_untrained_model(trained):
    fresh = SpatialVAE(trained[0])
    cells, graphs, shape = fresh._section.cells, fresh._section.graphs, fresh.module.shape
    latents = linear.niche_latents(cells, graphs, shape.n_cell, shape.n_niche)
    np.testing.assert_allclose(latents, fresh.module.means(fresh._section)[1][:, : shape.n_niche], atol=1e-4)


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
    before = model.module.log_residual.detach().clone()

    def fails_once(module, section, division, plan, report, team):
        assert torch.equal(module.log_residual, before)
        history = run(module, section, division, plan, report, team)
        rates.append(plan.learning_rate)
        if len(rates) == 1 and fault == "not finite":
            raise FloatingPointError
        return history if len(rates) > 1 else [row | {"used_cell_dimensions": 0.0} for row in history]

    monkeypatch.setattr(training, "_train", fails_once)
    model.train(2, learning_rate=3e-3, progress=False)
    assert rates == [3e-3, 1e-3]
    assert (model.training_log["restart"] == 1).all()


def test_training__goes_on_and_keeps_its_history():
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    model.train(max_steps=200, progress=False)
    first, bound = model.training_log, model.get_elbo()
    model.train(max_steps=200, progress=False)
    assert model.training_log["step"].tolist() == [100, 200, 300, 400]
    pd.testing.assert_frame_equal(model.training_log.iloc[:2], first)
    assert model.get_elbo() > bound - 0.5


@pytest.mark.parametrize("where", [(training._Run, "step"), (units, "fit"), (neighbours, "fit")])
def test_training__interrupted_does_not_change_the_model(where, monkeypatch):
    table = tissue(60)
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    model.train(max_steps=20, progress=False)
    latent, evidence_before = model.get_latent_representation(), model.get_marginal_ll(given=table, n_mc_samples=5)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.train(max_steps=20, progress=False)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)
    assert model.get_marginal_ll(given=table, n_mc_samples=5) == evidence_before
    assert model.training_log["step"].tolist() == [20]


def test_training__of_one_held_out_cell_is_not_taken_for_collapsed():
    table = tissue(12)
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    model.train(max_steps=20, progress=False)
    assert (model.training_log["restart"] == 0).all()


@pytest.mark.parametrize("asked", [{"patience": 0}, {"max_steps": 0}, {"max_epochs": 1.5}, {"batch_size": True}])
def test_training__refuses_numbers_of_steps(asked):
    table = tissue(40)
    SpatialVAE.setup_anndata(table)
    ((name, value),) = asked.items()
    with pytest.raises(InputError, match=f"{name} is {value}; expected a whole number of at least 1"):
        SpatialVAE(table).train(**asked)


def test_training__minibatches_fit_the_table():
    sizes = {n: training.Plan().fitted_to(n).batch_size for n in (5, 1000, 100_000)}
    assert sizes == {5: 1, 1000: 125, 100_000: 256}


def test_training__says_when_no_run_keeps_a_finite_bound(monkeypatch):
    table = tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    monkeypatch.setattr(likelihoods, "negative_binomial_of_logits", lambda x, *_: x.sum(-1) * torch.nan)
    with pytest.raises(FloatingPointError, match="the bound is nan in step"):
        model.train(1, progress=False)


def test_save_and_load__round_trip(trained, tmp_path):
    table, model = trained
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    again = SpatialVAE.load(tmp_path / "model", table)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    assert again.get_elbo() == model.get_elbo()
    pd.testing.assert_frame_equal(again.training_log, model.training_log)


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
    """With two genes, each latent has one dimension, so that the plain average over the prior converges."""
    table = tissue(60, genes=2)
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table)
    model.train(max_steps=600, batch_size=32, held_out=0, progress=False)
    module, section = model.module, model._section
    rows = np.arange(60)
    x = module.counts(section, rows)
    generator = torch.Generator().manual_seed(0)
    each = []
    with torch.no_grad():
        for _ in range(4000):
            niche, own = torch.randn(2, 60, 1, generator=generator)
            z_cell = niche * module.niche_variance.sqrt() + own * (module.log_residual / 2).exp()
            each.append(module.log_likelihood(section, rows, x, z_cell))
    plain = (torch.logsumexp(torch.stack(each), 0) - np.log(4000)).mean().item()
    assert model.get_marginal_ll(n_mc_samples=1000) == pytest.approx(plain, abs=0.03)


def test_cell_without_neighbours__has_the_prior_of_one_whose_neighbours_are_unknown():
    table = tissue(60)
    table.obs["section"] = ["alone"] + ["rest"] * 59
    SpatialVAE.setup_anndata(table, sample_key="section")
    model = SpatialVAE(table)
    module, space = model.module, model._section.space
    precision = 1 + module.range * space.laplacian.diagonal()[0]
    np.testing.assert_allclose(module.smooth_variance / precision, module.niche_variance, rtol=1e-5)
    unknown = model._around(table[:1].copy(), table[1:].copy())
    torch.testing.assert_close(unknown.mean, torch.zeros_like(unknown.mean))
    torch.testing.assert_close(unknown.variance[0], module.niche_variance, rtol=1e-4, atol=0)


def test_marginal_likelihood__knows_more_with_neighbours(trained):
    table, model = trained
    asked, known = table[::5].copy(), table[np.arange(table.n_obs) % 5 > 0].copy()
    alone = model.get_marginal_ll(asked, 300)
    assert model.get_marginal_ll(asked, 300, given=known) > alone + 0.1


def test_domains__number_is_chosen_when_not_given():
    table = tissue(300)
    SpatialVAE.setup_anndata(table)
    assert len(set(SpatialVAE(table).domains())) == 2


def test_domains__number_is_one_without_spatial_structure():
    table = tissue(300)
    table.obsm["spatial"] = table.obsm["spatial"][np.random.default_rng(3).permutation(300)]
    SpatialVAE.setup_anndata(table)
    assert set(SpatialVAE(table).domains()) == {0}
    assert (table.uns["spatial_domain_number"]["by_chance"] > 0).any()


def test_domains__do_not_follow_genes_that_differ_between_samples(monkeypatch):
    monkeypatch.setattr(analysis, "MIXTURE_STARTS", 2)
    rng = np.random.default_rng(1)
    table = tissue(600, 12, 1)
    table.obs["section"] = np.arange(600) % 3
    rate = np.where(table.obs["domain"].to_numpy()[:, None] == np.arange(12) % 2, 3.0, 1.0)
    rate = rate * np.exp(rng.normal(0, 0.5, (3, 12)))[table.obs["section"]]
    table.X = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    SpatialVAE.setup_anndata(table, sample_key="section")
    agree = (SpatialVAE(table, niche_encoder="field").domains(2) == table.obs["domain"]).mean()
    assert max(agree, 1 - agree) > 0.9


def test_refined__matches_loops_and_improves_domains(monkeypatch):
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 1, (600, 2))
    domain = np.argmin(np.linalg.norm(place[:, None] - rng.uniform(0, 1, (8, 2)), axis=2), 1) % 4
    latent = rng.normal(size=(600, 4)) + np.eye(4)[domain]
    wide, near = (graph.knn_graph(place, k).adjacency() for k in (36, 15))
    start = analysis.find_domains((latent + near @ latent) / 16, 4)
    found = [adjusted_rand_score(domain, p.argmax(1)) for p in (start, analysis.refined(latent, wide, start))]
    assert found[1] > found[0] + 0.02
    few, part = wide[:60, :60], start[:60] + 0.2
    part /= part.sum(1, keepdims=True)
    monkeypatch.setattr(analysis, "REFINEMENTS", 1)
    monkeypatch.setattr(analysis, "ROWS_AT_ONCE", 16)
    expected = reference.refined_once(latent[:60], np.split(few.indices, few.indptr[1:-1]), part)
    np.testing.assert_allclose(analysis.refined(latent[:60], few, part), expected, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_consensus__is_the_one_with_which_all_clusterings_agree_most(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, 200)
    found = []
    for _ in range(4):
        wrong = rng.random(200) < 0.3
        order = rng.permutation(3)
        found.append(np.eye(3)[order[np.where(wrong, rng.integers(0, 3, 200), truth)]])
    mean = analysis.consensus(found)
    np.testing.assert_allclose(np.sort(mean.sum(0)), np.sort(reference.consensus(found).sum(0)))
    scores = [adjusted_rand_score(truth, each.argmax(1)) for each in (mean, *found)]
    assert scores[0] > max(scores[1:])


@pytest.mark.parametrize("k", [1, 3, 6])
def test_stability__is_greatest_at_the_number_of_clusters(k):
    rng = np.random.default_rng(k)
    latent = rng.normal(size=(240, 6)) + 6 * np.eye(6)[np.arange(240) % k]
    found = analysis.stability(latent)
    assert list(found["k"]) == list(range(2, 21))
    assert analysis.most_stable(found) == k
    assert plots.number_of_domains(found).axes[0].get_xlabel() == "domains"


@pytest.mark.parametrize("step", [0.0, 1e-8])
def test_find_domains__of_rows_that_are_the_same_up_to_rounding(step):
    probability = analysis.find_domains(0.3 + step * np.arange(4.0)[:, None], 2)
    assert set(analysis.in_order_of_size(probability)[0]) == {0}
    np.testing.assert_allclose(probability, probability[[0] * 4], atol=0.01)


def test_reduced_panel__is_embedded_and_its_genes_alone_are_explained(trained):
    table, model = trained
    with pytest.warns(UserWarning, match=r"lacks 2 of the 12 genes.*g10"):
        reduced = model.get_latent_representation(table[:, :10].copy(), which="cell")
    whole = model.get_latent_representation(which="cell")
    assert np.corrcoef(reduced[:, 0], whole[:, 0])[0, 1] > 0.8
    with pytest.warns(UserWarning, match="lacks 2"):
        section = model._read(table[:, :10].copy())
    rows, z = np.arange(5), torch.from_numpy(whole[:5])
    x = model.module.counts(section, rows)
    before = model.module.log_likelihood(section, rows, x, z)
    with torch.no_grad():
        model.module.decoder.out.bias[10:] += 3
    torch.testing.assert_close(model.module.log_likelihood(section, rows, x, z), before)
    with torch.no_grad():
        model.module.decoder.out.bias[10:] -= 3
    other = table[:, :3].copy()
    other.var_names = ["g0", "x1", "x2"]
    with pytest.raises(InputError, match="has 1 of the 12 genes"):
        model.get_latent_representation(other)


def test_cells_without_counts__are_embedded_from_their_neighbours():
    table = tissue()
    table.X = table.X.toarray()
    table.X[[3, 50]] = 0
    SpatialVAE.setup_anndata(table)
    with pytest.warns(UserWarning, match=r"2 cells without counts in X, the first is 'c3'.*their neighbours"):
        model = SpatialVAE(table)
    model.train(max_steps=100, progress=False)
    niche, cell = (model.get_latent_representation(which=which) for which in ("niche", "cell"))
    for i in (3, 50):
        near = model._section.graphs.near[[i]].indices
        spread = niche.std(0)[0]
        assert abs(niche[i, 0] - niche[near, 0].mean()) < spread
        np.testing.assert_allclose(cell[i, : niche.shape[1]], niche[i], atol=1e-4)
    assert np.isfinite([model.get_elbo(), model.get_marginal_ll(n_mc_samples=5)]).all()


def test_results__follow_a_table_that_changes(trained):
    table, model = trained
    before, x = model.get_latent_representation(), table.X.copy()
    table.X = x[::-1]
    assert not np.array_equal(model.get_latent_representation(), before)
    table.X = x
    np.testing.assert_array_equal(model.get_latent_representation(), before)


def test_save__leaves_other_files_and_asks_before_it_replaces(trained, tmp_path):
    _, model = trained
    (tmp_path / "notes.txt").write_text("mine")
    model.save(tmp_path)
    with pytest.raises(InputError, match=r"already contains model\.json; pass overwrite=True"):
        model.save(tmp_path)
    model.save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is not a folder"):
        model.save(tmp_path / "notes.txt")


def test_batch_shifts__are_not_composition():
    """Two types with ratios of 9:1 in one batch and 1:9 in the other: their means differ mostly in composition."""
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], 400)
    kind = rng.random(800) < np.where(batch == 0, 0.1, 0.9)
    effect = np.array([[0.4, -0.8, 0, 0], [-0.4, 0.8, 0, 0]])
    scores = 3 * np.where(kind[:, None], [1, 1, 0, 0], [-1, -1, 0, 0]) + effect[batch] + 0.3 * rng.normal(size=(800, 4))
    found = batches.batch_shifts(scores - scores.mean(0), batch, 2)[0]
    np.testing.assert_allclose(found, effect, atol=0.1)


def test_batch_shifts__are_none_where_batches_differ_in_composition_alone():
    """Types 0 and 1 in one batch, 1 and 2 in the other."""
    rng = np.random.default_rng(1)
    batch = np.repeat([0, 1], 500)
    kind = rng.integers(0, 2, 1000) + batch
    scores = 4 * np.eye(3)[kind] + 0.5 * rng.normal(size=(1000, 3))
    assert np.abs(batches.batch_shifts(scores, batch, 2)[0]).max() < 0.15


@pytest.mark.parametrize("size", [1, 10])
def test_batch_shifts__are_found_where_batches_are_further_apart_than_types(size):
    rng = np.random.default_rng(0)
    batch, kind = np.repeat([0, 1], 500), rng.integers(0, 6, 1000)
    shift = size * rng.normal(size=8)
    scores = rng.normal(size=(6, 8))[kind] + shift * batch[:, None] + 0.1 * rng.normal(size=(1000, 8))
    found = batches.batch_shifts(scores - scores.mean(0), batch, 2)[0]
    np.testing.assert_allclose(found[1] - found[0], shift, atol=0.05)


def counts_of_two_batches(rng, effect, frequency):
    """Negative binomial counts of 4 types, with ``frequency`` (batch, type); also batches and types."""
    batch = np.repeat([0, 1], 1000)
    kind = (rng.random((2000, 1)) > frequency[batch].cumsum(1)).sum(1).clip(0, 3)
    share = np.random.default_rng(5).gamma(0.5, 1, (4, 40))[kind] * np.exp(effect[batch])
    mean = rng.gamma(4, 15, (2000, 1)) * share / share.sum(1, keepdims=True)
    return rng.poisson(mean * rng.gamma(3, 1 / 3, mean.shape)), batch, kind


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_gene_effects__are_found_where_batches_also_differ_in_composition(size):
    """Each batch lacks one of the types. Effects are those of shares, up to a constant of each batch."""
    rng = np.random.default_rng(0)
    effect = size * rng.normal(size=(2, 40))
    frequency = np.array([[0.5, 0.3, 0.2, 0], [0, 0.2, 0.3, 0.5]])
    x, batch, _ = counts_of_two_batches(rng, effect, frequency)
    places = np.zeros(2000, np.int64)
    names, missing = tuple(map(str, range(40))), np.zeros(40, bool)
    cells = Cells(read_counts(x, np.arange(40), "X"), names, missing, None, places, batch, ("a", "b"))
    found = linear.fit_linear(cells, None, 20, 5).effect
    wrong = (found[1] - found[0]) - (effect[1] - effect[0])
    abundant = np.minimum(x[batch == 0].sum(0), x[batch == 1].sum(0)) > 500
    assert abundant.sum() > 15
    naive = np.log(x[batch == 1].sum(0) / x[batch == 0].sum(0)) - (effect[1] - effect[0])
    assert np.std(wrong[abundant]) < 0.15 < 0.3 < np.std(naive[abundant])


def test_gene_effects__are_bounded_for_a_gene_that_one_batch_lacks():
    x, batch, kind = counts_of_two_batches(np.random.default_rng(0), np.zeros((2, 40)), np.full((2, 4), 0.25))
    x[batch == 0, 7] = 0
    effect = batches.gene_effects(read_counts(x, np.arange(40), "X"), batch, 2, np.eye(4, dtype=np.float32)[kind])
    np.testing.assert_allclose(effect[0, 7], -batches.MOST)
    assert np.abs(np.delete(effect, 7, 1)).max() < 0.7


def test_align__moves_batches_together_and_does_not_change_the_likelihood(trained, monkeypatch):
    table, model = trained
    module, section = copy.deepcopy(model.module), model._section
    module.drop_types()
    rows, x = np.arange(table.n_obs), module.counts(section, np.arange(table.n_obs))
    z = module.means(section)[1]
    likelihood = module.log_likelihood(section, rows, x, z)
    monkeypatch.setattr(SpatialModule, "means", lambda *_: (None, z))
    found = batches.batch_shifts(z.double().numpy() - z.mean(0).numpy(), section.cells.batches, 2)[0]
    shift, target = module.cell_encoder.shift.detach().clone(), module.sites(section).target
    origin = module.decoder.origin.clone()
    module.align(section)
    moved = torch.tensor(found, dtype=torch.float32)
    torch.testing.assert_close(module.decoder.origin - origin, moved)
    torch.testing.assert_close(module.cell_encoder.shift - shift, moved)
    torch.testing.assert_close(module.sites(section).target, target - moved[section.batch], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.log_likelihood(section, rows, x, z - moved[section.batch]), likelihood)


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


def spoil_nothing(table):
    table.X[:] = 0


def spoil_composition(table):
    table.X[:] = 2


def spoil_blanks(table):
    table.var["is_blank"] = [False] * 10 + [np.nan] * 2


def spoil_type(table):
    table.X = table.X.astype(object)


def spoil_axes(table):
    table.obsm["spatial"] = np.full((40, 2), "1 um")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_counts, r"row 3, column 2 is 1\.5"),
        (spoil_negative, "row 3, column 2 is -1"),
        (spoil_places, "not finite for 1 cells, the first is 'c5'"),
        (spoil_cells, "cell names are not unique: 'twice'"),
        (spoil_genes, "gene names are not unique: 'twice'"),
        (spoil_nothing, "X has no counts: all 40 cells are zero"),
        (spoil_composition, "all 40 cells with counts have the same composition of 12 genes"),
        (spoil_blanks, r"var\['is_blank'\] is nan for gene 'g10' \(2 such genes\); expected True or False"),
        (spoil_type, "X is of type object; expected integers, float32 or float64"),
        (spoil_axes, r"obsm\['spatial'\] is not an array of numbers: could not convert string to float: .*'1 um'"),
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


@pytest.mark.parametrize(("size", "value"), [("n_latent", 0), ("n_niche", 0), ("n_hidden", 0), ("n_latent", 10.0)])
def test_model__refuses_a_size(size, value):
    table = tissue(40)
    SpatialVAE.setup_anndata(table)
    with pytest.raises(InputError, match=f"{size} is {value}; expected a whole number of at least 1"):
        SpatialVAE(table, **{size: value})


def test_setup_anndata__refuses_what_is_no_table():
    with pytest.raises(InputError, match=r"expected an AnnData with .*, got DataFrame"):
        SpatialVAE.setup_anndata(tissue(40).to_df())
    with pytest.raises(InputError, match="no column \\['section'\\] in obs"):
        SpatialVAE.setup_anndata(tissue(40), sample_key=["section"])


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


def test_niche_prior__has_the_mean_and_variance_of_the_posterior_and_leaves_counts_alone(trained):
    """Parameters of the field that are far off, and latents that are moved, are found again."""
    _, model = trained
    module, section, wanted = copy.deepcopy(model.module), model._section, model.module
    rows, moved = np.arange(section.cells.n_cells), torch.zeros(module.shape.n_cell)
    moved[: module.shape.n_niche] = -2.0
    with torch.no_grad():
        before = module.logits(section, rows, module.sites(section).target)[0]
        module.recentre(moved)
        torch.testing.assert_close(
            module.logits(section, rows, module.sites(section).target)[0], before, atol=1e-3, rtol=0
        )
    module.smooth_variance /= 20
    module.range.fill_(3.0)
    again = niche_prior.fit(module, section)
    niche = module.solve(again.space, module.sites(again))
    torch.testing.assert_close(niche.mean.mean(0), torch.zeros(module.shape.n_niche), atol=0.1, rtol=0)
    square = (niche.mean**2 + niche.variance).mean(0)
    torch.testing.assert_close(square, module.niche_variance, rtol=0.3, atol=0)
    torch.testing.assert_close(module.niche_variance, wanted.niche_variance, rtol=0.3, atol=0)


def test_units__a_molecule_is_as_informative_about_each_dimension_and_p_of_x_does_not_change(trained):
    _, model = trained
    module, section = copy.deepcopy(model.module), model._section
    rows = np.arange(section.cells.n_cells)
    z = torch.from_numpy(model.get_latent_representation(which="cell"))
    found = units.information(module, section, rows, z)
    torch.testing.assert_close(found, torch.full_like(found, float(found.mean())), rtol=1e-2, atol=0)
    module.drop_types()
    before, divergence = evidence.log_evidence(module, section, rows, 20)[0], divergence_of(module, section)
    module.rescale(torch.linspace(0.2, 3, module.shape.n_cell))
    np.testing.assert_allclose(evidence.log_evidence(module, section, rows, 20)[0], before, atol=0.01)
    torch.testing.assert_close(divergence_of(module, section), divergence, rtol=1e-3, atol=0)
    units.fit(module, section)
    torch.testing.assert_close(module.decoder.loadings, model.module.decoder.loadings, rtol=1e-2, atol=1e-4)


def divergence_of(module, section):
    """Divergence of the posterior of all niches from their prior, in nats."""
    return module.solve(section.space, module.sites(section)).divergence.sum()
