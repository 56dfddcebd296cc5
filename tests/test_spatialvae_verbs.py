from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest

from command import call_spatialvae
from spatialvae import InputError, SpatialVAE


def table(n=80):
    rng = np.random.default_rng(0)
    return anndata.AnnData(
        rng.poisson(3, (n, 6)).astype(np.float32),
        obs=pd.DataFrame({"kind": np.arange(n) % 2, "section": ["a", "b"] * (n // 2)}, [f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=list("abcdef")),
        obsm={"spatial": rng.uniform(0, 9, (n, 2))},
    )


@pytest.fixture(scope="module")
def trained():
    adata = table()
    SpatialVAE.setup_anndata(adata, sample_key="section", labels_key="kind")
    model = SpatialVAE(adata, gene_likelihood="zinb")
    assert not model.is_trained
    assert model.history == {}
    model.train(2, train_size=0.8, early_stopping=False, accelerator="cpu", progress=False)
    return model


def test_verbs__of_scvi_tools(trained, capsys):
    assert trained.is_trained
    assert str(trained.device) == "cpu"
    trained.to_device("cpu")
    trained.view_anndata_setup()
    shown = capsys.readouterr().out
    assert "80 cells, 6 genes" in shown
    assert "obs['section']" in shown
    bound = trained.history["elbo_train"]
    assert bound.index.name == "step"
    np.testing.assert_array_equal(bound["elbo_train"], trained.training_log["elbo_train"])
    parameters = trained.get_likelihood_parameters(indices=[3, 4], n_samples=5, give_mean=False)
    assert {name: value.shape for name, value in parameters.items()} == dict.fromkeys(
        ("mean", "dispersions", "dropout"), (5, 2, 6)
    )
    parameters = trained.get_likelihood_parameters()
    expected = parameters["mean"] / (1 + np.exp(parameters["dropout"]))
    np.testing.assert_allclose(expected.sum(1), trained.adata.X.sum(1), rtol=1e-4)
    for kind in ("spearman", "pearson"):
        found = trained.get_feature_correlation_matrix(correlation_type=kind)
        np.testing.assert_allclose(np.diag(found), 1)
        assert list(found.index) == list("abcdef")
    with pytest.raises(InputError, match="correlation_type is 'kendall'"):
        trained.get_feature_correlation_matrix(correlation_type="kendall")


def test_indices__are_rows_of_the_whole_table(trained):
    rows = [7, 2, 30]
    for asked in ({"return_dist": False}, {"return_dist": True}):
        some, whole = (trained.get_latent_representation(indices=of, **asked) for of in (rows, None))
        for a, b in zip(some, whole, strict=True) if asked["return_dist"] else [(some, whole)]:
            np.testing.assert_allclose(a, b[rows], atol=1e-5)
    drawn = np.stack([trained.get_latent_representation(give_mean=False, seed=seed) for seed in range(30)])
    mean, variance = trained.get_latent_representation(return_dist=True)
    assert np.abs((drawn.mean(0) - mean) / np.sqrt(variance)).mean() < 0.2  # return_dist and draws agree
    each = trained.get_marginal_ll(n_mc_samples=200, return_mean=False)
    value, error = trained.get_marginal_ll(n_mc_samples=200, indices=rows, return_error=True)
    assert value == pytest.approx(each[rows].mean(), abs=5 * error + 0.05)
    parts = [trained.get_elbo(indices=of) for of in (np.arange(80) < 40, np.arange(40, 80))]
    assert np.mean(parts) == pytest.approx(trained.get_elbo(), abs=0.5)
    assert trained.get_reconstruction_error(indices=rows) > 0


@pytest.mark.parametrize("indices", [3, [[1, 2]], slice(3), [-1], [1.0], np.ones(5, bool)])
def test_indices__are_refused(trained, indices):
    with pytest.raises(InputError, match="indices must be rows from 0 to 79, or a mask with one value per cell"):
        trained.get_latent_representation(indices=indices)


@pytest.mark.filterwarnings("ignore:2 cells without counts")
def test_likelihood__of_cells_without_counts_alone_is_refused(trained):
    empty = trained.adata.copy()
    empty.X[:2] = 0
    for verb in (trained.get_marginal_ll, trained.get_elbo, trained.get_reconstruction_error):
        with pytest.raises(InputError, match="none of the 2 cells has counts"):
            verb(empty, indices=[0, 1])


def test_verbs__say_what_to_type_instead(trained):
    with pytest.raises(InputError, match="train has no argument 'plan_kwargs': use learning_rate="):
        trained.train(plan_kwargs={"lr": 1e-3})
    with pytest.raises(InputError, match="SpatialVAE has no argument 'n_layers': each network has one"):
        SpatialVAE(trained.adata, n_layers=2)
    with pytest.raises(InputError, match="setup_anndata has no argument 'size_factor_key'"):
        SpatialVAE.setup_anndata(table(), size_factor_key="size")
    with pytest.raises(InputError, match="no column 'nope' in obs"):
        SpatialVAE.setup_anndata(table(), labels_key="nope")
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        trained.to_device("abacus")
    with pytest.raises(InputError, match="device 'meta' cannot be used"):
        trained.to_device("meta")
    for size in (-1, np.nan, "mean", np.ones(80)):
        with pytest.raises(InputError, match="expected a positive number or 'latent'"):
            trained.get_normalized_expression(library_size=size)
    for count in (0, 2.5, "3", True):
        with pytest.raises(InputError, match=f"n_samples is {count!r}; expected a whole number of at least 1"):
            trained.posterior_predictive_sample(n_samples=count)
        with pytest.raises(InputError, match=f"n_cells is {count!r}; expected a whole number of at least 1"):
            trained.sample_prior(count)


def test_load__finds_the_table_that_was_saved(trained, tmp_path):
    trained.save(tmp_path / "with", save_anndata=True)
    again = SpatialVAE.load(tmp_path / "with")
    np.testing.assert_array_equal(again.get_latent_representation(), trained.get_latent_representation())
    trained.save(tmp_path / "without")
    with pytest.raises(InputError, match=r"has no adata\.h5ad: pass the table"):
        SpatialVAE.load(tmp_path / "without")
    with pytest.raises(InputError, match=r"already contains (adata\.h5ad|model\.json)"):
        trained.save(tmp_path / "with", save_anndata=True)


def test_command_sample__writes_counts(trained, monkeypatch, capsys, tmp_path):
    trained.save(tmp_path / "model")
    adata = table()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    adata[:30].write_h5ad(tmp_path / "known.h5ad")

    def run(*arguments):
        given = ["sample", tmp_path / "cells.h5ad", "--model", tmp_path / "model", "--out", tmp_path / "made.h5ad"]
        return call_spatialvae(monkeypatch, *given, *arguments)

    assert run("--samples", "3") == 0
    made = anndata.read_h5ad(tmp_path / "made.h5ad")
    assert set(made.layers) == {"sample_1", "sample_2"}
    assert list(made.obs_names) == list(adata.obs_names)
    for what in ("tissue", "posterior"):
        assert run("--what", what, "--given", str(tmp_path / "known.h5ad")) == 0
        made = anndata.read_h5ad(tmp_path / "made.h5ad")
        np.testing.assert_array_equal(made.obsm["spatial"], adata.obsm["spatial"])
        assert list(made.obs["section"]) == list(adata.obs["section"])
    assert run("--what", "prior", "--cells", "model") == 0
    assert anndata.read_h5ad(tmp_path / "made.h5ad").shape == (80, 6)
    capsys.readouterr()
    assert run("--what", "nothing") == 2
    assert "expected posterior, tissue or prior" in capsys.readouterr().err


def test_command_evaluate__checks_a_model(trained, monkeypatch, capsys, tmp_path):
    trained.save(tmp_path / "model")
    table().write_h5ad(tmp_path / "cells.h5ad")
    where = ["--model", tmp_path / "model", "--out", tmp_path / "out", "--samples", 5]
    assert call_spatialvae(monkeypatch, "evaluate", tmp_path / "cells.h5ad", *where) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 <= figures["auc_cell"] <= 1
    assert figures["marginal_log_likelihood_monte_carlo_error"] > 0
    assert set(pd.read_csv(tmp_path / "out" / "checks.csv")["statistic"]) >= {"mean", "zeros", "genes", "neighbours"}
    assert (tmp_path / "out" / "checks.png").is_file()
