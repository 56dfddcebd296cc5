"""From latents to the expected share of each gene in a cell's counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae._product import Linear


class Decoder(nn.Module):
    """logits of shares = b + W (z_cell, s) + MLP(z_cell, s); s, the batch, is one-hot.

    W starts as the ``loadings`` (gene, dim) given for z_cell and as ``batch_logits`` (gene, batch) for s, b as the log
    of mean shares, the MLP's last layer as zero. With ``zero_inflation`` a second head gives the logit of an
    additional zero.
    """

    def __init__(
        self, loadings: Tensor, batch_logits: Tensor, log_share: Tensor, hidden: int, zero_inflation: bool
    ) -> None:
        super().__init__()
        n_genes, n_cell = loadings.shape
        n_batch = batch_logits.shape[1]
        self.n_batch = n_batch if n_batch > 1 else 0
        n_inputs = n_cell + self.n_batch
        self.hidden = nn.Linear(n_inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = Linear(n_inputs + hidden, n_genes)  # W beside the MLP's last layer: one matrix product
        self.zero = nn.Linear(hidden, n_genes) if zero_inflation else None
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.weight[:, :n_cell] = loadings
            if self.n_batch:
                self.out.weight[:, n_cell:n_inputs] = batch_logits
            self.out.bias.copy_(log_share)

    def forward(self, z_cell: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """z_cell (..., dim), batch int64 (...,) -> logits (..., gene), those of zeros or None."""
        inputs = z_cell
        if self.n_batch:
            inputs = torch.cat([z_cell, F.one_hot(batch, self.n_batch).to(z_cell.dtype)], -1)
        features = F.relu(self.norm(self.hidden(inputs)))
        logits = self.out(torch.cat([inputs, features], -1))
        return logits, self.zero(features) if self.zero is not None else None

    def slopes(self, z_cell: Tensor, batch: Tensor) -> Tensor:
        """Derivatives of logits by z_cell, (cell, gene, dim); inputs (cell, dim) and (cell,)."""
        inputs, dim = z_cell, z_cell.shape[1]
        if self.n_batch:
            inputs = torch.cat([z_cell, F.one_hot(batch, self.n_batch).to(z_cell.dtype)], -1)
        hidden = self.hidden(inputs)
        sd = (hidden.var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        normal = (hidden - hidden.mean(-1, keepdim=True)) / sd
        step = self.hidden.weight[:, :dim]
        step = step - step.mean(0) - normal[..., None] * (normal @ step / normal.shape[-1])[:, None]
        kept = (normal * self.norm.weight + self.norm.bias > 0) * self.norm.weight / sd
        return self.out.weight[:, :dim] + self.out.weight[:, inputs.shape[1] :] @ (kept[..., None] * step)
