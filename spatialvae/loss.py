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

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """(cell,) each, in nats."""

    log_likelihood: Tensor
    kl_cell: Tensor
    kl_niche: Tensor

    def elbo(self, kl_weight: float = 1.0) -> Tensor:
        return self.log_likelihood - kl_weight * (self.kl_cell + self.kl_niche)


def kl_cell(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """Divergence of two diagonal Gaussians (cell, dim), summed over dim."""
    ratio = (log_variance - prior_log_variance).exp()
    off = (mean - prior_mean) ** 2 * (-prior_log_variance).exp()
    return 0.5 * (ratio + off - 1 - log_variance + prior_log_variance).sum(-1)


def kl_niche(
    mean: Tensor,
    log_variance: Tensor,
    others_mean: Tensor,
    others_variance: Tensor,
    present: Tensor,
    prior_variance: Tensor,
    prior_range: Tensor,
    log_det: Tensor,
) -> Tensor:
    """KL_niche_i. mean, log_variance (B, D); others_* (B, K, D); present (B, K); prior_variance (D,)."""
    there = present[..., None].to(mean.dtype)
    variance = log_variance.exp()
    steps = (((mean[:, None] - others_mean) ** 2 + variance[:, None] + others_variance) * there).sum(1)
    energy = mean**2 + variance + prior_range / 2 * steps
    each = energy / prior_variance + prior_variance.log() - log_det - 1 - log_variance
    return 0.5 * each.sum(-1)
