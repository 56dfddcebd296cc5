"""scVIVA, defaults; cell types are 20 k-means clusters of scVI's latent space: TABLE OUT SEED."""

import sys

import anndata
import numpy as np
import scvi
from scvi.external import SCVIVA
from sklearn.cluster import KMeans

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata)
model.train(accelerator="cpu", enable_progress_bar=False)
adata.obsm["X_scVI"] = model.get_latent_representation()
adata.obs["type"] = KMeans(20, n_init=3, random_state=seed).fit_predict(adata.obsm["X_scVI"]).astype(str)
adata.obs["sample"] = "one"
SCVIVA.preprocessing_anndata(adata, k_nn=20, sample_key="sample", labels_key="type", expression_embedding_key="X_scVI")
SCVIVA.setup_anndata(adata, sample_key="sample", labels_key="type", expression_embedding_key="X_scVI")
niche = SCVIVA(adata)
niche.train(accelerator="cpu", enable_progress_bar=False)
np.save(out, niche.get_latent_representation())
