"""Standard analyses of scanpy and squidpy on the table of a run; run by `.ci/exchange`."""

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
    """Return the genes of a run's table, without its blanks."""
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    scanpy.pp.calculate_qc_metrics(table, percent_top=None, qc_vars=["is_blank"], inplace=True)
    np.testing.assert_array_equal(table.obs["total_counts"], table.obs["n_transcripts"])
    assert table.obs["total_counts_is_blank"].sum() == table[:, table.var["is_blank"]].X.sum()
    return table[table.obs["total_counts"] > 0, ~table.var["is_blank"]].copy()


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
    # the same by its definition: mean product of a cell and its neighbours, divided by the variance
    values = genes.X.toarray() - genes.X.toarray().mean(axis=0)
    near = genes.obsp["spatial_connectivities"].toarray() / 6
    expected = (values * (near @ values)).sum(axis=0) / (values**2).sum(axis=0)
    np.testing.assert_allclose(moran["I"], expected, rtol=1e-3)
