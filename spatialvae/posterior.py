r"""Posteriors with their structure: what the encoder states dimension by dimension, with all correlations.

A Gaussian that factorises over the dimensions of z_cell is narrower than the posterior that it stands for. Here the
likelihood of each cell is expanded to second order around the posterior mode z* (Laplace's approximation): with the
slopes J = d log mu / d z and the Fisher information w of a count about its log mean,

    F = J' diag(w) J,   h = F z* + J' (x - mu) w / mu

stand for precision and precision times mean. z_cell is integrated out as before, which gives the niche of cell i the
precision S^-1 - S^-1 (F + S^-1)^-1 S^-1 and the linear term S^-1 (F + S^-1)^-1 h, of the first D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spatialvae.data import minibatches
from spatialvae.field import posterior_variance, solve
from spatialvae.module import LEAST_DEPTH, UNSEEN, Section, Sites, SpatialModule

ROWS_AT_ONCE = 256  # cells whose slopes (gene, dim) are held
NEWTON_STEPS = 3
HALVINGS = 3  # factor for a step that does not raise the posterior density
VARIANCE_DRAWS = 20  # of the niche: only a small part of its variance is not known exactly


@torch.no_grad()
def posterior(
    module: SpatialModule, section: Section, sites: Sites, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and variance of z_niche (cell, D) and of z_cell (cell, dim), around the mode given by ``sites``."""
    niche, own = module.solve(section.space, sites), module.log_residual.exp()
    mode, (n, d) = module.cells_given(sites, niche)[0].to(own.device), niche.mean.shape
    weight, target = np.zeros((n, d, d)), np.zeros((n, d))
    for rows in _blocks(n):
        index = torch.from_numpy(rows)
        prior_mean = module.prior_of_cells(niche.mean[index].to(own.device))[0]
        mode[index] = _climbed(module, section, rows, mode[index], prior_mean)
        precision, linear = _expanded(module, section, rows, mode[index])
        given = torch.linalg.inv(precision + own.reciprocal().diag())
        inner = own.reciprocal().diag()[:d, :d] - (given / own[:, None] / own)[:, :d, :d]
        weight[rows], target[rows] = (
            inner.cpu().numpy(),
            ((given @ linear[..., None])[..., 0] / own)[:, :d].cpu().numpy(),
        )
    mean, variance = _niche(module, section, weight, target, seed)
    cell_mean, cell_variance = torch.empty(2, n, module.shape.n_cell)
    for rows in _blocks(n):
        index = torch.from_numpy(rows)
        precision, linear = _expanded(module, section, rows, mode[index])
        given = torch.linalg.inv(precision + own.reciprocal().diag())
        pulled = given / own  # by z_niche
        prior_mean = module.prior_of_cells(mean[index].to(own.device))[0]
        cell_mean[index] = ((given @ linear[..., None]) + pulled @ prior_mean[..., None])[..., 0].cpu()
        added = (pulled[:, :, :d] ** 2 @ variance[index].to(own.device)[..., None])[..., 0]
        cell_variance[index] = (given.diagonal(dim1=1, dim2=2) + added).cpu()
    return (mean, variance), (cell_mean, cell_variance)


def _niche(
    module: SpatialModule, section: Section, weight: np.ndarray, target: np.ndarray, seed: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_niche, (cell, D), in whose units of sqrt(v) the field is 1 + r L."""
    if section.space is None:
        return torch.empty(len(target), 0), torch.empty(len(target), 0)
    sd, r = module.smooth_variance.sqrt().cpu().double().numpy(), float(module.range)
    weight = weight * sd[:, None] * sd
    mean = sd * solve(section.space.laplacian, r, weight, sd * target)
    rng = np.random.default_rng(seed)
    variance = sd**2 * posterior_variance(section.space.laplacian, r, weight, rng, VARIANCE_DRAWS)
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(variance.astype(np.float32))


def _expanded(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor) -> tuple[Tensor, Tensor]:
    """F (B, dim, dim) and h (B, dim) of the likelihood of ``rows`` expanded at ``z`` (B, dim)."""
    index, x = torch.from_numpy(rows), module.counts(section, rows)
    depth, batch = section.depth[index].to(z.device), section.batch[index].to(z.device)
    logits, logit_zero = module.decoder(z, batch)
    if section.fill is not None:
        logits = logits.masked_fill(torch.from_numpy(section.cells.missing).to(z.device), UNSEEN)
    share = torch.softmax(logits, -1)
    slopes = module.decoder.slopes(z, batch)
    slopes = slopes - (share[:, None] @ slopes)
    mean, theta = depth[:, None] * share, module.log_theta.clamp(-8, 10).exp()
    shrunk = torch.ones_like(mean) if module.shape.likelihood == "poisson" else theta / (mean + theta)
    counted = torch.ones_like(mean)
    if logit_zero is not None:  # odds that a zero is not an additional one
        none = theta * torch.log(theta / (theta + mean))
        counted = torch.where(x > 0, counted, torch.sigmoid(none - logit_zero))
    gradient = ((x - mean) * shrunk * counted)[:, None] @ slopes
    information = slopes.transpose(1, 2) @ (slopes * (mean * shrunk * counted)[..., None])
    information = information * (depth > LEAST_DEPTH)[:, None, None]
    return information, gradient[:, 0] * (depth > LEAST_DEPTH)[:, None] + (information @ z[..., None])[..., 0]


def _climbed(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor, prior_mean: Tensor) -> Tensor:
    """``z`` (B, dim) moved towards the mode of p(z_cell | x, z_niche = prior_mean) by damped Newton steps."""
    own, x = module.log_residual.exp(), module.counts(section, rows)

    def density(z: Tensor) -> Tensor:
        return module.log_likelihood(section, rows, x, z) - 0.5 * ((z - prior_mean) ** 2 / own).sum(-1)

    value = density(z)
    for _ in range(NEWTON_STEPS):
        precision, linear = _expanded(module, section, rows, z)
        goal = torch.linalg.solve(precision + own.reciprocal().diag(), linear + prior_mean / own)
        step = goal - z
        for _ in range(HALVINGS + 1):
            higher = density(z + step)
            better = higher > value
            z, value = torch.where(better[:, None], z + step, z), torch.where(better, higher, value)
            step = torch.where(better[:, None], torch.zeros_like(step), step / 2)
            if better.all():
                break
    return z


def _blocks(n: int) -> list[np.ndarray]:
    return list(minibatches(np.arange(n), ROWS_AT_ONCE))
