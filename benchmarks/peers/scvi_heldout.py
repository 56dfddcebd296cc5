"""scVI (NB, 10 dimensions) trained without obs["held_out"]: log p(x) of each cell held out, in order: TABLE OUT SEED.

1,000 importance samples, the observed total count as library size, as in its defaults.
"""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
held = adata.obs["held_out"].to_numpy(bool)
train = adata[~held].copy()
scvi.model.SCVI.setup_anndata(train)
model = scvi.model.SCVI(train, n_latent=10, gene_likelihood="nb")
model.train(accelerator="cpu", enable_progress_bar=False)
# return_mean=True would average the means of minibatches, the short last one with the weight of a full one
each = model.get_marginal_ll(adata[held].copy(), n_mc_samples=1000, n_mc_samples_per_pass=20, return_mean=False)
np.save(out, each.numpy())
