r"""Posteriors of both latents with full covariances; those of the encoder are diagonal.

The likelihood of z_cell of each cell is approximated by a Gaussian with precision F_i and precision times mean h_i.
With the slopes J = d log mu / d z and the Fisher information w of a count about its log mean,

    F = <J' diag(w) J>,   h = F <z> + <J' (x - mu) w / mu>

where < > is the value at the mode (Laplace's approximation) or, starting from there, the mean over the Gaussian that is
closest to the posterior of the cell (Opper & Archambeau 2009). The latter is wider, since it accounts for the change of
the slopes. Steps are halved for each cell until they raise its variational bound, which is computed from the same few
draws each time. With zero inflation, it is not observed which zeros are additional: the information about their logits
is the complete-data information less the missing information (Louis 1982).

The type of a cell (``celltypes``) enters through ``Link``: z_cell given z_niche is N(c z_niche + o, C), with the
moments of the mixture weighted by the cell's probability of each component. With z_cell integrated out, the likelihood
of z_niche has the precision c^2 (1 + F C)^-1 F and the linear term c (1 + F C)^-1 (h - F o), restricted to the first D
dimensions. (C^-1 - C^-1 (F + C^-1)^-1 C^-1 is equal, but is lost in rounding errors if C is small.) The dependence of
the type frequencies on the niche adds to both. Given z_niche, z_cell is Gaussian with precision F + C^-1, so that both
latents of a whole section are drawn jointly; draws of z_cell are then corrected to p(z_cell | z_niche, x)
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

from spatialvae.celltypes import LEAST_SHARE
from spatialvae.data import minibatches
from spatialvae.errors import check_count
from spatialvae.field import draws, posterior_covariance, solve
from spatialvae.hamiltonian import moved
from spatialvae.mixture import Mixture
from spatialvae.module import LEAST_DEPTH, Section, Sites, Space, SpatialModule

ENTRIES = 2**21  # largest number of slopes (cell, gene, dim) or precisions (cell, type, dim, dim) in memory
NEWTON_STEPS = 3
HALVINGS = 3  # at most, of a step that does not raise the posterior density or the bound
ROUNDS = 2  # of updating cells given niches and niches given cells
AVERAGED, STEPS = 8, 2  # draws that slopes are averaged over, in antithetic pairs; steps per round
WEIGHED, WIDER = 64, 1.2  # importance samples for ``widening``; their sd relative to the Gaussian's
VARIANCE_DRAWS = 20  # of the niche: only a small part of its variance is estimated from draws


@dataclass(frozen=True, eq=False)
class Link:
    """z_cell given z_niche is N(``gain`` z_niche + ``offset``, diag ``own``); ``gain`` (cell, 1), the others
    (cell, dim)."""

    gain: Tensor
    offset: Tensor
    own: Tensor

    def of(self, index: Tensor) -> Link:
        return Link(self.gain[index], self.offset[index], self.own[index])

    def mean(self, niche: Tensor) -> Tensor:
        """Mean of z_cell (..., cell, dim) given ``niche`` (..., cell, D)."""
        return self.gain * F.pad(niche, (0, self.own.shape[1] - niche.shape[-1])) + self.offset

    def variance(self, niche_variance: Tensor) -> Tensor:
        """Variance of z_cell (cell, dim) if z_niche has ``niche_variance`` (cell, D)."""
        return self.own + self.gain**2 * F.pad(niche_variance, (0, self.own.shape[1] - niche_variance.shape[1]))


@dataclass(frozen=True, eq=False)
class Expansion:
    """Gaussian approximation to the likelihoods of a section.

    ``precision`` (cell, dim, dim), F, and ``linear`` (cell, dim), h, of z_cell; ``link`` from z_niche to z_cell;
    ``weight`` (cell, D, D), the precision, and ``target`` (cell, D), precision times mean, of z_niche.
    """

    precision: Tensor
    linear: Tensor
    link: Link
    weight: np.ndarray
    target: np.ndarray


@torch.no_grad()
def expansion(module: SpatialModule, section: Section, sites: Sites) -> Expansion:
    """The expansion of all cells of a section, started from the encoder's approximation ``sites``."""
    niche, device, own = module.solve(section.space, sites), module.mean.device, module.log_residual.exp().cpu()
    (n, d), dim, mean = niche.mean.shape, len(own), niche.mean
    said = 1 / (own[:d] + (-sites.log_precision[:, :d]).exp())
    outside = torch.maximum(1 / niche.variance - said, 1 / module.niche_variance.cpu())  # precision from other cells
    weight, target = torch.diag_embed(said), said * sites.target[:, :d]
    precision = torch.diag_embed(sites.log_precision.exp())
    linear, link = (
        sites.log_precision.exp() * sites.target,
        Link(torch.ones(n, 1), torch.zeros(n, dim), own.repeat(n, 1)),
    )
    kept = (precision, linear, *vars(link).values(), weight, target)
    for i in range(ROUNDS):
        expected = mean + ((weight @ mean[..., None])[..., 0] - target) / outside
        for rows in blocks(module, np.arange(n)):
            index = torch.from_numpy(rows)
            here, *others = (value[index].to(device) for value in (mean, expected, 1 / outside))
            likelihood = precision[index].to(device), linear[index].to(device)
            share = torch.softmax(log_evidence_of_parts(module.cells_around(*others), *likelihood), 1)
            linked = link_of(module, share, here)
            prior = linked.mean(others[0]), linked.variance(others[1])
            likelihood = _likelihood(module, section, rows, *likelihood, prior, climb=i == 0)
            found = *likelihood, *vars(linked).values(), *of_niche(module, *likelihood, linked, share, here)
            for whole, part in zip(kept, found, strict=True):
                whole[index] = part.cpu()
        mean = _niche_mean(module, section.space, weight.double().numpy(), target.double().numpy())
    return Expansion(precision, linear, link, weight.double().numpy(), target.double().numpy())


