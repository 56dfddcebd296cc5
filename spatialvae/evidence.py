r"""Evidence: log p(x) of cells by importance sampling, with its Monte Carlo error.

The prior of z_cell_i is a mixture of Gaussians: given the counts of other cells (``neighbours``), or marginally
(``celltypes``). The proposal r is Laplace's approximation of the posterior of z_cell_i, with the mixture replaced by
the Gaussian with the same moments, and widened:

    log p(x) = log E_r [ w ],   w = p(x | z_cell) p(z_cell) / r(z_cell)

The error of the logarithm of the mean weight is the standard error of the mean divided by the mean (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from spatialvae.encoder import combined
from spatialvae.mixture import Mixture
from spatialvae.module import Section, SpatialModule
from spatialvae.posterior import blocks, climbed, expanded, spread

PROPOSAL_WIDTH = 1.2  # sd of the proposal relative to Laplace's approximation, whose tails are too light

Gaussian = tuple[Tensor, Tensor]  # mean and variance, (cell, dim) each
LogLikelihood = Callable[[Tensor], Tensor]  # z (cell, dim) to (cell,), in nats


def weighted_draws(
    log_likelihood: LogLikelihood, mode: Tensor, precision: Tensor, samples: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws z (B, dim) of r = N(mode, PROPOSAL_WIDTH^2 precision^-1), each with log p(x | z) / r(z), (B,).

    ``mode`` (B, dim), ``precision`` (B, dim, dim).
    """
    root = torch.linalg.cholesky(precision) / PROPOSAL_WIDTH
    log_det = root.diagonal(dim1=1, dim2=2).log().sum(-1) - 0.5 * mode.shape[1] * math.log(2 * math.pi)
    for _ in range(samples):
        noise = torch.randn(mode.shape, generator=generator).to(mode.device)
        z = mode + spread(root, noise)
        yield z, log_likelihood(z) - (log_det - 0.5 * (noise**2).sum(-1))


@torch.no_grad()
def drawn(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    samples: int,
    seed: int = 0,
    expected: Callable[[np.ndarray], Mixture] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws z (row, draw, dim) and log p(x | z) / r(z) (row, draw), on the CPU; ``expected`` as in ``log_evidence``."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _, proposed in _proposals(module, section, rows, expected):
        pairs = weighted_draws(*proposed, samples, generator)
        found.append([torch.stack(values, 1).cpu() for values in zip(*pairs, strict=True)])
    if not found:
        return torch.empty(0, samples, module.shape.n_cell), torch.empty(0, samples)
    z, log_weight = (torch.cat(values) for values in zip(*found, strict=True))
    return z, log_weight


def log_mean_weight(
    log_likelihood: LogLikelihood,
    prior: Mixture,
    mode: Tensor,
    precision: Tensor,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """log E_r [ p(x | z) p(z) / r(z) ] and its Monte Carlo error, (B,) each, in nats; r as in ``weighted_draws``."""
    drawn = weighted_draws(log_likelihood, mode, precision, samples, generator)
    weights = torch.stack([value + prior.log_density(z[:, None])[:, 0] for z, value in drawn]).double()
    value = torch.logsumexp(weights, 0) - math.log(samples)
    relative = (weights - value).exp()
    error = relative.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(value, math.nan)
    return value, error


def proposal(
    module: SpatialModule, section: Section, rows: np.ndarray, prior: Gaussian
) -> tuple[LogLikelihood, Tensor, Tensor]:
    """log p(x | z) of ``rows`` as a function of z (row, dim), and the mode (row, dim) and precision (row, dim, dim) of
    Laplace's approximation of the posterior of z_cell under a Gaussian ``prior``."""
    x = module.counts(section, rows)
    start = combined(*module.encoded(section, rows, x), *prior)[0]
    mode = climbed(module, section, rows, start, *prior)
    precision = expanded(module, section, rows, mode)[0] + torch.diag_embed(prior[1].reciprocal())

    def log_likelihood(z: Tensor) -> Tensor:
        return module.log_likelihood(section, rows, x, z)

    return log_likelihood, mode, precision


def _proposals(
    module: SpatialModule, section: Section, rows: np.ndarray, expected: Callable[[np.ndarray], Mixture] | None
) -> Iterator[tuple[Mixture, tuple[LogLikelihood, Tensor, Tensor]]]:
    """The prior of z_cell and the ``proposal`` of each block of ``rows``."""
    for part in blocks(module, rows):
        prior = module.cells_around(*module.unknown_niche(len(part))) if expected is None else expected(part)
        yield prior, proposal(module, section, part, prior.moments())


@torch.no_grad()
def log_evidence(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    samples: int,
    seed: int = 0,
    expected: Callable[[np.ndarray], Mixture] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """log p(x_i) of ``rows`` and its Monte Carlo error, float64 (row,) each, in nats.

    ``expected`` maps rows to the distribution of their z_cell given other cells; the marginal prior if None.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for prior, (likelihood, mode, precision) in _proposals(module, section, rows, expected):
        found = log_mean_weight(likelihood, prior, mode, precision, samples, generator)
        parts.append(torch.stack(found).cpu().numpy())
    value, error = np.concatenate(parts, 1)
    return value, error


def mean_with_error(value: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Mean of ``value`` over cells, and its error from the independent errors ``error`` (cell,)."""
    return float(value.mean()), float(np.sqrt((error**2).sum()) / len(error))
