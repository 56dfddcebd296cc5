"""scVI on cells held out, obs["held_out"]: TABLE OUT SEED LATENT.

Writes latents and the mean log likelihood of the held-out cells (1,000 importance samples).
"""

import sys

import anndata
import numpy as np
import scvi

table, out, seed, latent = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
held = adata.obs["held_out"].to_numpy(bool)
train = adata[~held].copy()
scvi.model.SCVI.setup_anndata(train)
model = scvi.model.SCVI(train, n_latent=latent, gene_likelihood="nb")
model.train(accelerator="cpu", enable_progress_bar=False)
found = {"latent": model.get_latent_representation(adata)}
each = model.get_marginal_ll(adata[held].copy(), n_mc_samples=1000, n_mc_samples_per_pass=20, return_mean=False)
found["marginal"] = np.float64(np.asarray(each).mean())  # return_mean=True averages minibatches, the short last one too
np.savez(out, **found)