def _likelihood(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    precision: Tensor,
    linear: Tensor,
    prior: tuple[Tensor, Tensor],
    climb: bool,
) -> tuple[Tensor, Tensor]:
    """Updated ``precision`` (B, dim, dim) and ``linear`` (B, dim) of the likelihoods of ``rows``, given the mean and
    variance of the Gaussian ``prior`` of z_cell, (B, dim) each; ``climb``: start from the mode."""
    precision_before, pull = torch.diag_embed(1 / prior[1]), prior[0] / prior[1]
    curved = precision + precision_before
    z = torch.linalg.solve(curved, linear + pull)
    if climb:
        z = climbed(module, section, rows, z, *prior)
        curved = expanded(module, section, rows, z)[0] + precision_before
    z, curved = refined(module, section, rows, z, curved, *prior)
    curved = precision_before + (curved - precision_before) * widening(module, section, rows, z, curved, *prior)
    return curved - precision_before, (curved @ z[..., None])[..., 0] - pull


def spread(root: Tensor, noise: Tensor) -> Tensor:
    """Draws (..., B, dim) of a Gaussian with mean 0 from standard normal ``noise`` (..., B, dim); ``root``
    (B, dim, dim) is the Cholesky factor of its precision."""
    return torch.linalg.solve_triangular(root.mT, noise[..., None], upper=True)[..., 0]


def widening(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    mean: Tensor,
    precision: Tensor,
    prior_mean: Tensor,
    prior_variance: Tensor,
) -> Tensor:
    """Factor (B, 1, 1), at most 1, for the likelihood's contribution T to ``precision``.

    The Gaussian of ``refined`` is narrower than p(z_cell | x). The factor is the mean of d' T d over N(``mean``,
    ``precision``^-1) divided by that over p(z_cell | x), estimated by importance sampling, with d the deviation of
    z_cell from ``mean``.
    """
    x, root = module.counts(section, rows), torch.linalg.cholesky(precision) / WIDER
    noise = torch.randn(WEIGHED, 1, mean.shape[1], generator=torch.Generator().manual_seed(1)).to(mean.device)
    off = spread(root, noise.expand(-1, len(mean), -1))
    likelihood = torch.stack([module.log_likelihood(section, rows, x, mean + step) for step in off])
    prior = ((mean + off - prior_mean) ** 2 / prior_variance).sum(2)
    weight = torch.softmax(likelihood - 0.5 * prior + 0.5 * (noise**2).sum(2), 0)
    told = precision - torch.diag_embed(1 / prior_variance)
    found = (weight * torch.einsum("sbd,bde,sbe->sb", off, told, off)).sum(0)
    variance = torch.cholesky_inverse(root * WIDER).diagonal(dim1=1, dim2=2)
    stated = mean.shape[1] - (variance / prior_variance).sum(1)
    return (stated / found.clamp(min=1e-12)).clamp(0, 1)[:, None, None]


def link_of(module: SpatialModule, share: Tensor, niche: Tensor) -> Link:
    """The link of cells with the probabilities ``share`` (B, component), with the variance at ``niche`` (B, D)."""
    own, types, alone = module.log_residual.exp(), module.types, share[:, :1]
    at, of_type = F.pad(niche, (0, len(own) - niche.shape[1])), share[:, 1:]
    offset = of_type @ types.mean
    mean = alone * at + offset
    square = alone * (own + at**2) + of_type @ (types.variance + types.mean**2)
    return Link(alone, offset, torch.maximum(square - mean**2, LEAST_SHARE * own))


