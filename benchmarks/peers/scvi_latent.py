"""scVI's latent space, defaults: TABLE OUT SEED."""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata)
model.train(accelerator="cpu", enable_progress_bar=False)
np.save(out, model.get_latent_representation())
