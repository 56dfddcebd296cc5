"""From latents to the expected share of each gene in a cell's counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """log share = log_softmax(b + W_cell z_cell + W_niche z_niche + W_batch s + MLP(z_cell, z_niche, s)).

    W_cell starts as the loadings given, b as the log of mean shares; W_niche, W_batch and the MLP's last layer as
    zero. With ``zero_inflation`` a second head gives the logit of an additional zero.
    """

    def __init__(
        self, loadings: Tensor, log_share: Tensor, n_niche: int, n_batch: int, hidden: int, zero_inflation: bool
    ) -> None:
        super().__init__()
        n_genes, n_cell = loadings.shape
        self.n_batch = n_batch
        self.cell = nn.Linear(n_cell, n_genes)
        self.niche = nn.Linear(n_niche, n_genes, bias=False) if n_niche else None
        self.batch = nn.Embedding(n_batch, n_genes)
        self.hidden = nn.Linear(n_cell + n_niche + n_batch, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, n_genes)
        self.zero = nn.Linear(hidden, n_genes) if zero_inflation else None
        with torch.no_grad():
            self.cell.weight.copy_(loadings)
            self.cell.bias.copy_(log_share)
            for zeroed in (self.niche, self.batch, self.out):
                if zeroed is not None:
                    zeroed.weight.zero_()
            self.out.bias.zero_()

    def forward(self, z_cell: Tensor, z_niche: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """z_cell (..., dim), z_niche (..., dim), batch int64 (...,) -> log shares (..., gene), logits or None."""
        one_hot = F.one_hot(batch, self.n_batch).to(z_cell.dtype)
        features = F.relu(self.norm(self.hidden(torch.cat([z_cell, z_niche, one_hot], -1))))
        inputs, weights = [z_cell, features], [self.cell.weight, self.out.weight]
        if self.niche is not None:
            inputs, weights = [*inputs, z_niche], [*weights, self.niche.weight]
        # one product of all parts is faster than a sum of theirs
        bias = self.cell.bias + self.out.bias
        if self.n_batch == 1:
            bias = bias + self.batch.weight[0]
        logits = F.linear(torch.cat(inputs, -1), torch.cat(weights, 1), bias)
        if self.n_batch > 1:
            logits = logits + self.batch(batch)
        zero = self.zero(features) if self.zero is not None else None
        return torch.log_softmax(logits, -1), zero
