"""BANKSY with the settings of its authors for domains (lambda 0.8, 15 neighbours, azimuthal filter): TABLE OUT SEED."""

import sys

import anndata
import numpy as np
from banksy.embed_banksy import generate_banksy_matrix
from banksy.initialize_banksy import initialize_banksy
from scipy.stats import zscore
from sklearn.decomposition import PCA

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
adata = anndata.read_h5ad(table)
x = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, float)
depth = x.sum(1, keepdims=True)
adata.X = np.nan_to_num(zscore(x / depth * np.median(depth), axis=0))  # normalised and scaled, not logged
adata.obs["x"], adata.obs["y"] = adata.obsm["spatial"].T[:2]
quiet = {"plt_edge_hist": False, "plt_nbr_weights": False, "plt_theta": False}
graphs = initialize_banksy(adata, ("x", "y", "spatial"), 15, nbr_weight_decay="scaled_gaussian", max_m=1, **quiet)
_, matrix = generate_banksy_matrix(adata, graphs, [0.8], max_m=1, verbose=False)
features = np.nan_to_num(np.asarray(matrix.X))
np.save(out, PCA(20, random_state=seed).fit_transform(features))
