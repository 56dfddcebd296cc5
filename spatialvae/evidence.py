r"""Evidence: log p(x) of cells, with its Monte Carlo error.

z_niche_i ~ N(c_i, diag M_i), given or, with neighbours unknown, its marginal prior c = 0, M = v spread. With z_niche
integrated out z_cell_i ~ N(c_i, M_i + S). It is drawn from r, Laplace's approximation of its posterior made wider:

    log p(x) = log E_r [ w ],   w = p(x | z_cell) p(z_cell) / r(z_cell)

The error of the logarithm of a mean is the standard error of the mean over the mean (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from spatialvae.encoder import combined
from spatialvae.module import Section, SpatialModule
from spatialvae.posterior import blocks, climbed, expanded

PROPOSAL_WIDTH = 1.2  # sd of importance samples in units of the approximation's, whose tails are too thin

Gaussian = tuple[Tensor, Tensor]  # mean and variance, (cell, dim) each


def log_mean_weight(
    log_likelihood: Callable[[Tensor], Tensor],
    prior: Gaussian,
    mode: Tensor,
    precision: Tensor,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """log E_r [ p(x | z) N(z; prior) / r(z) ] and its Monte Carlo error, (B,) each, in nats.

    r = N(mode, PROPOSAL_WIDTH^2 precision^-1); ``mode`` (B, dim), ``precision`` (B, dim, dim).
    """
    centre, variance = prior
    root = torch.linalg.cholesky(precision) / PROPOSAL_WIDTH
    log_det, found = root.diagonal(dim1=1, dim2=2).log().sum(-1), []
    for _ in range(samples):
        noise = torch.randn(mode.shape, generator=generator).to(mode.device)
        z = mode + torch.linalg.solve_triangular(root.mT, noise[..., None], upper=True)[..., 0]
        log_r = log_det - 0.5 * (noise**2).sum(-1)
        log_p = -0.5 * ((z - centre) ** 2 / variance + variance.log()).sum(-1)
        found.append(log_likelihood(z) + log_p - log_r)
    weights = torch.stack(found).double()
    value = torch.logsumexp(weights, 0) - math.log(samples)
    relative = (weights - value).exp()
    error = relative.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(value, math.nan)
    return value, error


@torch.no_grad()
def log_evidence(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    samples: int,
    seed: int = 0,
    niche: Gaussian | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """log p(x_i) and its Monte Carlo error of ``rows``, float64 (row,) each, in nats.

    ``niche``: mean and variance of z_niche, (cell, D) each, of all cells of the section.
    """
    generator, device = torch.Generator().manual_seed(seed), module.mean.device
    parts = []
    for part in blocks(module, rows):
        index, x = torch.from_numpy(part), module.counts(section, part)
        if niche is None:
            unknown = module.niche_variance.expand(len(part), -1)
            prior = module.prior_of_cells(torch.zeros_like(unknown), unknown)
        else:
            prior = module.prior_of_cells(niche[0][index].to(device), niche[1][index].to(device))
        start = combined(*module.encoded(section, part, x), *prior)[0]
        mode = climbed(module, section, part, start, *prior)
        precision = expanded(module, section, part, mode)[0] + torch.diag_embed(prior[1].reciprocal())

        def likelihood(z: Tensor, part: np.ndarray = part, x: Tensor = x) -> Tensor:
            return module.log_likelihood(section, part, x, z)

        parts.append(torch.stack(log_mean_weight(likelihood, prior, mode, precision, samples, generator)).cpu().numpy())
    value, error = np.concatenate(parts, 1)
    return value, error


def mean_with_error(value: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Mean over cells, and the error that it has from independent ``error`` (cell,)."""
    return float(value.mean()), float(np.sqrt((error**2).sum()) / len(error))
