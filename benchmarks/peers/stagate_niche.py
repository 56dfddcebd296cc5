"""STAGATE (its PyTorch version), defaults, on the 6 nearest neighbours of log-normalised counts: TABLE OUT SEED."""

import sys

import anndata
import numpy as np
import scipy.sparse as sp
from STAGATE_pyG import Cal_Spatial_Net, train_STAGATE

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
adata = anndata.read_h5ad(table)
x = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, float)
adata.X = sp.csr_matrix(np.log1p(x / x.sum(1, keepdims=True) * 1e4))
Cal_Spatial_Net(adata, k_cutoff=6, model="KNN", verbose=False)
train_STAGATE(adata, random_seed=seed, verbose=False)
np.save(out, adata.obsm["STAGATE"])
