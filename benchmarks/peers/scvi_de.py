"""Genes that scVI calls at an FDR of 5 %, bool (comparison, gene), with its defaults and NB: TABLE OUT SEED.

Comparison i is between the cells that obs["one_i"] and those that obs["two_i"] marks.
"""

import sys

import anndata
import numpy as np
import scvi

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata, gene_likelihood="nb")
model.train(accelerator="cpu", enable_progress_bar=False)
called = []
for i in range(sum(name.startswith("one_") for name in adata.obs)):
    one, two = (np.flatnonzero(adata.obs[f"{side}_{i}"].to_numpy(bool)) for side in ("one", "two"))
    found = model.differential_expression(
        idx1=one, idx2=two, mode="change", delta=0.25, fdr_target=0.05, all_stats=False, silent=True
    )
    called.append(found.loc[adata.var_names, "is_de_fdr_0.05"].to_numpy(bool))
np.save(out, np.stack(called))
