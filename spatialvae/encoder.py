"""Approximate posteriors of the two latents. Both start as linear functions of the data and learn to depart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION_WIDTH = 32
ATTENTION_HEADS = 4


class CellEncoder(nn.Module):
    """q(z_cell | x): log-normalised counts (cell, gene) to mean and log variance (cell, dim).

    mean = W y + b + MLP(y), the linear map given (principal components) and the MLP's last layer zero at the start.
    """

    def __init__(self, weight: Tensor, bias: Tensor, log_variance: Tensor, hidden: int) -> None:
        super().__init__()
        n_latent, n_genes = weight.shape
        self.linear = nn.Linear(n_genes, n_latent)
        self.hidden = nn.Linear(n_genes, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 2 * n_latent)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)
            self.out.weight.zero_()
            self.out.bias.copy_(torch.cat([torch.zeros(n_latent), log_variance]))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.linear.weight, self.hidden.weight])
        both = F.linear(y, weight, torch.cat([self.linear.bias, self.hidden.bias]))
        linear, hidden = both.split([self.linear.out_features, self.hidden.out_features], -1)
        shift, log_variance = self.out(F.relu(self.norm(hidden))).chunk(2, -1)
        return linear + shift, log_variance


class NeighbourAttention(nn.Module):
    r"""GATv2 attention (Brody, Alon & Yahav 2022) over a list of neighbours, distances as edge features.

    e_ij = a . LeakyReLU(W_own h_i + W_other h_j + W_edge d_ij),  out_i = sum_j softmax_j(e_ij) W_other h_j

    for each head. Cells without neighbours get zeros.
    """

    def __init__(self, n_features: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own = nn.Linear(n_features, hidden)
        self.other = nn.Linear(n_features, hidden, bias=False)
        self.edge = nn.Linear(1, hidden, bias=False)
        self.score = nn.Parameter(torch.randn(heads, hidden // heads) / (hidden // heads) ** 0.5)

    def forward(self, features: Tensor, own: Tensor, others: Tensor, distance: Tensor, present: Tensor) -> Tensor:
        """features (M, F) of the cells that take part; own (B,) and others (B, K) point into them; distance,
        present (B, K) -> (B, hidden). A cell that is neighbour to many is projected once."""
        value = F.embedding(others, self.other(features))  # (B, K, H)
        mixed = self.own(features[own])[:, None] + value + self.edge(distance[..., None])
        mixed = F.leaky_relu(mixed, 0.2)
        split = (*mixed.shape[:2], self.heads, -1)
        score = (mixed.view(split) * self.score).sum(-1)  # (B, K, heads)
        score = score.masked_fill(~present[..., None], -torch.inf)
        weight = torch.softmax(score, 1).nan_to_num(0.0)
        return (weight[..., None] * value.view(split)).sum(1).flatten(1)


class NicheEncoder(nn.Module):
    """q(z_niche | own and neighbours' counts): mean and log variance (cell, dim).

    mean = u + sd * Linear(attention), where u is the field's posterior mean (many rings wide, exact for the linear
    model), sd the posterior's in the linear model, and the linear layer is zero at the start. Features of a cell are
    its principal components and its u.
    """

    log_variance: Tensor

    def __init__(self, n_features: int, log_variance: Tensor, hidden: int) -> None:
        super().__init__()
        n_niche = len(log_variance)
        self.attention = NeighbourAttention(n_features, ATTENTION_WIDTH, ATTENTION_HEADS)
        self.mix = nn.Linear(ATTENTION_WIDTH, hidden, bias=False)
        self.own = nn.Linear(n_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 2 * n_niche)
        self.register_buffer("log_variance", log_variance)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, smooth: Tensor, features: Tensor, own: Tensor, others: Tensor, distance: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """smooth (B, dim), the rest as in ``NeighbourAttention``."""
        seen = self.mix(self.attention(features, own, others, distance, present)) + self.own(features[own])
        shift, log_ratio = self.out(F.relu(self.norm(seen))).chunk(2, -1)
        return smooth + shift * (0.5 * self.log_variance).exp(), self.log_variance + log_ratio
