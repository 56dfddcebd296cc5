r"""The evidence lower bound, with each term per cell.

    ELBO_i = E_q log p(x_i | z_cell_i, l_i, s_i)
             - KL( q(z_cell_i | z_niche_i) || N(z_niche_i, diag S) )     averaged over q(z_niche_i)
             - KL_niche_i

q(z_niche) is one Gaussian N(m_d, Q_d^-1) over all cells of a section for each dimension d, with
Q_d = (1 + r L) / v_d + g_d and a scalar g_d. With the eigenvalues u of L,

    KL_niche_i = 1/2 sum_d [ m_id ((1 + r L) m_d)_i / v_d + mean over u of (a - 1 - log a) ],
    a = (1 + r u) / (1 + r u + v_d g_d).

The sum of KL_niche_i over all cells of a section is the divergence of q(z_niche) from the prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Terms of the bound, (cell,) each, in nats; and the posterior means of z_cell, (cell, dim)."""

    log_likelihood: Tensor
    kl_cell: Tensor
    kl_niche: Tensor
    cell_mean: Tensor

    def elbo(self, kl_weight: float = 1.0) -> Tensor:
        return self.log_likelihood - kl_weight * (self.kl_cell + self.kl_niche)


def draw_cell(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """z = mean + sd noise (cell, dim), and the divergence (cell,) of N(mean, variance) from the prior, in nats.

    All arguments are (cell, dim), except ``prior_log_variance`` (dim,).
    """
    if _has_kernel(mean):
        return _DrawCell.apply(mean, log_variance, prior_mean, prior_log_variance, noise)
    ratio = (log_variance - prior_log_variance).exp()
    off = (mean - prior_mean) ** 2 * (-prior_log_variance).exp()
    kl = 0.5 * (ratio + off - 1 - log_variance + prior_log_variance).sum(-1)
    return mean + noise * (0.5 * log_variance).exp(), kl


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().contiguous().numpy() for t in tensors)


class _DrawCell(torch.autograd.Function):
    """``draw_cell`` in one pass; float32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        from spatialvae import _kernels

        mean, _, prior_mean, prior_log_variance, _ = given
        variance, z, kl = torch.empty(mean.shape), torch.empty(mean.shape), torch.empty(len(mean))
        _kernels.draw_cell(*_arrays(*given, variance, z, kl))
        ctx.save_for_backward(mean, prior_mean, prior_log_variance, variance, z)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from spatialvae import _kernels

        found = *(torch.empty(ctx.saved_tensors[0].shape) for _ in range(3)), torch.zeros(ctx.saved_tensors[2].shape)
        _kernels.draw_cell_backward(*_arrays(*ctx.saved_tensors, *gradients, *found))
        return *found, None
