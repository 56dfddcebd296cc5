r"""Types of cells: how z_cell is distributed, given z_niche and by itself.

While networks and field are trained z_cell is Gaussian around z_niche. But cells are of types, and where half of them
are interneurons no mean says so. Afterwards a share of the cells belongs to K types that are the same at all places;
which of them are frequent depends on the niche, where they lie does not:

    p(z_cell | z_niche) = (1 - a) N(z_niche, S) + a sum_k pi_k(z_niche) N(t_k, V_k),   pi(n) = softmax(b + B n)

A cell whose niche is not known has the same types with pi averaged over niches, and one that is somewhere in a Gaussian
niche, with pi averaged over that: all are mixtures of K + 1 parts (``around``), and belong to one model.

a, b, B, t and V maximise the mean of log p(x_i) and of log p(x_i | others), where the field says what is expected at
the place of a cell before its own counts are looked at: a composite likelihood (Lindsay 1988). Expectation and
maximisation take turns: p(x_i | z) is held fixed as weighted draws (``evidence.drawn``), and slopes B ascend by steps
that never lower a multinomial likelihood (Boehning 1992). Cells that the training held out decide when to stop, and
whether there are types at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialvae.mixture import Mixture

NODES = 64  # points of a niche that pi is averaged over, in pairs; the same for all cells

TYPES = 20  # at most; more than a section has cost little: their weights fall
CELLS_OF_TYPE = 20  # on average, at least: a small table has fewer types
PRIOR_CELLS = 5.0  # of one Gaussian's variance, that each type's is shrunk by, and of slopes of 0
LEAST_SHARE = 0.02  # of one Gaussian's variance, of a type
MOST_STEPS = 50
LEAST_GAIN = 1e-3  # of the evidence in a step, in nats a cell
SLOPE_STEPS = 3  # for each step of the others
FIT_NODES = 8  # points of a niche while types are fitted

Gaussian = tuple[Tensor, Tensor]  # mean and variance, (cell, D) each, or (1, D) where they are the same for all


@dataclass(frozen=True, eq=False)
class Types:
    """``share`` (), a; ``bias`` (type,) and ``slope`` (type, D), b and B; ``mean`` and ``variance`` (type, dim)."""

    share: Tensor
    bias: Tensor
    slope: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of_sizes(cls, n_types: int, n_niche: int, n_cell: int) -> Self:
        """To be filled from a file; without types ``share`` is 0."""
        zeros = torch.zeros(n_types, n_cell)
        return cls(torch.zeros(()), torch.zeros(n_types), torch.zeros(n_types, n_niche), zeros, zeros + 1)

    def log_frequency(self, niche: Tensor) -> Tensor:
        """log pi (..., type) in ``niche`` (..., D)."""
        return torch.log_softmax(self.bias + niche @ self.slope.T, -1)

    def log_frequency_around(self, niche: Gaussian, nodes: int = NODES) -> Tensor:
        """log pi (B, type) averaged over a Gaussian ``niche``."""
        return self.log_frequency(points_of(*niche, nodes)).logsumexp(1) - math.log(nodes)

    def around(self, niche: Gaussian, own: Tensor) -> Mixture:
        """How z_cell is distributed, (B, 1 + type, dim), in a Gaussian ``niche``; ``own`` (dim,) is S. The first part
        is the one around the niche."""
        return self._beside(around_niche(niche, own), self.log_frequency_around(niche))

    def within(self, niche: Tensor, own: Tensor) -> Mixture:
        """As ``around``, in a known ``niche`` (B, D)."""
        return self._beside(around_niche((niche, torch.zeros_like(niche)), own), self.log_frequency(niche))

    def _beside(self, alone: Mixture, log_frequency: Tensor) -> Mixture:
        """The types, of ``log_frequency`` (B, type), beside the part around the niche."""
        if not len(self.bias):
            return alone
        n, log_of_types = len(alone.mean), self.share.log() + log_frequency
        pairs = (alone.mean, self.mean), (alone.variance, self.variance)
        parts = (torch.cat([one, many.expand(n, -1, -1)], 1) for one, many in pairs)
        return Mixture(torch.cat([torch.log1p(-self.share).expand(n, 1), log_of_types], 1), *parts)


def around_niche(niche: Gaussian, own: Tensor) -> Mixture:
    """N(z_niche, S), (B, 1, dim), in a Gaussian ``niche``; ``own`` (dim,) is S."""
    mean, variance = (F.pad(value, (0, len(own) - value.shape[1])) for value in niche)
    return Mixture.gaussian(mean, variance + own)


def points_of(mean: Tensor, variance: Tensor, number: int) -> Tensor:
    """Points (B, point, D) of Gaussians, in pairs on either side of their means; the same draws each time."""
    half = torch.randn(number // 2, mean.shape[1], generator=torch.Generator().manual_seed(0)).to(mean.device)
    return mean[:, None] + variance.sqrt()[:, None] * torch.cat([half, -half])


@dataclass(frozen=True, eq=False)
class Observed:
    """Of cells: ``z`` (cell, draw, dim) with the logarithms of their weights, ``log_weight`` (cell, draw), and what may
    be known of their ``niches`` before."""

    z: Tensor
    log_weight: Tensor
    niches: tuple[Gaussian, ...]

    def parts(self, types: Types, own: Tensor) -> list[Tensor]:
        """Log weight and density of the parts of z_cell at each draw, (cell, draw, 1 + type), for each of niches."""
        n, draws, dim = self.z.shape
        flat = self.z.reshape(1, -1, dim)
        here = Mixture(torch.zeros_like(types.bias)[None], types.mean[None], types.variance[None])
        of_types = here.log_parts(flat).reshape(n, draws, -1) + types.share.log()
        found = []
        for niche in self.niches:
            z = flat if len(niche[0]) == 1 else self.z
            alone = around_niche(niche, own).log_density(z).reshape(n, draws, 1) + torch.log1p(-types.share)
            found.append(torch.cat([alone, of_types + types.log_frequency_around(niche, FIT_NODES)[:, None]], 2))
        return found

    def log_p(self, parts: list[Tensor]) -> float:
        """Mean log p(x) over cells and niches, in nats."""
        each = [torch.logsumexp(self.log_weight + part.logsumexp(2), 1).mean() for part in parts]
        return float(torch.stack(each).mean()) - math.log(self.z.shape[1])

    def shares(self, parts: Tensor) -> Tensor:
        """Share of each cell that is in each of its draws and in each of ``parts``: (cell, draw, part)."""
        in_draw = torch.softmax(self.log_weight + parts.logsumexp(2), 1)
        return torch.softmax(parts, 2) * in_draw[..., None]


@torch.no_grad()
def fit(cells: Observed, judged: Observed, own: Tensor, seed: int) -> Types:
    """Types of ``cells`` that explain those ``judged`` best; none if they are explained no better than without types.
    ``own`` (dim,) is S."""
    (n, _, dim), n_niche = cells.z.shape, cells.niches[0][0].shape[1]
    found = Types.of_sizes(0, n_niche, dim)
    best = judged.log_p(judged.parts(found, own))
    niche = cells.niches[0][0]
    variance = own + F.pad(((niche - niche.mean(0)) ** 2).mean(0), (0, dim - n_niche))
    now = _first(cells, cells.parts(found, own), variance, max(min(TYPES, n // CELLS_OF_TYPE), 1), seed)
    before = -math.inf
    for _ in range(MOST_STEPS):
        now = _maximised(cells, now, [cells.shares(parts) for parts in cells.parts(now, own)], variance)
        value = judged.log_p(judged.parts(now, own))
        if value > best:
            best, found = value, now
        if value < before + LEAST_GAIN:
            break
        before = value
    return found


def _first(cells: Observed, alone: list[Tensor], variance: Tensor, number: int, seed: int) -> Types:
    """Clusters of the cells' posterior means without types, as frequent at all places; half of each cell is of them."""
    from sklearn.cluster import KMeans

    from spatialvae.analysis import equal_rows_allowed

    in_draw = cells.shares(alone[0])
    means = (cells.z * in_draw).sum(1)
    with equal_rows_allowed():
        label = KMeans(number, n_init=1, random_state=seed).fit_predict(means.cpu().numpy())
    of_type = F.one_hot(torch.from_numpy(label).long().to(means.device), number)[:, None]
    started = Types.of_sizes(number, cells.niches[0][0].shape[1], len(variance))
    halves = torch.cat([in_draw / 2, in_draw / 2 * of_type], 2)
    return _maximised(cells, started, [halves] * len(cells.niches), variance)


