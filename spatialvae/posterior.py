r"""Posteriors with their structure: what the encoder states dimension by dimension, with all correlations.

The likelihood of each cell stands as a Gaussian with all correlations, of precision F_i and precision times mean h_i.
With the slopes J = d log mu / d z and the Fisher information w of a count about its log mean,

    F = E J' diag(w) J,   h = F E z + E J' (x - mu) w / mu

at a point (Laplace's approximation, from the mode) or, from there, averaged over the posterior of the cell itself, that
of the Gaussian that is closest to it (Opper & Archambeau 2009): a posterior that knows that slopes change is not as
narrow. Steps are halved for each cell until they raise its bound, whose expectations are over the same few draws each
time. Logits of additional zeros add what is known of them: it is not seen which zeros these are, and what is missing is
subtracted from what all would tell (Louis 1982).

Of which type a cell is (``celltypes``) is expressed by ``Link``: z_cell given z_niche is N(c z_niche + o, E), with the
moments that the mixture has given the shares of the cell in its parts. Integrating z_cell out then gives the niche of
cell i the precision c^2 (1 + F E)^-1 F and the linear term c (1 + F E)^-1 (h - F o), of the first D dimensions. (E^-1 -
E^-1 (F + E^-1)^-1 E^-1 is the same, but rounds to nothing where E is small.) To these the type adds what it says of the
niche by its frequency there. Given the niche z_cell is Gaussian with precision F + E^-1, so that both latents of a
whole section can be drawn together; draws of z_cell are then moved to p(z_cell | z_niche, x) itself (``hamiltonian``).
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
from spatialvae.errors import InputError
from spatialvae.field import draws, posterior_covariance, solve
from spatialvae.hamiltonian import moved
from spatialvae.mixture import Mixture
from spatialvae.module import LEAST_DEPTH, Section, Sites, Space, SpatialModule

ENTRIES = 2**21  # slopes (cell, gene, dim) or precisions (cell, type, dim, dim) that are held at a time
NEWTON_STEPS = 3
HALVINGS = 3  # factor for a step that does not raise the posterior density, or the bound
ROUNDS = 2  # of niches given cells and cells given niches
AVERAGED, STEPS = 8, 2  # draws that slopes are averaged over, in pairs; steps in a round
WEIGHED, WIDER = 64, 1.2  # importance samples that widths are compared with; their sd in units of the Gaussian's
VARIANCE_DRAWS = 20  # of the niche: only a small part of its variance is not known exactly


@dataclass(frozen=True, eq=False)
class Link:
    """z_cell given z_niche is N(``gain`` z_niche + ``offset``, diag ``own``); (cell, 1) and twice (cell, dim)."""

    gain: Tensor
    offset: Tensor
    own: Tensor

    def of(self, index: Tensor) -> Link:
        return Link(self.gain[index], self.offset[index], self.own[index])

    def mean(self, niche: Tensor) -> Tensor:
        """Of z_cell (..., cell, dim) in ``niche`` (..., cell, D)."""
        return self.gain * F.pad(niche, (0, self.own.shape[1] - niche.shape[-1])) + self.offset

    def variance(self, niche_variance: Tensor) -> Tensor:
        """Of z_cell (cell, dim) where z_niche has ``niche_variance`` (cell, D)."""
        return self.own + self.gain**2 * F.pad(niche_variance, (0, self.own.shape[1] - niche_variance.shape[1]))


@dataclass(frozen=True, eq=False)
class Expansion:
    """Of a section: ``precision`` (cell, dim, dim) and ``linear`` (cell, dim) of the likelihood of z_cell, its ``link``
    to z_niche, and what counts say of z_niche: ``weight`` (cell, D, D), its precision, and ``target`` (cell, D),
    precision times mean."""

    precision: Tensor
    linear: Tensor
    link: Link
    weight: np.ndarray
    target: np.ndarray


@torch.no_grad()
def expansion(module: SpatialModule, section: Section, sites: Sites) -> Expansion:
    """Of all cells of a section, from what ``sites`` say in place of their likelihoods."""
    niche, device, own = module.solve(section.space, sites), module.mean.device, module.log_residual.exp().cpu()
    (n, d), dim, mean = niche.mean.shape, len(own), niche.mean
    said = 1 / (own[:d] + (-sites.log_precision[:, :d]).exp())
    outside = torch.maximum(1 / niche.variance - said, 1 / module.niche_variance.cpu())  # precision that others give
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
    """``precision`` (B, dim, dim) and ``linear`` (B, dim) of the likelihoods of ``rows`` found anew, where z_cell has
    the mean and variance ``prior`` (B, dim) before; ``climb``: from the mode."""
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
    """Independent ``noise`` (..., B, dim) of unit variance as draws of a Gaussian of mean 0, ``root`` (B, dim, dim)
    being the Cholesky factor of its precision."""
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
    """The factor (B, 1, 1), at most 1, for what the likelihood adds to ``precision``: of distances from ``mean`` in the
    directions that it tells of, the mean square under N(``mean``, ``precision``^-1) over that of p(z_cell | x), from
    importance samples. The closest Gaussian is narrower than what it stands for."""
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
    """The moments of z_cell given z_niche, at ``niche`` (B, D), of cells that have ``share`` (B, part) in each part."""
    own, types, alone = module.log_residual.exp(), module.types, share[:, :1]
    at, of_type = F.pad(niche, (0, len(own) - niche.shape[1])), share[:, 1:]
    offset = of_type @ types.mean
    mean = alone * at + offset
    square = alone * (own + at**2) + of_type @ (types.variance + types.mean**2)
    return Link(alone, offset, torch.maximum(square - mean**2, LEAST_SHARE * own))


def log_evidence_of_parts(before: Mixture, precision: Tensor, linear: Tensor) -> Tensor:
    """Log weight of each part times the integral of exp(-z'Fz / 2 + h'z) over it, (B, part)."""
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
    """What cells say of z_niche, around ``niche`` (B, D): weight (B, D, D) and target (B, D) of ``Expansion``."""
    d, outer = niche.shape[1], precision * link.own[:, None] + torch.eye(len(linear[0]), device=linear.device)
    rest = linear - (precision @ link.offset[..., None])[..., 0]
    found = torch.linalg.solve(outer, torch.cat([precision, rest[..., None]], -1))[:, :d]
    weight, target = link.gain[..., None] ** 2 * found[..., :d], link.gain * found[..., -1]
    if module.shape.n_types and d:
        slope, of_type = module.types.slope, share[:, 1:]
        size = of_type.sum(1, keepdim=True).clamp(min=1e-12)
        frequent = module.types.log_frequency(niche).exp()
        known = size[..., None] * (_covariance(frequent, slope) - _covariance(of_type / size, slope))
        values, vectors = torch.linalg.eigh(known)  # less than nothing is not known
        known = vectors @ (values.clamp(min=0)[..., None] * vectors.mT)
        weight = weight + known
        target = target + (known @ niche[..., None])[..., 0] + (of_type - size * frequent) @ slope
    return 0.5 * (weight + weight.mT), target


def _covariance(share: Tensor, slope: Tensor) -> Tensor:
    """(B, D, D) of rows of ``slope`` (type, D) that are picked with probabilities ``share`` (B, type)."""
    mean = share @ slope
    return torch.einsum("bk,kd,ke->bde", share, slope, slope) - mean[:, :, None] * mean[:, None]


@torch.no_grad()
def posterior(
    module: SpatialModule, section: Section, sites: Sites, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and variance of z_niche (cell, D) and of z_cell (cell, dim), from what ``sites`` lead to."""
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
        pulled = (given * (link.gain / link.own)[:, None])[..., :d]  # by z_niche
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
    """Draws from the posterior of a section: parts of ``rows``, z_niche (sample, row, D) and z_cell (sample, row, dim)
    of them.

    All cells of a draw belong to one draw of the whole section: what neighbours share is in it. ``found``, its
    ``expansion``, is made if it is not given.
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
    """Draws of ``z_cell`` given those of ``niche``, (sample, row, dim) each, moved to p(z_cell | niche, x); ``root``
    (row, dim, dim) of the precision of the Gaussian that they come from."""
    x, device = module.counts(section, rows), module.mean.device

    def log_density(z: Tensor, prior: Mixture) -> Tensor:
        return module.log_likelihood(section, rows, x, z) + prior.log_density(z[:, None])[:, 0]

    priors = (module.cells_within(here.to(device)) for here in niche)
    pairs = zip(z_cell.to(device), priors, strict=True)
    return torch.stack([moved(partial(log_density, prior=prior), z, root.to(device), generator) for z, prior in pairs])


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
    """F (B, dim, dim) and h (B, dim) of the likelihood of ``rows`` expanded at ``z`` (B, dim)."""
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
        counted = torch.where(x > 0, counted, torch.sigmoid(none - logit_zero))  # that a zero is not an additional one
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


def refined(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    mean: Tensor,
    precision: Tensor,
    prior_mean: Tensor,
    prior_variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """The Gaussian N(``mean``, ``precision``^-1) of z_cell, (B, dim) and (B, dim, dim), moved towards the one that is
    closest to p(z_cell | x), z_cell ~ N(prior_mean, diag prior_variance) before: (B, dim) each."""
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
    """``rows`` in parts whose slopes, and precisions given each type, fit into memory."""
    dim, parts = module.shape.n_cell, 1 + module.shape.n_types
    return minibatches(rows, max(ENTRIES // (dim * max(module.shape.n_genes, parts * dim)), 1))
