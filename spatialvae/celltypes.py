r"""Cell types: a mixture model of z_cell, given z_niche and marginally.

While the networks and the field are trained, z_cell given z_niche is Gaussian. A Gaussian cannot describe a place where
half of the cells are, for example, interneurons. After training, a share a of the cells therefore belongs to K cell
types. The frequencies of the types depend on the niche; their means and variances do not:

    p(z_cell | z_niche) = (1 - a) N(z_niche, S) + a sum_k pi_k(z_niche) N(t_k, V_k),   pi(n) = softmax(b + B n)

If z_niche is not known exactly but has a Gaussian distribution, its prior or its posterior given other cells, pi is
averaged over that distribution; z_cell then is a mixture of K + 1 components (``around``).

a, b, B, t and V maximise the mean of log p(x_i) and log p(x_i | others), where the field predicts z_niche of a cell
from the counts of other cells: a composite likelihood (Lindsay 1988). It is maximised by EM, with p(x_i | z)
represented by fixed weighted draws (``evidence.drawn``). The slopes B are updated by steps that never lower a
multinomial likelihood (Boehning 1992). The held-out cells determine when to stop, and whether types are used at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialvae.mixture import Mixture

NODES = 64  # points at which pi is averaged over a Gaussian niche, in antithetic pairs; the same for all cells

TYPES = 20  # at most; superfluous types cost little: their weights become small
CELLS_OF_TYPE = 20  # on average, at least: a small table has fewer types
PRIOR_CELLS = 5.0  # pseudo-cells that shrink the variance of a type to that of a single Gaussian, and slopes to 0
LEAST_SHARE = 0.02  # smallest variance of a type, as a share of that of a single Gaussian
MOST_STEPS = 50
LEAST_GAIN = 1e-3  # of the evidence in an EM step, nats per cell
SLOPE_STEPS = 50  # per EM step; 3 lost 0.1 and 0.2 nats of log p(x | others) on BZ14 and on slice 10 of MOp
FIT_NODES = 8  # points of a niche while types are fitted

Gaussian = tuple[Tensor, Tensor]  # mean and variance, (cell, D) each, or (1, D) if they are the same for all cells


@dataclass(frozen=True, eq=False)
class Types:
    """``share`` (), a; ``bias`` (type,) and ``slope`` (type, D), b and B; ``mean`` and ``variance`` (type, dim)."""

    share: Tensor
    bias: Tensor
    slope: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of_sizes(cls, n_types: int, n_niche: int, n_cell: int, device: torch.device | None = None) -> Self:
        """Types of the given sizes on ``device``, with ``share`` 0, to be fitted or read from a file."""
        zeros = torch.zeros(n_types, n_cell, device=device)
        return cls(zeros.new_zeros(()), zeros.new_zeros(n_types), zeros.new_zeros(n_types, n_niche), zeros, zeros + 1)

    def log_frequency(self, niche: Tensor) -> Tensor:
        """log pi (..., type) given ``niche`` (..., D)."""
        return torch.log_softmax(self.bias + niche @ self.slope.T, -1)

    def log_frequency_around(self, niche: Gaussian, nodes: int = NODES) -> Tensor:
        """Log of pi averaged over a Gaussian ``niche``, (B, type)."""
        return self.log_frequency(points_of(*niche, nodes)).logsumexp(1) - math.log(nodes)

    def around(self, niche: Gaussian, own: Tensor) -> Mixture:
        """Distribution of z_cell, (B, 1 + type, dim), if z_niche has the Gaussian distribution ``niche``; ``own``
        (dim,) is S. The first component is that centred on the niche."""
        return self.beside(around_niche(niche, own), self.log_frequency_around(niche))

    def within(self, niche: Tensor, own: Tensor) -> Mixture:
        """As ``around``, for a known ``niche`` (B, D)."""
        return self.beside(around_niche((niche, torch.zeros_like(niche)), own), self.log_frequency(niche))

    def beside(self, alone: Mixture, log_frequency: Tensor) -> Mixture:
        """The mixture of ``alone``, the component centred on the niche, and types with ``log_frequency`` (B, type)."""
        if not len(self.bias):
            return alone
        n, log_of_types = len(alone.mean), self.share.log() + log_frequency
        pairs = (alone.mean, self.mean), (alone.variance, self.variance)
        parts = (torch.cat([one, many.expand(n, -1, -1)], 1) for one, many in pairs)
        return Mixture(torch.cat([torch.log1p(-self.share).expand(n, 1), log_of_types], 1), *parts)


def around_niche(niche: Gaussian, own: Tensor) -> Mixture:
    """N(z_niche, S) averaged over a Gaussian ``niche``, (B, 1, dim); ``own`` (dim,) is S."""
    mean, variance = (F.pad(value, (0, len(own) - value.shape[1])) for value in niche)
    return Mixture.gaussian(mean, variance + own)


def points_of(mean: Tensor, variance: Tensor, number: int) -> Tensor:
    """Points (B, point, D) drawn from Gaussians, in antithetic pairs; the same draws in every call."""
    half = torch.randn(number // 2, mean.shape[1], generator=torch.Generator().manual_seed(0)).to(mean.device)
    return mean[:, None] + variance.sqrt()[:, None] * torch.cat([half, -half])


@dataclass(frozen=True, eq=False)
class Observed:
    """Likelihoods of cells as draws ``z`` (cell, draw, dim) with log weights ``log_weight`` (cell, draw), and the
    distributions of ``niches``, without the cell's own counts, that the fit averages over."""

    z: Tensor
    log_weight: Tensor
    niches: tuple[Gaussian, ...]

    def parts(self, types: Types, own: Tensor) -> list[Tensor]:
        """Log of weight times density of each component at each draw, (cell, draw, 1 + type), for each niche."""
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
        """Mean log p(x) over cells and ``niches``, in nats."""
        each = [torch.logsumexp(self.log_weight + part.logsumexp(2), 1).mean() for part in parts]
        return float(torch.stack(each).mean()) - math.log(self.z.shape[1])

    def shares(self, parts: Tensor) -> Tensor:
        """Posterior probability of each draw and component, summing to 1 for each cell: (cell, draw, component)."""
        in_draw = torch.softmax(self.log_weight + parts.logsumexp(2), 1)
        return torch.softmax(parts, 2) * in_draw[..., None]


