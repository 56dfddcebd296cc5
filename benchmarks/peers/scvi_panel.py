"""scVI's latent space (cell, 10) of the genes that var["panel_SEED"] marks, trained without obs["held_out"]: TABLE OUT
SEED. NB, its defaults with early stopping.
"""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
adata = adata[:, adata.var[f"panel_{seed}"].to_numpy(bool)].copy()
train = adata[~adata.obs["held_out"].to_numpy(bool)].copy()
scvi.model.SCVI.setup_anndata(train)
model = scvi.model.SCVI(train, n_latent=10, gene_likelihood="nb")
model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False)
np.save(out, model.get_latent_representation(adata))
