"""Seconds of scVI's run, one hidden layer of 128, NB, with the creation of the model: TABLE BATCH EPOCHS."""

import json
import sys
import time

import anndata
import scvi
import torch

table, batch, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
adata = anndata.read_h5ad(table)
start = time.perf_counter()
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata, n_hidden=128, n_layers=1, gene_likelihood="nb")
model.train(max_epochs=epochs, batch_size=batch, train_size=1.0, accelerator="cpu", enable_progress_bar=False)
print(json.dumps(time.perf_counter() - start))