@torch.no_grad()
def fit(cells: Observed, judged: Observed, own: Tensor, seed: int) -> Types:
    """Fit types to ``cells`` by EM; return those of the step with the highest log p(x) of the cells ``judged``.

    Without an improvement over the model without types, no types are returned. ``own`` (dim,) is S.
    """
    (n, _, dim), n_niche = cells.z.shape, cells.niches[0][0].shape[1]
    found = Types.of_sizes(0, n_niche, dim, own.device)
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
    """Initial types: k-means clusters of the posterior means without types, with frequencies that do not depend on the
    niche; half of each cell's weight is assigned to its cluster."""
    from sklearn.cluster import KMeans

    from spatialvae.analysis import equal_rows_allowed

    in_draw = cells.shares(alone[0])
    means = (cells.z * in_draw).sum(1)
    with equal_rows_allowed():
        label = KMeans(number, n_init=1, random_state=seed).fit_predict(means.cpu().numpy())
    of_type = F.one_hot(torch.from_numpy(label).long().to(means.device), number)[:, None]
    started = Types.of_sizes(number, cells.niches[0][0].shape[1], len(variance), variance.device)
    halves = torch.cat([in_draw / 2, in_draw / 2 * of_type], 2)
    return _maximised(cells, started, [halves] * len(cells.niches), variance)


def _maximised(cells: Observed, before: Types, shares: list[Tensor], variance: Tensor) -> Types:
    """The M step, from ``shares`` (cell, draw, 1 + type) for each of the niches; variances are shrunk to ``variance``
    (dim,)."""
    n, draws, dim = cells.z.shape
    z, of_type = cells.z.reshape(-1, dim), torch.stack(shares).mean(0)[..., 1:].reshape(n * draws, -1)
    size = of_type.sum(0)[:, None]
    mean = of_type.T @ z / size.clamp(min=1e-6)
    scatter = of_type.T @ z**2 - size * mean**2
    shrunk = (scatter + PRIOR_CELLS * variance) / (size + PRIOR_CELLS)
    bias, slope = _ascended(cells.niches, before, [share[..., 1:].sum(1) for share in shares])
    return Types((size.sum() + 1) / (n + 2), bias, slope, mean, torch.maximum(shrunk, LEAST_SHARE * variance))


def _ascended(niches: tuple[Gaussian, ...], types: Types, shares: list[Tensor]) -> tuple[Tensor, Tensor]:
    """b and B after ``SLOPE_STEPS`` steps of the multinomial regression of ``shares`` (cell, type), one for each of
    ``niches``."""
    points = [F.pad(points_of(*niche, FIT_NODES), (1, 0), value=1.0) for niche in niches]  # (cell, point, 1 + D)
    shares = [share.sum(0, keepdim=True) if len(x) == 1 else share for x, share in zip(points, shares, strict=True)]
    prior = PRIOR_CELLS * points[0].var((0, 1), correction=0).diag()
    prior[0, 0] = 1.0
    now = torch.cat([types.bias[:, None], types.slope], 1)
    for _ in range(SLOPE_STEPS):
        slope, bend = -now @ prior, prior.clone()
        for x, share in zip(points, shares, strict=True):
            frequency = torch.softmax(x @ now.T, -1)
            here = frequency / frequency.sum(1, keepdim=True) * share[:, None]  # (cell, point, type)
            size = here.sum(2, keepdim=True)
            slope += torch.einsum("cpk,cpd->kd", here - size * frequency, x)
            bend += torch.einsum("cpd,cpe->de", size * x, x) / 2
        now = now + torch.linalg.solve(bend, slope.T).T
    return now[:, 0] - now[:, 0].mean(), now[:, 1:]
