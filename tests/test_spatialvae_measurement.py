from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from spatialvae import InputError, SpatialVAE, posterior
from spatialvae.measurement import Measurement


def measured_tissue(n=800, genes=40, seed=0):
    """Four cell types in two domains. Of the molecules, in layers["there"], 30 to 90 % are called; there are wrong
    calls, in proportion to the calls of a cell and unevenly distributed over genes."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    kind = 2 * (xy[:, 0] > 50) + (rng.random(n) < 0.5)
    rate = rng.gamma(0.5, 1, (4, genes)) + 0.02
    there = rng.gamma(6, 20, n)[:, None] * (rate / rate.sum(1, keepdims=True))[kind] * rng.gamma(10, 0.1, (n, genes))
    efficiency = rng.uniform(0.3, 0.9, genes)
    right = rng.poisson(there * efficiency)
    wrong_share = rng.dirichlet(np.full(genes, 0.5)) * 0.2
    wrong = rng.poisson((there * efficiency).sum(1, keepdims=True) * wrong_share / (1 - 0.2))
    calls = right + wrong
    table = anndata.AnnData(
        calls.astype(np.float32),
        pd.DataFrame({"kind": kind}, [f"c{i}" for i in range(n)]),
        pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
        obsm={"spatial": xy},
    )
    table.layers["there"] = there
    table.var["detection_efficiency"] = efficiency
    table.var["misidentification_rate"] = wrong.sum(0) / np.maximum(calls.sum(0), 1)
    return table


@pytest.fixture(scope="module")
def trained():
    table = measured_tissue()
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, measurement=True)
    model.train(max_steps=1200, progress=False)
    return table, model


def test_seen__follows_the_equation():
    rho, measurement = np.array([0.5, 0.3, 0.2]), Measurement(np.float32([0.4, 0.8, 0.5]), np.float32([0.1, 0, 0.05]))
    found = measurement.seen(torch.from_numpy(rho).log().float()).exp().numpy()
    detected = rho * [0.4, 0.8, 0.5]
    np.testing.assert_allclose(found, 0.85 * detected / detected.sum() + [0.1, 0, 0.05], rtol=1e-5)
    np.testing.assert_allclose(measurement.share_there(found), rho, rtol=1e-4)
    assert measurement.there(rho[None], np.array([100.0])) == pytest.approx(85 / detected.sum(), rel=1e-5)


def test_slopes__are_the_derivatives_of_what_is_seen(trained):
    _, model = trained
    module, section, rows = model.module, model._section, np.arange(3)
    z = torch.randn(3, module.shape.n_cell, generator=torch.Generator().manual_seed(0))
    found, _ = module.slopes(section, rows, z)
    for i in range(3):
        exact = torch.autograd.functional.jacobian(
            lambda v, i=i: module.logits(section, rows[i : i + 1], v[None])[0][0], z[i]
        )
        torch.testing.assert_close(found[i], exact, rtol=1e-3, atol=1e-4)


def error(estimate, truth):
    """Root mean squared error over cells and genes, of square roots, which stabilise the variance of counts."""
    return np.sqrt(np.mean((np.sqrt(estimate) - np.sqrt(truth)) ** 2))


def test_expression__is_nearer_to_what_was_there_than_without(trained):
    table, model = trained
    truth = table.layers["there"]
    found = error(model.get_normalized_expression(library_size="latent", return_numpy=True), truth)
    plain = SpatialVAE(table)
    plain.train(max_steps=1200, progress=False)
    called = plain.get_normalized_expression(library_size="latent", return_numpy=True)
    efficiency = table.var["detection_efficiency"].to_numpy()
    assert found < 0.8 * error(called, truth)
    assert found < 0.9 * error(called / efficiency, truth)
    assert found < 0.8 * error(table.X / efficiency, truth)


def test_measurement__is_saved_and_needs_its_columns(trained, tmp_path):
    table, model = trained
    model.save(tmp_path)
    again = SpatialVAE.load(tmp_path, table)
    np.testing.assert_array_equal(again.get_normalized_expression(), model.get_normalized_expression())
    mean = posterior.posterior(model.module, model._section, model.module.sites(model._section))[1][0]
    assert torch.isfinite(mean).all()
    bare = table.copy()
    del bare.var["detection_efficiency"]
    with pytest.raises(InputError, match="no column 'detection_efficiency' in var, which measurement=True needs"):
        model.get_normalized_expression(bare)
    bare.var["detection_efficiency"] = 1.2
    with pytest.raises(InputError, match=r"'g0' is 1\.2; expected a share"):
        model.get_normalized_expression(bare)


def test_measurement__knows_nothing_of_genes_never_called(trained):
    table, _ = trained
    table = table[:60].copy()
    table.X[:, 3] = 0
    table.var.loc["g3", ["detection_efficiency", "misidentification_rate"]] = np.nan
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, measurement=True)
    model.train(2, progress=False)
    assert np.isfinite(model.get_normalized_expression(library_size="latent")).all(axis=None)
