"""The encoder: a Gaussian approximation to the likelihood of z_cell, from the counts of the cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae._product import Linear

FIRST_PRECISION = 10.0  # precision of the likelihood of a latent of unit variance, before training


def log_normalised(x: Tensor, factor: Tensor) -> Tensor:
    """log(1 + factor x) of counts ``x`` (cell, gene), with ``factor`` (cell,); no gradient is computed."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.log1p(x * factor[:, None])
    from spatialvae import _kernels

    y = torch.empty_like(x)
    _kernels.log_normalised(x.numpy(), factor.numpy(), y.numpy())
    return y


class CellEncoder(nn.Module):
    """A Gaussian approximation to the likelihood of z_cell: p(x | z_cell, s) ~ N(t; z_cell, 1 / precision).

    Log-normalised counts y (cell, gene), without the effects of batches s (cell,) on genes, are mapped to t and log
    precision (cell, dim):

        t = W y + b - shift_s + MLP(y),   log precision = MLP(y)

    W and b are initialised with the linear map given (directions of unit variance) and the last layer of the MLP with
    zeros. ``combined`` computes the posterior under a Gaussian prior; neighbours enter through that prior.
    """

    def __init__(self, weight: Tensor, bias: Tensor, shift: Tensor, hidden: int) -> None:
        super().__init__()
        n_latent, n_genes = weight.shape
        self.n_latent = n_latent
        self.first = Linear(n_genes, n_latent + hidden)  # W beside the MLP's first layer: one matrix product
        self.shift = nn.Parameter(shift)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 2 * n_latent)
        with torch.no_grad():
            self.first.weight[:n_latent] = weight
            self.first.bias[:n_latent] = bias
            self.out.weight.zero_()
            self.out.bias.zero_()
            self.out.bias[n_latent:] = torch.tensor(FIRST_PRECISION).log()

    def forward(self, y: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        mean, hidden = self.first(y).split([self.n_latent, len(self.norm.weight)], -1)
        if len(self.shift) > 1:
            mean = mean - F.embedding(batch, self.shift)
        moved, log_precision = self.out(F.relu(self.norm(hidden))).chunk(2, -1)
        return mean + moved, log_precision


def combined(
    target: Tensor, log_precision: Tensor, prior_mean: Tensor, prior_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log variance (cell, dim) of the product of N(target; z, 1 / precision) and the prior
    N(z; prior_mean, prior_variance).

    The arguments are (cell, dim); those of the prior may also be (dim,).
    """
    gain = torch.sigmoid(log_precision + prior_variance.log())  # precision / (precision + 1 / prior_variance)
    return torch.lerp(prior_mean.expand_as(target), target, gain), (prior_variance * (1 - gain)).log()
