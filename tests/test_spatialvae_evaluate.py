from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from command import call_spatialvae
from spatialvae import InputError, SpatialVAE, comparison, evidence, neighbours
from spatialvae.mixture import Mixture


def linear_gaussian(cells=40, genes=12, dim=8, seed=0):
    """x = W z + noise of variance 0.5, z ~ N(centre, diag variance): posterior and log p(x) in closed form."""
    rng = np.random.default_rng(seed)
    weight, centre = rng.normal(size=(genes, dim)), rng.normal(size=(cells, dim))
    variance = rng.uniform(0.3, 2, (cells, dim))
    z = centre + np.sqrt(variance) * rng.normal(size=(cells, dim))
    x = z @ weight.T + np.sqrt(0.5) * rng.normal(size=(cells, genes))
    exact = np.empty(cells)
    precision, mode = np.empty((cells, dim, dim)), np.empty((cells, dim))
    for i in range(cells):
        covariance = weight @ np.diag(variance[i]) @ weight.T + 0.5 * np.eye(genes)
        off = x[i] - weight @ centre[i]
        exact[i] = -0.5 * (
            off @ np.linalg.solve(covariance, off) + np.linalg.slogdet(covariance)[1] + genes * np.log(2 * np.pi)
        )
        precision[i] = weight.T @ weight / 0.5 + np.diag(1 / variance[i])
        mode[i] = np.linalg.solve(precision[i], weight.T @ x[i] / 0.5 + centre[i] / variance[i])
    return weight, x, centre, variance, mode, precision, exact


def estimate(mode, samples, seed=0):
    weight, x, centre, variance, best, precision, exact = linear_gaussian()
    as_tensor = [torch.from_numpy(a).float() for a in (weight, x, centre, variance, precision)]
    w, x_, c, v, p = as_tensor

    def likelihood(z):
        return torch.distributions.Normal(z @ w.T, 0.5**0.5).log_prob(x_).sum(-1)

    start = torch.from_numpy(best if mode is None else mode(best)).float()
    prior, generator = Mixture.gaussian(c, v), torch.Generator().manual_seed(seed)
    value, error = evidence.log_mean_weight(likelihood, prior, start, p, samples, generator)
    return value.numpy(), error.numpy(), exact


def test_evidence__is_exact_on_a_linear_gaussian_model():
    value, error, exact = estimate(None, 5000)
    mean, error_of_mean = evidence.mean_with_error(value, error)
    assert abs(mean - exact.mean()) < 0.01
    assert abs(mean - exact.mean()) < 3 * error_of_mean
    assert np.abs(value - exact).max() < 0.1


def test_evidence__stated_error_is_that_of_repeated_estimates():
    off = np.random.default_rng(3).normal(0, 0.1, linear_gaussian()[4].shape)
    found = [estimate(lambda best: best + off, 500, seed) for seed in range(12)]
    z = np.concatenate([(value - exact) / error for value, error, exact in found])
    assert 0.85 < z.std() < 1.2
    assert abs(z.mean()) < 0.25


def table(n=150, genes=8, seed=0):
    """Cells of one type in each half of the plane, with strongly overdispersed counts."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    rate = np.where((xy[:, :1] > 50) == (np.arange(genes) % 2), 12.0, 3.0)
    return anndata.AnnData(
        rng.poisson(rate * rng.gamma(1.5, 1 / 1.5, rate.shape)).astype(np.float32),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
        obsm={"spatial": xy},
    )


def test_compare__prefers_the_likelihood_and_the_neighbours_that_made_the_table():
    adata = table()
    SpatialVAE.setup_anndata(adata)
    found = comparison.compare(adata, ["nb", "poisson"], [3], held_out=0.2, samples=20, max_epochs=20)
    assert len(found) == 4
    best = found.iloc[0]
    assert (best["gene_likelihood"], best["neighbours"], best["difference"]) == ("nb", True, 0)
    poisson = found[(found["gene_likelihood"] == "poisson") & found["neighbours"]].iloc[0]
    assert poisson["difference"] < -3 * poisson["difference_error"]
    figure = comparison.evidence_plot(found)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "nb, 3 dimensions"
    with pytest.raises(InputError, match="3 of 150 cells; expected at least 10"):
        comparison.compare(adata, ["nb"], [3], held_out=0.02)


@pytest.mark.parametrize(
    ("likelihoods", "latents", "message"),
    [(["nb", "gauss"], [3], "'gauss'"), (["nb"], [3, 0], "n_latent is 0"), ([], [3], "there is no model to compare")],
)
def test_compare__refuses_before_the_first_model_is_trained(likelihoods, latents, message):
    adata = table()
    SpatialVAE.setup_anndata(adata)
    with pytest.raises(InputError, match=message):
        comparison.compare(adata, likelihoods, latents, report=pytest.fail)


def test_command__writes_the_comparison(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(neighbours, "MOST_STEPS", 10)
    adata = table(100)
    adata.X = sp.csr_matrix(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def run(*arguments):
        return call_spatialvae(monkeypatch, "evaluate", tmp_path / "cells.h5ad", *arguments)

    asked = ["--likelihood", " poisson", "--latent", "2,3", "--samples", "5", "--max-epochs", "2"]
    assert run(*asked, "--out", str(tmp_path / "out")) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"evidence.csv", "evidence.png"}
    assert sorted(pd.read_csv(tmp_path / "out" / "evidence.csv")["n_latent"]) == [2, 2, 3, 3]
    capsys.readouterr()
    assert run(*asked) == 2
    assert "give --model DIR" in capsys.readouterr().err
    assert run("--latent", "ten", "--out", str(tmp_path / "out")) == 2
