r"""The evidence lower bound, every term per cell.

    ELBO_i = E_q log p(x_i | z_cell_i, z_niche_i, l_i, s_i)
             - KL( q(z_cell_i) || N(A z_niche_i, diag S) )              averaged over q(z_niche_i)
             - KL_niche_i

The prior of each niche dimension d is the Gaussian field N(0, v_d (1 + r L)^-1) over all cells, so that with q
independent over cells

    KL_niche_i = 1/2 sum_d [ (m_id^2 + w_id + r/2 sum_j ((m_id - m_jd)^2 + w_id + w_jd)) / v_d
                             + log v_d - logdet(1 + r L) / n - 1 - log w_id ],     j ~ i,

m and w being posterior means and variances. Summed over all cells of a section this is exactly the divergence of
the joint posterior from the joint prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Terms:
    """Terms of the bound, (cell,) each, in nats; and the posterior means that they come from, (cell, dim)."""

    log_likelihood: Tensor
    kl_cell: Tensor
    kl_niche: Tensor
    cell_mean: Tensor
    niche_mean: Tensor

    def elbo(self, kl_weight: float = 1.0) -> Tensor:
        return self.log_likelihood - kl_weight * (self.kl_cell + self.kl_niche)


def draw_cell(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """z = mean + sd noise (cell, dim) and the divergence (cell,) of N(mean, variance) from the prior.

    All are (cell, dim) but ``prior_log_variance`` (dim,).
    """
    if _has_kernel(mean):
        return _DrawCell.apply(mean, log_variance, prior_mean, prior_log_variance, noise)
    ratio = (log_variance - prior_log_variance).exp()
    off = (mean - prior_mean) ** 2 * (-prior_log_variance).exp()
    kl = 0.5 * (ratio + off - 1 - log_variance + prior_log_variance).sum(-1)
    return mean + noise * (0.5 * log_variance).exp(), kl


def draw_niche(
    mean: Tensor,
    log_variance: Tensor,
    slots: Tensor,
    prior_variance: Tensor,
    prior_range: Tensor,
    log_det: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """z (B, D) and KL_niche (B,) of the first B of the nodes of which mean and log_variance (M, D) are given.

    ``slots`` int (B, K) points to neighbours among the nodes, -1 where there is none; noise (B, D).
    """
    if _has_kernel(mean):
        return _DrawNiche.apply(mean, log_variance, slots, prior_variance, prior_range, log_det, noise)
    there = (slots >= 0)[..., None].to(mean.dtype)
    others = slots.clamp(min=0)
    others_mean, others_variance = F.embedding(others, mean), F.embedding(others, log_variance.exp())
    mean, log_variance = mean[: len(slots)], log_variance[: len(slots)]
    variance = log_variance.exp()
    steps = (((mean[:, None] - others_mean) ** 2 + variance[:, None] + others_variance) * there).sum(1)
    energy = mean**2 + variance + prior_range / 2 * steps
    each = energy / prior_variance + prior_variance.log() - log_det - 1 - log_variance
    return mean + noise * variance.sqrt(), 0.5 * each.sum(-1)


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


class _DrawNiche(torch.autograd.Function):
    """``draw_niche`` in one pass; float32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        from spatialvae import _kernels

        mean, log_variance, slots, prior_variance, prior_range, log_det, noise = given
        variance, z, kl = torch.empty(mean.shape), torch.empty(noise.shape), torch.empty(len(noise))
        numbers = np.float32(prior_range), np.float32(log_det)
        arrays = _arrays(mean, log_variance, slots, prior_variance)
        _kernels.draw_niche(*arrays, *numbers, *_arrays(noise, variance, z, kl))
        ctx.save_for_backward(mean, slots, prior_variance, prior_range, variance, z)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from spatialvae import _kernels

        *given, prior_range, variance, z = ctx.saved_tensors
        found = torch.zeros(given[0].shape), torch.zeros(given[0].shape)
        _kernels.draw_niche_backward(
            *_arrays(*given), np.float32(prior_range), *_arrays(variance, z, *gradients, *found)
        )
        return *found, None, None, None, None, None
