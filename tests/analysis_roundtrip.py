"""The usual analyses of scanpy, squidpy and scvi-tools on the table of a run.

`.ci/exchange` runs them, the last one only where scvi-tools is installed.
"""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scanpy
import squidpy
from sklearn.cluster import KMeans

from merfish import results


@pytest.fixture
def genes(done):
    """The genes of a run's table, without its blanks, and the counts once more as a layer."""
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    scanpy.pp.calculate_qc_metrics(table, percent_top=None, qc_vars=["is_blank"], inplace=True)
    np.testing.assert_array_equal(table.obs["total_counts"], table.obs["n_transcripts"])
    assert table.obs["total_counts_is_blank"].sum() == table[:, table.var["is_blank"]].X.sum()
    genes = table[table.obs["total_counts"] > 0, ~table.var["is_blank"]].copy()
    genes.layers["counts"] = genes.X.copy()
    return genes


def test_scanpy_and_squidpy_cluster_cells_and_find_their_neighbours(genes):
    scanpy.pp.normalize_total(genes)
    scanpy.pp.log1p(genes)
    scanpy.pp.pca(genes, n_comps=10)
    scanpy.pp.neighbors(genes, n_neighbors=10)
    assert genes.obsp["connectivities"].shape == (genes.n_obs, genes.n_obs)
    genes.obs["cluster"] = KMeans(3, random_state=0).fit_predict(genes.obsm["X_pca"]).astype(str)
    genes.obs["cluster"] = genes.obs["cluster"].astype("category")
    squidpy.gr.spatial_neighbors(genes, coord_type="generic", n_neighs=6)
    assert (genes.obsp["spatial_connectivities"].sum(axis=1) == 6).all()
    squidpy.gr.nhood_enrichment(genes, cluster_key="cluster", n_perms=50, seed=0, show_progress_bar=False)
    found = genes.uns["cluster_nhood_enrichment"]
    assert found["zscore"].shape == (3, 3)
    assert found["count"].sum() == 6 * genes.n_obs
    squidpy.gr.spatial_autocorr(genes, mode="moran", n_perms=None)
    moran = genes.uns["moranI"].loc[genes.var_names]
    # the same by its definition: mean product of a cell and its neighbours over the variance
    values = genes.X.toarray() - genes.X.toarray().mean(axis=0)
    near = genes.obsp["spatial_connectivities"].toarray() / 6
    expected = (values * (near @ values)).sum(axis=0) / (values**2).sum(axis=0)
    np.testing.assert_allclose(moran["I"], expected, rtol=1e-3)


def test_scvi_trains_on_the_counts(genes):
    scvi = pytest.importorskip("scvi")
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(genes, layer="counts")
    model = scvi.model.SCVI(genes, n_latent=5)
    model.train(max_epochs=20, accelerator="cpu", enable_progress_bar=False, logger=False)
    latent = model.get_latent_representation()
    assert latent.shape == (genes.n_obs, 5)
    assert np.isfinite(latent).all()
    losses = model.history["train_loss_epoch"]["train_loss_epoch"].astype(float)
    assert losses.iloc[-1] < losses.iloc[0]