def log_evidence_of_parts(before: Mixture, precision: Tensor, linear: Tensor) -> Tensor:
    """Log of the weight of each component of ``before`` times the mean of exp(-z'Fz / 2 + h'z) over it,
    (B, component)."""
    curved = precision[:, None] + torch.diag_embed(1 / before.variance)
    pull = linear[:, None] + before.mean / before.variance
    root = torch.linalg.cholesky(curved)
    half = torch.linalg.solve_triangular(root, pull[..., None], upper=False)[..., 0]
    log_det = root.diagonal(dim1=2, dim2=3).log().sum(-1) + 0.5 * before.variance.log().sum(-1)
    energy = (half**2).sum(-1) - (before.mean**2 / before.variance).sum(-1)
    return before.log_weight - log_det + 0.5 * energy


def of_niche(
    module: SpatialModule, precision: Tensor, linear: Tensor, link: Link, share: Tensor, niche: Tensor
) -> tuple[Tensor, Tensor]:
    """The likelihood of z_niche, expanded at ``niche`` (B, D): weight (B, D, D) and target (B, D) of ``Expansion``."""
    d, outer = niche.shape[1], precision * link.own[:, None] + torch.eye(len(linear[0]), device=linear.device)
    rest = linear - (precision @ link.offset[..., None])[..., 0]
    found = torch.linalg.solve(outer, torch.cat([precision, rest[..., None]], -1))[:, :d]
    weight, target = link.gain[..., None] ** 2 * found[..., :d], link.gain * found[..., -1]
    if module.shape.n_types and d:
        slope, of_type = module.types.slope, share[:, 1:]
        size = of_type.sum(1, keepdim=True).clamp(min=1e-12)
        frequent = module.types.log_frequency(niche).exp()
        known = size[..., None] * (_covariance(frequent, slope) - _covariance(of_type / size, slope))
        values, vectors = torch.linalg.eigh(known)  # negative eigenvalues are set to zero
        known = vectors @ (values.clamp(min=0)[..., None] * vectors.mT)
        weight = weight + known
        target = target + (known @ niche[..., None])[..., 0] + (of_type - size * frequent) @ slope
    return 0.5 * (weight + weight.mT), target


def _covariance(share: Tensor, slope: Tensor) -> Tensor:
    """Covariance (B, D, D) of the rows of ``slope`` (type, D) under the probabilities ``share`` (B, type)."""
    mean = share @ slope
    return torch.einsum("bk,kd,ke->bde", share, slope, slope) - mean[:, :, None] * mean[:, None]


