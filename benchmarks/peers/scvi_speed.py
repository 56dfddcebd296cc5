"""Seconds of scVI's run, one hidden layer of 128, NB, with the creation of the model: TABLE [BATCH EPOCHS]; without
BATCH and EPOCHS those of its defaults, with early stopping."""

import json
import sys
import time

import anndata
import scvi
import torch

table, *sizes = sys.argv[1:]
how = dict(zip(("batch_size", "max_epochs"), map(int, sizes), strict=True), train_size=1.0) if sizes else {}
torch.set_num_threads(2)
adata = anndata.read_h5ad(table)
start = time.perf_counter()
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata, n_hidden=128, n_layers=1, gene_likelihood="nb")
model.train(**how, early_stopping=not sizes, accelerator="cpu", enable_progress_bar=False)
print(json.dumps(time.perf_counter() - start))
