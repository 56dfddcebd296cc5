"""scVI (NB, 10 dimensions) trained on layers["thinned"]: each gene's expected share (cell, gene): TABLE OUT SEED."""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata, layer="thinned")
model = scvi.model.SCVI(adata, n_latent=10, gene_likelihood="nb")
model.train(accelerator="cpu", enable_progress_bar=False)
np.save(out, model.get_normalized_expression(n_samples=25, return_numpy=True))  # the mean of 25 draws of z
