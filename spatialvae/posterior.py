r"""Posteriors with their structure: what the encoder states dimension by dimension, with all correlations.

A Gaussian that factorises over the dimensions of z_cell is narrower than the posterior that it stands for. Here the
likelihood of each cell is expanded to second order around the posterior mode z* (Laplace's approximation): with the
slopes J = d log mu / d z and the Fisher information w of a count about its log mean,

    F = J' diag(w) J,   h = F z* + J' (x - mu) w / mu

stand for precision and precision times mean. z_cell is integrated out as before, which gives the niche of cell i the
precision (1 + F S)^-1 F and the linear term (1 + F S)^-1 h, of the first D dimensions. (S^-1 - S^-1 (F + S^-1)^-1 S^-1
is the same, but rounds to nothing where S is small.) Given the niche z_cell is Gaussian with precision F + S^-1, so
that both latents of a whole section can be drawn together; draws of z_cell are then moved to the posterior itself
(``hamiltonian``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spatialvae.data import minibatches
from spatialvae.errors import InputError
from spatialvae.field import draws, posterior_variance, solve
from spatialvae.hamiltonian import moved
from spatialvae.module import LEAST_DEPTH, Section, Sites, Space, SpatialModule

ENTRIES = 2**21  # slopes (cell, gene, dim) that are held at a time
NEWTON_STEPS = 3
HALVINGS = 3  # factor for a step that does not raise the posterior density
VARIANCE_DRAWS = 20  # of the niche: only a small part of its variance is not known exactly


@dataclass(frozen=True, eq=False)
class Expansion:
    """Of a section: ``mode`` (cell, dim) of z_cell, and what counts say of z_niche: ``weight`` (cell, D, D), its
    precision, and ``target`` (cell, D), precision times mean."""

    mode: Tensor
    weight: np.ndarray
    target: np.ndarray


@torch.no_grad()
def expansion(module: SpatialModule, section: Section, sites: Sites) -> Expansion:
    """Of all cells of a section, around the mode that ``sites`` lead to."""
    niche, own = module.solve(section.space, sites), module.log_residual.exp()
    mode, (n, d) = module.cells_given(sites, niche)[0].to(own.device), niche.mean.shape
    weight, target = np.zeros((n, d, d)), np.zeros((n, d))
    for rows in blocks(module, np.arange(n)):
        index = torch.from_numpy(rows)
        prior_mean = module.prior_of_cells(niche.mean[index].to(own.device))[0]
        mode[index] = climbed(module, section, rows, mode[index], prior_mean, own)
        precision, linear = expanded(module, section, rows, mode[index])
        outer = precision * own + torch.eye(len(own), device=own.device)
        found = torch.linalg.solve(outer, torch.cat([precision, linear[..., None]], -1))[:, :d]
        weight[rows] = (0.5 * (found[..., :d] + found[..., :d].mT)).cpu().numpy()
        target[rows] = found[..., -1].cpu().numpy()
    return Expansion(mode, weight, target)


@torch.no_grad()
def posterior(
    module: SpatialModule, section: Section, sites: Sites, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and variance of z_niche (cell, D) and of z_cell (cell, dim), around the mode given by ``sites``."""
    found, own = expansion(module, section, sites), module.log_residual.exp()
    n, d = found.target.shape
    mean, variance = _niche(module, section, found, seed)
    cell_mean, cell_variance = torch.empty(2, n, module.shape.n_cell)
    for rows in blocks(module, np.arange(n)):
        index = torch.from_numpy(rows)
        precision, linear = expanded(module, section, rows, found.mode[index])
        given = torch.linalg.inv(precision + own.reciprocal().diag())
        pulled = given / own  # by z_niche
        prior_mean = module.prior_of_cells(mean[index].to(own.device))[0]
        cell_mean[index] = ((given @ linear[..., None]) + pulled @ prior_mean[..., None])[..., 0].cpu()
        added = (pulled[:, :, :d] ** 2 @ variance[index].to(own.device)[..., None])[..., 0]
        cell_variance[index] = (given.diagonal(dim1=1, dim2=2) + added).cpu()
    return (mean, variance), (cell_mean, cell_variance)


