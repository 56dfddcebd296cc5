"""Log-probabilities of counts, summed over the genes of a cell, in nats; and draws of counts.

With mean ``mu`` and inverse dispersion ``theta`` (variance ``mu + mu^2 / theta``):

    NB:      log G(x + theta) - log G(theta) - log x! + theta log(theta / (theta + mu)) + x log(mu / (theta + mu))
    ZINB:    log(pi [x = 0] + (1 - pi) NB(x))
    Poisson: x log mu - mu - log x!
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spatialvae._defaults import LIKELIHOODS
from spatialvae.errors import InputError

TABLE = 256  # largest count in the lookup table
ROWS = 64  # cells at a time, so that intermediate results stay in the cache


def check_likelihood(name: str) -> None:
    """Raise InputError unless ``name`` is a likelihood."""
    if name not in LIKELIHOODS:
        raise InputError(f"gene_likelihood is {name!r}; expected one of {LIKELIHOODS}")


class _NegativeBinomial(torch.autograd.Function):
    """Sum over genes of the NB log-probability.

    For an integer x, log G(x + theta) - log G(theta) is the sum of log(theta + k) over k < x. It is looked up in a
    cumulative sum per gene instead of computing two log-gamma functions per entry; so is its derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
        theta = log_theta.exp()
        value = log_mu.new_empty(len(x))
        by_log_mu, by_theta = torch.empty_like(log_mu), torch.empty_like(log_mu)
        tables = _tables(x, theta)
        for first in range(0, len(x), ROWS):
            part = slice(first, first + ROWS)
            count, log_mean = x[part], log_mu[part]
            mean = log_mean.exp()
            total = mean + theta
            log_total = total.log()
            rising, slope, log_factorial = _lookups(count, theta, *tables)
            log_odds = log_theta - log_total
            each = rising.sub_(log_factorial).addcmul_(count, log_mean - log_total).addcmul_(theta, log_odds)
            value[part] = each.sum(-1)
            share = (count + theta).div_(total)
            by_log_mu[part] = torch.addcmul(count, share, mean, value=-1)
            by_theta[part] = slope.add_(log_odds).add_(1).sub_(share)
        ctx.save_for_backward(by_log_mu, by_theta, theta)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        by_log_mu, by_theta, theta = ctx.saved_tensors
        return None, gradient[:, None] * by_log_mu, (gradient @ by_theta) * theta


def _tables(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative sums over k of log(theta + k) and of 1 / (theta + k), (count, gene) each, and log k!, (count,)."""
    top = min(int(x.max()) if x.numel() else 0, TABLE)
    number = torch.arange(top + 1, dtype=theta.dtype, device=theta.device)
    steps = theta + number[:-1, None]
    zero = torch.zeros_like(theta)[None]
    rising, slope = torch.cat([zero, steps.log().cumsum(0)]), torch.cat([zero, steps.reciprocal().cumsum(0)])
    return rising, slope, torch.lgamma(number + 1)


def _lookups(x: Tensor, theta: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log G(x + theta) - log G(theta), its derivative with respect to theta, and log x!, (cell, gene) each."""
    top = len(tables[2]) - 1
    place = x.clamp(max=top).long()
    rising, slope, log_factorial = tables[0].gather(0, place), tables[1].gather(0, place), tables[2][place]
    row, gene = torch.nonzero(x > top, as_tuple=True) if top == TABLE else (place[:0, 0], place[:0, 0])
    if len(row):
        far, t = x[row, gene] + theta[gene], theta[gene]
        rising[row, gene] = torch.lgamma(far) - torch.lgamma(t)
        slope[row, gene] = torch.digamma(far) - torch.digamma(t)
        log_factorial[row, gene] = torch.lgamma(x[row, gene] + 1)
    return rising, slope, log_factorial


def negative_binomial(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """NB log-probability (cell,) of counts ``x`` (cell, gene), with ``log_mu`` (cell, gene) and ``log_theta``
    (gene,)."""
    return _NegativeBinomial.apply(x, log_mu, log_theta)


class _OfLogits(torch.autograd.Function):
    """NB or ZINB from logits of shares, including the softmax, in one pass; float32 on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, logits: Tensor, logit_zero: Tensor | None, depth: Tensor, log_theta: Tensor
    ) -> Tensor:
        from spatialvae import _kernels

        value, by_logit, by_theta = logits.new_empty(len(x)), torch.empty_like(logits), torch.empty_like(logits)
        by_zero = None if logit_zero is None else torch.empty_like(logits)
        tensors = x, logits, logit_zero, depth, log_theta, value, by_logit, by_zero, by_theta
        _kernels.negative_binomial(*(None if t is None else t.detach().numpy() for t in tensors))
        ctx.save_for_backward(by_logit, by_zero, by_theta)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None, None, Tensor]:
        by_logit, by_zero, by_theta = ctx.saved_tensors
        each = gradient[:, None]
        return None, by_logit.mul_(each), None if by_zero is None else by_zero.mul_(each), None, gradient @ by_theta


def negative_binomial_of_logits(
    x: Tensor, logits: Tensor, depth: Tensor, log_theta: Tensor, logit_zero: Tensor | None = None
) -> Tensor:
    """NB log-probability (cell,) of ``x`` (cell, gene), with mean ``depth`` (cell,) times the softmax of ``logits``
    (cell, gene); ZINB with the same mean if ``logit_zero`` (cell, gene), logits of additional zeros, is given."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        zero = None if logit_zero is None else logit_zero.contiguous()
        return _OfLogits.apply(x, logits.contiguous(), zero, depth, log_theta)
    log_mu = torch.log_softmax(logits, -1) + depth.log()[:, None]
    if logit_zero is None:
        return negative_binomial(x, log_mu, log_theta)
    return zero_inflated_negative_binomial(x, log_mu + F.softplus(logit_zero), log_theta, logit_zero)


def zero_inflated_negative_binomial(x: Tensor, log_mu: Tensor, log_theta: Tensor, logit_zero: Tensor) -> Tensor:
    """ZINB log-probability (cell,); arguments as of ``negative_binomial``, and ``logit_zero`` (cell, gene), the logit
    of an additional zero."""
    theta = log_theta.exp()
    log_total = torch.logaddexp(log_mu, log_theta)
    value = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    value = value + theta * (log_theta - log_total) + x * (log_mu - log_total) + F.logsigmoid(-logit_zero)
    return torch.where(x == 0, torch.logaddexp(F.logsigmoid(logit_zero), value), value).sum(-1)


def poisson(x: Tensor, log_mu: Tensor) -> Tensor:
    """Poisson log-probability (cell,) of ``x`` (cell, gene), with ``log_mu`` (cell, gene)."""
    return (x * log_mu - log_mu.exp() - torch.lgamma(x + 1)).sum(-1)


def sample(mean: np.ndarray, theta: np.ndarray | None, zero: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Draw counts, int32 (..., gene), with ``mean`` (..., gene): Poisson, or NB with ``theta`` (gene,) as a gamma
    mixture of Poisson distributions. ``zero`` (..., gene) is the probability of an additional zero, 0 if None."""
    if theta is not None:
        mean = rng.gamma(theta, mean / theta)
    counts = rng.poisson(mean).astype(np.int32)
    return counts if zero is None else np.where(rng.random(counts.shape) < zero, 0, counts)