@torch.no_grad()
def posterior(
    module: SpatialModule, section: Section, sites: Sites, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Posterior mean and variance of z_niche, (cell, D) each, and of z_cell, (cell, dim) each; ``sites`` as in
    ``expansion``."""
    found = expansion(module, section, sites)
    n, d = found.target.shape
    mean, covariance = _niche(module, section.space, found, seed)
    cell_mean, cell_variance = torch.empty(2, n, module.shape.n_cell)
    for rows in blocks(module, np.arange(n)):
        index = torch.from_numpy(rows)
        link = found.link.of(index)
        given = torch.linalg.inv(found.precision[index] + torch.diag_embed(1 / link.own))
        pull = found.linear[index] + link.mean(mean[index]) / link.own
        cell_mean[index] = (given @ pull[..., None])[..., 0]
        pulled = (given * (link.gain / link.own)[:, None])[..., :d]  # d mean of z_cell / d z_niche
        added = torch.einsum("bcd,bde,bce->bc", pulled, covariance[index], pulled)
        cell_variance[index] = given.diagonal(dim1=1, dim2=2) + added
    return (mean, covariance.diagonal(dim1=1, dim2=2)), (cell_mean, cell_variance)


@torch.no_grad()
def latent_draws(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    n_samples: int,
    seed: int = 0,
    found: Expansion | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Draws from the joint posterior of a section, in blocks of rows.

    Yields a part of ``rows``, its z_niche (sample, row, D) and its z_cell (sample, row, dim). Each sample is one draw
    of all cells of the section, so that the correlations of neighbours are included. ``found`` is the ``expansion`` of
    the section, computed if None.

    Raises InputError if ``n_samples`` is less than 1.
    """
    found, device = found or expansion(module, section, module.sites(section)), module.mean.device
    generator = torch.Generator().manual_seed(seed)
    niche = niche_draws(module, section.space, found.weight, found.target, n_samples, seed, rows)
    for part in blocks(module, np.arange(len(rows))):
        index, here = torch.from_numpy(rows[part]), niche[:, part]
        link = found.link.of(index)
        root = torch.linalg.cholesky(found.precision[index] + torch.diag_embed(1 / link.own))
        pull = found.linear[index] + link.mean(here) / link.own
        noise = torch.randn(pull.shape, generator=generator)
        half = torch.linalg.solve_triangular(root, pull[..., None], upper=False) + noise[..., None]
        z_cell = torch.linalg.solve_triangular(root.mT, half, upper=True)[..., 0]
        yield rows[part], here.to(device), _exact(module, section, rows[part], here, z_cell, root, generator)


def _exact(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    niche: Tensor,
    z_cell: Tensor,
    root: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Draws of ``z_cell`` (sample, row, dim) given ``niche`` (sample, row, D), corrected to p(z_cell | niche, x).

    ``root`` (row, dim, dim) is the Cholesky factor of the precision of the Gaussian that they are drawn from.
    """
    x, device, root = module.counts(section, rows), module.mean.device, root.to(module.mean.device)
    together, moves = max(block_size(module) // len(rows), 1), []  # samples at a time: few rows take as long as many
    for z, here in zip(z_cell.split(together), niche.split(together), strict=True):
        n, prior = len(z), module.cells_within(here.flatten(0, 1).to(device))
        density = partial(_log_density, module, section, np.tile(rows, n), x.repeat(n, 1), prior)
        end = moved(density, z.flatten(0, 1).to(device), root.repeat(n, 1, 1), generator)
        moves.append(end.unflatten(0, (n, len(rows))))
    return torch.cat(moves)


def _log_density(
    module: SpatialModule, section: Section, rows: np.ndarray, x: Tensor, prior: Mixture, z: Tensor
) -> Tensor:
    """log p(x, z_cell = ``z`` | z_niche) of ``rows``, (row,)."""
    return module.log_likelihood(section, rows, x, z) + prior.log_density(z[:, None])[:, 0]


def niche_draws(
    module: SpatialModule,
    space: Space | None,
    weight: np.ndarray,
    target: np.ndarray,
    n_samples: int,
    seed: int,
    rows: np.ndarray,
) -> Tensor:
    """Draws of z_niche of ``rows``, (sample, row, D), given ``weight`` and ``target`` of ``Expansion``; from the prior
    if these are zero.

    Raises InputError if ``n_samples`` is less than 1.
    """
    check_count("n_samples", n_samples)
    out = torch.zeros(n_samples, len(rows), target.shape[1])
    if space is None:
        return out
    rng = np.random.default_rng(seed)
    sd, r, weight = _scaled(module, weight)
    mean = solve(space.laplacian, r, weight, sd * target)
    for sample in out:
        sample[:] = torch.from_numpy((sd * (mean + draws(space.laplacian, r, weight, rng)))[rows])
    return out


def _scaled(module: SpatialModule, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sqrt(v), r and ``weight`` for z_niche / sqrt(v), whose prior precision is 1 + r L."""
    sd = module.smooth_variance.sqrt().cpu().double().numpy()
    return sd, module.range.cpu().double().numpy(), weight * sd[:, None] * sd


def _niche_mean(module: SpatialModule, space: Space | None, weight: np.ndarray, target: np.ndarray) -> Tensor:
    """Posterior mean of z_niche, (cell, D)."""
    if space is None:
        return torch.zeros(target.shape)
    sd, r, weight = _scaled(module, weight)
    return torch.from_numpy((sd * solve(space.laplacian, r, weight, sd * target)).astype(np.float32))


def _niche(module: SpatialModule, space: Space | None, found: Expansion, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (cell, D) and covariance (cell, D, D) of z_niche."""
    if space is None:
        return torch.zeros(found.target.shape), torch.zeros(found.weight.shape)
    sd, r, weight = _scaled(module, found.weight)
    rng = np.random.default_rng(seed)
    covariance = sd[:, None] * sd * posterior_covariance(space.laplacian, r, weight, rng, VARIANCE_DRAWS)
    mean = _niche_mean(module, space, found.weight, found.target)
    return mean, torch.from_numpy(covariance.astype(np.float32))


def expanded(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor) -> tuple[Tensor, Tensor]:
    """F (B, dim, dim) and h (B, dim) of the likelihood of ``rows``, expanded at ``z`` (B, dim)."""
    x, depth = module.counts(section, rows), section.depth[torch.from_numpy(rows)].to(z.device)
    logits, logit_zero = module.logits(section, rows, z)
    share = torch.softmax(module.measured(section, logits), -1)
    slopes, of_zero = module.slopes(section, rows, z)
    slopes = slopes - (share[:, None] @ slopes)
    mean, theta = depth[:, None] * share, module.bounded_log_theta.exp()
    counted, added = torch.ones_like(mean), None
    if logit_zero is not None and of_zero is not None:
        added = torch.sigmoid(logit_zero)
        mean, slopes = mean * (1 + logit_zero.exp()), slopes + added[..., None] * of_zero
        none = theta * torch.log(theta / (theta + mean))
        counted = torch.where(x > 0, counted, torch.sigmoid(none - logit_zero))  # P(a zero is not additional)
    shrunk = torch.ones_like(mean) if module.shape.likelihood == "poisson" else theta / (mean + theta)
    gradient = ((x - mean) * shrunk * counted)[:, None] @ slopes
    information = slopes.transpose(1, 2) @ (slopes * (mean * shrunk * counted)[..., None])
    if added is not None and of_zero is not None:
        gradient = gradient + (1 - counted - added)[:, None] @ of_zero
        known = (added * (1 - added) - counted * (1 - counted)).clamp(min=0)
        information = information + of_zero.transpose(1, 2) @ (of_zero * known[..., None])
    information = information * (depth > LEAST_DEPTH)[:, None, None]
    return information, gradient[:, 0] * (depth > LEAST_DEPTH)[:, None] + (information @ z[..., None])[..., 0]


def climbed(
    module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor, prior_mean: Tensor, prior_variance: Tensor
) -> Tensor:
    """``z`` (B, dim) moved towards the mode of p(z_cell | x) by damped Newton steps.

    The prior of z_cell is N(prior_mean, diag prior_variance), (B, dim) each; the variance may also be (dim,).
    """
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


def refined(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    mean: Tensor,
    precision: Tensor,
    prior_mean: Tensor,
    prior_variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean (B, dim) and precision (B, dim, dim) of a Gaussian, moved towards the one that is closest to p(z_cell | x)
    in Kullback-Leibler divergence.

    The prior of z_cell is N(prior_mean, diag prior_variance), (B, dim) each.
    """
    x, precision_before = module.counts(section, rows), torch.diag_embed(1 / prior_variance)
    half = torch.randn(AVERAGED // 2, 1, mean.shape[1], generator=torch.Generator().manual_seed(0)).to(mean.device)
    noise = torch.cat([half, -half]).expand(-1, len(mean), -1)

    def points(root: Tensor, mean: Tensor) -> Tensor:
        return mean + spread(root, noise)

    def bound_of(mean: Tensor, precision: Tensor) -> Tensor:
        root = torch.linalg.cholesky(precision)
        likelihood = [module.log_likelihood(section, rows, x, point) for point in points(root, mean)]
        variance = torch.cholesky_inverse(root).diagonal(dim1=1, dim2=2)
        off = ((mean - prior_mean) ** 2 + variance) / prior_variance
        return torch.stack(likelihood).mean(0) - 0.5 * off.sum(1) - root.diagonal(dim1=1, dim2=2).log().sum(1)

    bound = bound_of(mean, precision)
    for _ in range(STEPS):
        curvature, gradient = torch.zeros_like(precision), torch.zeros_like(mean)
        for point in points(torch.linalg.cholesky(precision), mean):
            found, linear = expanded(module, section, rows, point)
            curvature += found / AVERAGED
            gradient += (linear - (found @ point[..., None])[..., 0]) / AVERAGED
        goal = curvature + precision_before
        step = torch.linalg.solve(goal, gradient - (mean - prior_mean) / prior_variance)
        size = torch.ones_like(bound)
        for _ in range(HALVINGS + 1):
            moved = mean + size[:, None] * step
            curved = torch.lerp(precision, goal, size[:, None, None])
            value = bound_of(moved, curved)
            better = value > bound
            mean, bound = torch.where(better[:, None], moved, mean), torch.where(better, value, bound)
            precision = torch.where(better[:, None, None], curved, precision)
            size = torch.where(better, 0, size / 2)
            if not size.any():
                break
    return mean, precision


def blocks(module: SpatialModule, rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in blocks of ``block_size``."""
    return minibatches(rows, block_size(module))


def block_size(module: SpatialModule) -> int:
    """Number of rows whose slopes, and precisions for each type, have at most ``ENTRIES`` entries."""
    dim, parts = module.shape.n_cell, 1 + module.shape.n_types
    return max(ENTRIES // (dim * max(module.shape.n_genes, parts * dim)), 1)
