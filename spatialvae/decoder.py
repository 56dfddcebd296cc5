"""From latents to the expected share of each gene in a cell's counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae._product import Linear


class Decoder(nn.Module):
    """logits of shares = b + W (z_cell, z_niche, s) + MLP(z_cell, z_niche, s); s, the batch, is one-hot.

    W starts as the loadings given for z_cell and as zero for the rest, b as the log of mean shares, the MLP's last
    layer as zero. With ``zero_inflation`` a second head gives the logit of an additional zero.
    """

    def __init__(
        self, loadings: Tensor, log_share: Tensor, n_niche: int, n_batch: int, hidden: int, zero_inflation: bool
    ) -> None:
        super().__init__()
        n_genes, n_cell = loadings.shape
        self.n_batch = n_batch if n_batch > 1 else 0
        n_inputs = n_cell + n_niche + self.n_batch
        self.hidden = nn.Linear(n_inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = Linear(n_inputs + hidden, n_genes)  # W beside the MLP's last layer: one matrix product
        self.zero = nn.Linear(hidden, n_genes) if zero_inflation else None
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.weight[:, :n_cell] = loadings
            self.out.bias.copy_(log_share)

    def forward(self, z_cell: Tensor, z_niche: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """z_cell (..., dim), z_niche (..., dim), batch int64 (...,) -> logits (..., gene), those of zeros or None."""
        inputs = [z_cell, z_niche]
        if self.n_batch:
            inputs.append(F.one_hot(batch, self.n_batch).to(z_cell.dtype))
        features = F.relu(self.norm(self.hidden(torch.cat(inputs, -1))))
        logits = self.out(torch.cat([*inputs, features], -1))
        return logits, self.zero(features) if self.zero is not None else None