@torch.no_grad()
def latent_draws(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    n_samples: int,
    seed: int = 0,
    found: Expansion | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Draws from the posterior of a section: parts of ``rows``, z_niche (sample, row, D) and z_cell (sample, row, dim)
    of them.

    All cells of a draw belong to one draw of the whole section: what neighbours share is in it. ``found``, its
    ``expansion``, is made if it is not given.
    """
    found, own = found or expansion(module, section, module.sites(section)), module.log_residual.exp()
    generator = torch.Generator().manual_seed(seed)
    niche = niche_draws(module, section.space, found.weight, found.target, n_samples, seed, rows)
    for part in blocks(module, np.arange(len(rows))):
        index, here = torch.from_numpy(rows[part]), niche[:, part].to(own.device)
        precision, linear = expanded(module, section, rows[part], found.mode[index])
        root = torch.linalg.cholesky(precision + own.reciprocal().diag())
        pull = linear + F.pad(here, (0, len(own) - here.shape[-1])) / own
        noise = torch.randn(pull.shape, generator=generator).to(own.device)
        half = torch.linalg.solve_triangular(root, pull[..., None], upper=False) + noise[..., None]
        z_cell = torch.linalg.solve_triangular(root.mT, half, upper=True)[..., 0]
        yield rows[part], here, _exact(module, section, rows[part], here, z_cell, root, generator)


def _exact(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    niche: Tensor,
    z_cell: Tensor,
    root: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Draws of ``z_cell`` given those of ``niche``, (sample, row, dim) each, moved to p(z_cell | niche, x); ``root``
    (row, dim, dim) of the precision of the Gaussian that they come from."""
    x, own = module.counts(section, rows), module.log_residual.exp()

    def log_density(z: Tensor, expected: Tensor) -> Tensor:
        return module.log_likelihood(section, rows, x, z) - 0.5 * ((z - expected) ** 2 / own).sum(-1)

    pairs = zip(z_cell, F.pad(niche, (0, len(own) - niche.shape[-1])), strict=True)
    return torch.stack([moved(partial(log_density, expected=mean), z, root, generator) for z, mean in pairs])


def niche_draws(
    module: SpatialModule,
    space: Space | None,
    weight: np.ndarray,
    target: np.ndarray,
    n_samples: int,
    seed: int,
    rows: np.ndarray,
) -> Tensor:
    """Draws of z_niche of ``rows``, (sample, row, D), given what counts say of it (``Expansion``; zero: the prior)."""
    if n_samples < 1:
        raise InputError(f"n_samples is {n_samples}; expected at least 1")
    out = torch.zeros(n_samples, len(rows), target.shape[1])
    if space is None:
        return out
    rng = np.random.default_rng(seed)
    sd, r, weight = _scaled(module, weight)
    mean = solve(space.laplacian, r, weight, sd * target)
    for sample in out:
        sample[:] = torch.from_numpy((sd * (mean + draws(space.laplacian, r, weight, rng)))[rows])
    return out


def _scaled(module: SpatialModule, weight: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """sqrt(v), r and ``weight`` in units of sqrt(v), in which the field's precision is 1 + r L."""
    sd = module.smooth_variance.sqrt().cpu().double().numpy()
    return sd, float(module.range), weight * sd[:, None] * sd


def _niche(module: SpatialModule, section: Section, found: Expansion, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_niche, (cell, D)."""
    if section.space is None:
        return torch.empty(len(found.target), 0), torch.empty(len(found.target), 0)
    sd, r, weight = _scaled(module, found.weight)
    mean = sd * solve(section.space.laplacian, r, weight, sd * found.target)
    rng = np.random.default_rng(seed)
    variance = sd**2 * posterior_variance(section.space.laplacian, r, weight, rng, VARIANCE_DRAWS)
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(variance.astype(np.float32))


def expanded(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor) -> tuple[Tensor, Tensor]:
    """F (B, dim, dim) and h (B, dim) of the likelihood of ``rows`` expanded at ``z`` (B, dim)."""
    x, depth = module.counts(section, rows), section.depth[torch.from_numpy(rows)].to(z.device)
    logits, logit_zero = module.logits(section, rows, z)
    share = torch.softmax(module.measured(section, logits), -1)
    slopes = module.slopes(section, rows, z)
    slopes = slopes - (share[:, None] @ slopes)
    mean, theta = depth[:, None] * share, module.bounded_log_theta.exp()
    if logit_zero is not None:
        mean = mean * (1 + logit_zero.exp())
    shrunk = torch.ones_like(mean) if module.shape.likelihood == "poisson" else theta / (mean + theta)
    counted = torch.ones_like(mean)
    if logit_zero is not None:  # odds that a zero is not an additional one
        none = theta * torch.log(theta / (theta + mean))
        counted = torch.where(x > 0, counted, torch.sigmoid(none - logit_zero))
    gradient = ((x - mean) * shrunk * counted)[:, None] @ slopes
    information = slopes.transpose(1, 2) @ (slopes * (mean * shrunk * counted)[..., None])
    information = information * (depth > LEAST_DEPTH)[:, None, None]
    return information, gradient[:, 0] * (depth > LEAST_DEPTH)[:, None] + (information @ z[..., None])[..., 0]


def climbed(
    module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor, prior_mean: Tensor, prior_variance: Tensor
) -> Tensor:
    """``z`` (B, dim) moved towards the mode of p(z_cell | x), z_cell ~ N(prior_mean, diag prior_variance) before, by
    damped Newton steps; (B, dim) each, the variance also (dim,)."""
    x, precision_before = module.counts(section, rows), torch.diag_embed(prior_variance.reciprocal())

    def density(z: Tensor) -> Tensor:
        return module.log_likelihood(section, rows, x, z) - 0.5 * ((z - prior_mean) ** 2 / prior_variance).sum(-1)

    value = density(z)
    for _ in range(NEWTON_STEPS):
        precision, linear = expanded(module, section, rows, z)
        goal = torch.linalg.solve(precision + precision_before, linear + prior_mean / prior_variance)
        step = goal - z
        for _ in range(HALVINGS + 1):
            higher = density(z + step)
            better = higher > value
            z, value = torch.where(better[:, None], z + step, z), torch.where(better, higher, value)
            step = torch.where(better[:, None], torch.zeros_like(step), step / 2)
            if better.all():
                break
    return z


def blocks(module: SpatialModule, rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in parts whose slopes fit into memory."""
    return minibatches(rows, max(ENTRIES // (module.shape.n_genes * module.shape.n_cell), 1))
