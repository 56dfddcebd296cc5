"""Log-probabilities of counts, summed over the genes of a cell.

With mean ``mu`` and inverse dispersion ``theta`` (variance ``mu + mu^2 / theta``):

    NB:      log G(x + theta) - log G(theta) - log x! + theta log(theta / (theta + mu)) + x log(mu / (theta + mu))
    ZINB:    log(pi [x = 0] + (1 - pi) NB(x))
    Poisson: x log mu - mu - log x!
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TABLE = 256  # counts above it take the slow way


class _NegativeBinomial(torch.autograd.Function):
    """Sum over genes of the NB log-probability.

    For an integer x, log G(x + theta) - log G(theta) is the sum of log(theta + k) over k < x: a running sum per
    gene, looked up, in place of two log-gamma functions per entry; its derivative likewise.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
        theta = log_theta.exp()
        mu = log_mu.exp()
        total = mu + theta
        log_total = total.log()
        rising, slope, log_factorial = _lookups(x, theta)
        value = rising - log_factorial + x * (log_mu - log_total) + theta * (log_theta - log_total)
        share = (x + theta) / total
        ctx.save_for_backward(x - share * mu, slope + log_theta - log_total + 1 - share, theta)
        return value.sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        by_log_mu, by_theta, theta = ctx.saved_tensors
        gradient = gradient[..., None]
        return None, gradient * by_log_mu, (gradient * by_theta).sum(0) * theta


def _lookups(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log G(x + theta) - log G(theta), its derivative by theta, and log x!, each like ``x`` (cell, gene)."""
    most = int(x.max()) if x.numel() else 0
    top = min(most, TABLE)
    number = torch.arange(top + 1, dtype=theta.dtype, device=theta.device)
    steps = theta + number[:-1, None]
    zero = torch.zeros_like(theta)[None]
    place = x.clamp(max=top).long()
    rising = torch.cat([zero, steps.log().cumsum(0)]).gather(0, place)
    slope = torch.cat([zero, steps.reciprocal().cumsum(0)]).gather(0, place)
    log_factorial = torch.lgamma(number + 1)[place]
    if most > top:
        row, gene = torch.nonzero(x > top, as_tuple=True)
        far, t = x[row, gene] + theta[gene], theta[gene]
        rising[row, gene] = torch.lgamma(far) - torch.lgamma(t)
        slope[row, gene] = torch.digamma(far) - torch.digamma(t)
        log_factorial[row, gene] = torch.lgamma(x[row, gene] + 1)
    return rising, slope, log_factorial


def negative_binomial(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """(cell,) from counts ``x`` and ``log_mu`` (cell, gene) and ``log_theta`` (gene,)."""
    return _NegativeBinomial.apply(x, log_mu, log_theta)


def zero_inflated_negative_binomial(x: Tensor, log_mu: Tensor, log_theta: Tensor, logit_zero: Tensor) -> Tensor:
    """(cell,); ``logit_zero`` (cell, gene) is the logit of an additional zero."""
    theta = log_theta.exp()
    log_total = torch.logaddexp(log_mu, log_theta)
    value = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    value = value + theta * (log_theta - log_total) + x * (log_mu - log_total) + F.logsigmoid(-logit_zero)
    return torch.where(x == 0, torch.logaddexp(F.logsigmoid(logit_zero), value), value).sum(-1)


def poisson(x: Tensor, log_mu: Tensor) -> Tensor:
    """(cell,)."""
    return (x * log_mu - log_mu.exp() - torch.lgamma(x + 1)).sum(-1)
