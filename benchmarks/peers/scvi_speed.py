"""Seconds of each of scVI's training epochs, one hidden layer of 128, NB: TABLE BATCH EPOCHS."""

import json
import sys
import time

import anndata
import scvi
import torch
from lightning.pytorch.callbacks import Callback

table, batch, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)


class Clock(Callback):
    def __init__(self) -> None:
        self.at = []

    def on_train_epoch_start(self, *_) -> None:
        self.at.append(time.perf_counter())

    def on_train_epoch_end(self, *_) -> None:
        self.at[-1] = time.perf_counter() - self.at[-1]


adata = anndata.read_h5ad(table)
scvi.model.SCVI.setup_anndata(adata)
model = scvi.model.SCVI(adata, n_hidden=128, n_layers=1, gene_likelihood="nb")
clock = Clock()
model.train(
    max_epochs=epochs, batch_size=batch, train_size=1.0, accelerator="cpu", enable_progress_bar=False, callbacks=[clock]
)
print(json.dumps(clock.at))
