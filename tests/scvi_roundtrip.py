"""scvi-tools trains on the table of a run; run by `.ci/scvi`."""

from __future__ import annotations

import anndata
import numpy as np
import scvi

from merfish import results


def test_scvi_trains_on_the_counts(done):
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    genes = table[table.obs["n_transcripts"] > 0, ~table.var["is_blank"]].copy()
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(genes)
    model = scvi.model.SCVI(genes, n_latent=5)
    model.train(max_epochs=20, accelerator="cpu", enable_progress_bar=False)
    latent = model.get_latent_representation()
    assert latent.shape == (genes.n_obs, 5)
    assert np.isfinite(latent).all()
    losses = model.history["elbo_train"].to_numpy(float).ravel()  # negative ELBO
    assert losses[-1] < losses[0]
