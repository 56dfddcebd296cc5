"""CellCharter as its authors run it: scVI latents, Delaunay graph without long links, 3 layers: TABLE OUT SEED."""

import sys

import anndata
import cellcharter as cc
import numpy as np
import scvi
import squidpy as sq

table, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
scvi.settings.seed = seed
adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata)
model.train(accelerator="cpu", enable_progress_bar=False)
adata.obsm["X_scVI"] = model.get_latent_representation().astype(np.float32)
sq.gr.spatial_neighbors(adata, coord_type="generic", delaunay=True)
cc.gr.remove_long_links(adata)
cc.gr.aggregate_neighbors(adata, n_layers=3, use_rep="X_scVI", out_key="X_cellcharter")
np.save(out, np.asarray(adata.obsm["X_cellcharter"]))
