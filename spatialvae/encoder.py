"""Approximate posteriors of the two latents. Both start as linear functions of the data and learn to depart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae._product import Linear

ATTENTION_WIDTH = 32
ATTENTION_HEADS = 4
STEP = 0.1  # of the niche, in posterior standard deviations: the less, the dearer the field is to leave


def log_normalised(x: Tensor, factor: Tensor) -> Tensor:
    """log(1 + factor x) of counts (cell, gene), which need no gradient; ``factor`` (cell,)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.log1p(x * factor[:, None])
    from spatialvae import _kernels

    y = torch.empty_like(x)
    _kernels.log_normalised(x.numpy(), factor.numpy(), y.numpy())
    return y


class CellEncoder(nn.Module):
    """q(z_cell | x): log-normalised counts (cell, gene) to mean and log variance (cell, dim).

    mean = W y + b + MLP(y), the linear map given (principal components) and the MLP's last layer zero at the start.
    """

    def __init__(self, weight: Tensor, bias: Tensor, log_variance: Tensor, hidden: int) -> None:
        super().__init__()
        n_latent, n_genes = weight.shape
        self.n_latent = n_latent
        self.first = Linear(n_genes, n_latent + hidden)  # W beside the MLP's first layer: one matrix product
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 2 * n_latent)
        with torch.no_grad():
            self.first.weight[:n_latent] = weight
            self.first.bias[:n_latent] = bias
            self.out.weight.zero_()
            self.out.bias.copy_(torch.cat([torch.zeros(n_latent), log_variance]))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, hidden = self.first(y).split([self.n_latent, len(self.norm.weight)], -1)
        shift, log_variance = self.out(F.relu(self.norm(hidden))).chunk(2, -1)
        return mean + shift, log_variance


class _Attention(torch.autograd.Function):
    """``_attend`` in one pass over nodes and neighbours; float32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, edge: Tensor, score: Tensor, *graph: Tensor) -> Tensor:
        from spatialvae import _kernels

        slots, distance = graph
        weight, out = value.new_empty(*slots.shape, len(score)), value.new_empty(len(slots), value.shape[1])
        given = value, edge, score, slots, distance, weight
        _kernels.attention(*(t.detach().numpy() for t in (*given, out)))
        ctx.save_for_backward(*given)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from spatialvae import _kernels

        found = [torch.zeros_like(t) for t in ctx.saved_tensors[:3]]
        arrays = (t.detach().numpy() for t in (*ctx.saved_tensors, gradient.contiguous(), *found))
        _kernels.attention_backward(*arrays)
        return (*found, None, None)


def _attend(value: Tensor, edge: Tensor, score: Tensor, slots: Tensor, distance: Tensor) -> Tensor:
    neighbour = F.embedding(slots.clamp(min=0), value)  # (B, K, H)
    mixed = F.leaky_relu(neighbour + edge * distance[..., None], 0.2)
    split = (*mixed.shape[:2], *score.shape)
    scores = (mixed.view(split) * score).sum(-1)  # (B, K, heads)
    scores = scores.masked_fill((slots < 0)[..., None], -torch.inf)
    weight = torch.softmax(scores, 1).nan_to_num(0.0)
    return (weight[..., None] * neighbour.view(split)).sum(1).flatten(1)


class NeighbourAttention(nn.Module):
    r"""GATv2 attention (Brody, Alon & Yahav 2022) over a list of neighbours, distances as edge features.

    v_j = W h_j + b,  e_ij = a . LeakyReLU(v_j + W_edge d_ij),  out_i = sum_j softmax_j(e_ij) v_j

    for each head. The cell that looks has no say in whom it sees: its own counts would come back through its choice
    of neighbours. Cells without neighbours get zeros.
    """

    def __init__(self, n_features: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.value = nn.Linear(n_features, hidden)
        self.edge = nn.Parameter(torch.empty(hidden).uniform_(-1, 1))
        self.score = nn.Parameter(torch.randn(heads, hidden // heads) / (hidden // heads) ** 0.5)

    def forward(self, features: Tensor, slots: Tensor, distance: Tensor) -> Tensor:
        """features (M, F) of the cells that take part; slots int32 (B, K) point into them, -1 where there is none;
        distance (B, K) -> (B, hidden). A cell that is neighbour to many is projected once."""
        given = self.value(features), self.edge, self.score, slots, distance
        if features.device.type == "cpu" and features.dtype == torch.float32:
            return _Attention.apply(*given)
        return _attend(*given)


class NicheEncoder(nn.Module):
    """q(z_niche | own and neighbours' counts): mean and log variance (cell, dim).

    mean = u + STEP sd Linear(attention), where u is the field's posterior mean (many rings wide, exact for the linear
    model), sd the posterior's in the linear model, and the linear layer is zero at the start. The prior of parameters
    (``training.Plan``) keeps the linear layer small, so that only many cells move a niche far from its field. Attention
    goes over the principal components and the u of neighbours; of the cell itself only u adds to the mean, for a niche
    that may look at the cell's own counts once more becomes a copy of the cell.
    """

    log_variance: Tensor

    def __init__(self, n_features: int, log_variance: Tensor, hidden: int) -> None:
        super().__init__()
        n_niche = len(log_variance)
        self.attention = NeighbourAttention(n_features, ATTENTION_WIDTH, ATTENTION_HEADS)
        self.mix = nn.Linear(ATTENTION_WIDTH, hidden, bias=False)
        self.own = nn.Linear(n_niche, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 2 * n_niche)
        self.register_buffer("log_variance", log_variance)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, smooth: Tensor, features: Tensor, slots: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """smooth (B, dim), the rest as in ``NeighbourAttention``."""
        seen = self.mix(self.attention(features, slots, distance)) + self.own(smooth)
        shift, log_ratio = self.out(F.relu(self.norm(seen))).chunk(2, -1)
        return smooth + STEP * shift * (0.5 * self.log_variance).exp(), self.log_variance + log_ratio
