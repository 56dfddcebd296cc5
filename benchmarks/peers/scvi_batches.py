"""scVI's latent space (cell, 10), defaults, with obs["batch"] as its batch_key: TABLE OUT SEED."""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
model = scvi.model.SCVI(adata)
model.train(accelerator="cpu", enable_progress_bar=False)
np.save(out, model.get_latent_representation())