def _maximised(cells: Observed, before: Types, shares: list[Tensor], variance: Tensor) -> Types:
    """Types with the greatest expected log density, of ``shares`` (cell, draw, 1 + type) for each of niches; variances
    are shrunk to ``variance`` (dim,)."""
    n, draws, dim = cells.z.shape
    z, of_type = cells.z.reshape(-1, dim), torch.stack(shares).mean(0)[..., 1:].reshape(n * draws, -1)
    size = of_type.sum(0)[:, None]
    mean = of_type.T @ z / size.clamp(min=1e-6)
    scatter = of_type.T @ z**2 - size * mean**2
    shrunk = (scatter + PRIOR_CELLS * variance) / (size + PRIOR_CELLS)
    bias, slope = _ascended(cells.niches, before, [share[..., 1:].sum(1) for share in shares])
    return Types((size.sum() + 1) / (n + 2), bias, slope, mean, torch.maximum(shrunk, LEAST_SHARE * variance))


def _ascended(niches: tuple[Gaussian, ...], types: Types, shares: list[Tensor]) -> tuple[Tensor, Tensor]:
    """b and B after a few steps towards the frequencies ``shares`` (cell, type) for each of ``niches``."""
    points = [F.pad(points_of(*niche, FIT_NODES), (1, 0), value=1.0) for niche in niches]  # (cell, point, 1 + D)
    shares = [share.sum(0, keepdim=True) if len(x) == 1 else share for x, share in zip(points, shares, strict=True)]
    prior = PRIOR_CELLS * points[0].var((0, 1), correction=0).diag()
    prior[0, 0] = 1.0
    now = torch.cat([types.bias[:, None], types.slope], 1)
    for _ in range(SLOPE_STEPS):
        slope, bend = -now @ prior, prior.clone()
        for x, share in zip(points, shares, strict=True):
            frequency = torch.softmax(x @ now.T, -1)
            here = frequency / frequency.sum(1, keepdim=True) * share[:, None]  # of a cell, at each point
            size = here.sum(2, keepdim=True)
            slope += torch.einsum("cpk,cpd->kd", here - size * frequency, x)
            bend += torch.einsum("cpd,cpe->de", size * x, x) / 2
        now = now + torch.linalg.solve(bend, slope.T).T
    return now[:, 0] - now[:, 0].mean(), now[:, 1:]
