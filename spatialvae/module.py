r"""The model: tensors in, tensors out.

    z_niche_.d ~ N(0, v_d (1 + r L)^-1)            a smooth field over the cells of a section, for each dimension d
    z_cell_i   ~ N(A z_niche_i, diag S)            what the cell is, given where it sits
    x_ig       ~ NB(l_i rho_ig, theta_g)           rho_i = softmax(decoder(z_cell_i, z_niche_i, s_i))

l_i is the total count, s_i the batch. Everything linear is given by ``LinearStart``, so that before the first step of
training the posterior means are principal components and what the field and the neighbourhood say of the niche.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spatialvae import likelihoods, loss
from spatialvae.data import Cells, Graphs, with_neighbours
from spatialvae.decoder import Decoder
from spatialvae.encoder import CellEncoder, NicheEncoder, log_normalised
from spatialvae.field import Field, laplacian_of
from spatialvae.linear import Components, LinearStart

LOG_2PI = math.log(2 * math.pi)
PROPOSAL_WIDTH = 1.3  # sd of importance samples in units of q's, which the bound makes too narrow
LIKELIHOODS = ("nb", "zinb", "poisson")


@dataclass(frozen=True)
class Shape:
    """Sizes that fix the parameters."""

    n_genes: int
    n_batch: int
    n_cell: int
    n_niche: int
    n_hidden: int
    likelihood: str


@dataclass(frozen=True, eq=False)
class Section:
    """A table as the model reads it: counts stay sparse, the rest are tensors over cells.

    ``features`` (cell, F), of which ``smooth`` (cell, D) of ``Field.niche`` is the end; ``wide`` and ``near`` int32
    (cell, slot), -1 where empty; ``distance`` (cell, slot of wide), log(1 + d / median d); ``scratch`` of
    ``data.with_neighbours``.
    """

    cells: Cells
    depth: Tensor
    batch: Tensor
    features: Tensor
    smooth: Tensor
    wide: Tensor
    distance: Tensor
    near: Tensor
    scratch: np.ndarray


@dataclass(frozen=True, eq=False)
class Posterior:
    """Means and log variances, (cell, dim)."""

    cell_mean: Tensor
    cell_log_variance: Tensor
    niche_mean: Tensor
    niche_log_variance: Tensor


class SpatialModule(nn.Module):
    """All parameters, and the buffers that a new section needs to be embedded."""

    scale: Tensor
    mean: Tensor
    loadings: Tensor
    batch_mean: Tensor
    directions: Tensor
    range: Tensor
    smooth_variance: Tensor
    rough_variance: Tensor
    noise_variance: Tensor
    gain: Tensor
    doubt: Tensor
    own: Tensor
    log_det: Tensor
    spread: Tensor
    score_sd: Tensor

    def __init__(self, shape: Shape, start: LinearStart | None = None, log_share: np.ndarray | None = None) -> None:
        """Without ``start`` the module is made of zeros of the right shapes, to be filled from a file."""
        super().__init__()
        self.shape = shape
        n, c, d = shape.n_genes, shape.n_cell, shape.n_niche
        start = start or _blank_start(shape)
        parts, field = start.components, start.field
        given = {
            "scale": np.array(parts.scale),
            "mean": parts.mean,
            "loadings": parts.loadings,
            "batch_mean": parts.batch_mean,
            "directions": field.directions if field else np.zeros((c, 0)),
            "range": np.array(field.range if field else 0.0),
            "smooth_variance": field.smooth if field else np.zeros(0),
            "rough_variance": field.rough if field else np.zeros(0),
            "noise_variance": field.noise if field else np.zeros(0),
            "gain": field.gain if field else np.zeros(0),
            "doubt": field.doubt if field else np.zeros(0),
            "own": field.own if field else np.zeros(0),
            "log_det": np.array(start.log_det),
            "spread": np.array(start.spread),
            "score_sd": np.sqrt(start.residual + 1e-8),
        }
        for name, value in given.items():
            self.register_buffer(name, torch.tensor(np.asarray(value), dtype=torch.float32))
        residual = torch.tensor(start.residual, dtype=torch.float32)
        loadings = torch.tensor(parts.loadings)
        self.niche_to_cell = nn.Parameter(torch.tensor(start.niche_to_cell, dtype=torch.float32))
        self.log_residual = nn.Parameter(residual.log())
        self.log_theta = nn.Parameter(torch.ones(n))
        shares = torch.zeros(n) if log_share is None else torch.tensor(log_share, dtype=torch.float32)
        self.cell_encoder = CellEncoder(
            loadings.T, -torch.tensor(parts.mean) @ loadings, (0.1 * residual).log(), shape.n_hidden
        )
        self.decoder = Decoder(loadings, shares, d, shape.n_batch, shape.n_hidden, shape.likelihood == "zinb")
        self.niche_encoder = NicheEncoder(c + d, self._niche_log_variance(), shape.n_hidden) if d else None

    def _niche_log_variance(self) -> Tensor:
        """log of the best independent posterior variance in the linear model, for a cell with 7 neighbours."""
        prior = (1 + 7 * self.range) / self.smooth_variance.clamp(min=1e-6)
        seen = (self.niche_to_cell.detach() ** 2 / self.log_residual.detach().exp()[:, None]).sum(0)
        return -(prior + seen).log()

    def section(self, cells: Cells, graphs: Graphs | None) -> Section:
        """Project ``cells``, filter them on their graph, and lay everything out for gathers."""
        components = Components(
            float(self.scale), *(b.cpu().numpy() for b in (self.mean, self.loadings, self.batch_mean))
        )
        n, c = cells.n_cells, self.shape.n_cell
        features = np.zeros((n, c + self.shape.n_niche), np.float32)
        features[:, :c] = components.scores(cells)
        wide = near = np.empty((n, 0), np.int32)
        distance = np.empty((n, 0), np.float32)
        if graphs is not None and self.shape.n_niche:
            laplacian = laplacian_of(graphs.near.adjacency())
            features[:, c:] = self.field().niche(laplacian, graphs.wide.adjacency(), features[:, :c])
            wide, near = graphs.wide.index, graphs.near.index
            there = np.isfinite(graphs.wide.distance)
            middle = np.median(graphs.wide.distance[there]) if there.any() else 1.0
            distance = np.where(there, graphs.wide.distance, np.float32(0))
            distance = np.log1p(distance / np.float32(max(float(middle), 1e-12)))
        features[:, :c] /= self.score_sd.cpu().numpy()
        arrays = cells.depth, cells.batches, features, features[:, c:], wide, distance, near
        return Section(cells, *map(torch.from_numpy, arrays), scratch=np.full(n, -1, np.int32))  # type: ignore[arg-type, misc]

    def field(self) -> Field:
        """The field as arrays."""
        values = (self.smooth_variance, self.rough_variance, self.noise_variance, self.gain, self.doubt, self.own)
        return Field(
            self.directions.cpu().numpy().astype(float),
            float(self.range),
            *(v.cpu().numpy().astype(float) for v in values),
        )

    def counts(self, section: Section, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(section.cells.counts.dense(rows)).to(self.mean.device)

    def infer_cell(self, x: Tensor, depth: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """q(z_cell) of counts (B, gene)."""
        mean, log_variance = self.cell_encoder(log_normalised(x, self.scale / depth))
        return mean - self.batch_mean[batch], log_variance

    def infer_niche(self, section: Section, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """q(z_niche) of ``rows`` (B,)."""
        device = self.mean.device
        if self.niche_encoder is None:
            empty = torch.zeros(len(rows), 0, device=device)
            return empty, empty
        nodes, slots = (torch.from_numpy(a) for a in with_neighbours(rows, section.wide.numpy(), section.scratch))
        index = nodes[: len(rows)]
        gathered = section.smooth[index], section.features[nodes], slots, section.distance[index]
        return self.niche_encoder(*(g.to(device) for g in gathered))

    def infer(self, section: Section, rows: np.ndarray) -> Posterior:
        """Posteriors of ``rows``."""
        index = torch.from_numpy(rows)
        device = self.mean.device
        cell = self.infer_cell(
            self.counts(section, rows), section.depth[index].to(device), section.batch[index].to(device)
        )
        return Posterior(*cell, *self.infer_niche(section, rows))

    def log_likelihood(self, x: Tensor, depth: Tensor, batch: Tensor, z_cell: Tensor, z_niche: Tensor) -> Tensor:
        """log p(x | z), (B,)."""
        logits, logit_zero = self.decoder(z_cell, z_niche, batch)
        log_theta = self.log_theta.clamp(-8, 10)
        if self.shape.likelihood == "nb":
            return likelihoods.negative_binomial_of_logits(x, logits, depth, log_theta)
        log_mu = torch.log_softmax(logits, -1) + depth.log()[:, None]
        if logit_zero is not None:
            return likelihoods.zero_inflated_negative_binomial(x, log_mu, log_theta, logit_zero)
        return likelihoods.poisson(x, log_mu)

    def noise(self, n_cells: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers for one draw of both latents, (cell, niche and cell dimensions)."""
        return torch.randn(n_cells, self.shape.n_niche + self.shape.n_cell, generator=generator)

    def terms(self, section: Section, rows: np.ndarray, noise: Tensor) -> loss.Terms:
        """The three terms of the bound for ``rows``, with one draw of each latent made of ``noise`` (see ``noise``).

        A neighbour that several rows share is encoded once.
        """
        device = self.mean.device
        index = torch.from_numpy(rows)
        niche_noise, cell_noise = noise.to(device).split([self.shape.n_niche, self.shape.n_cell], 1)
        z_niche, niche_kl, niche_mean = self._draw_niche(section, rows, niche_noise)
        x = self.counts(section, rows)
        depth, batch = section.depth[index].to(device), section.batch[index].to(device)
        inferred = self.infer_cell(x, depth, batch)
        z_cell, cell_kl = loss.draw_cell(*inferred, z_niche @ self.niche_to_cell.T, self.log_residual, cell_noise)
        likelihood = self.log_likelihood(x, depth, batch, z_cell, z_niche)
        return loss.Terms(likelihood, cell_kl, niche_kl, inferred[0], niche_mean)

    def _draw_niche(self, section: Section, rows: np.ndarray, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_niche (B, D), its divergence (B,) and its posterior mean of ``rows``."""
        if self.niche_encoder is None:
            return noise, noise.new_zeros(len(rows)), noise
        nodes, slots = with_neighbours(rows, section.near.numpy(), section.scratch)
        prior = self.smooth_variance, self.range, self.log_det
        near = torch.from_numpy(slots).to(noise.device)
        inferred = self.infer_niche(section, nodes)
        return *loss.draw_niche(*inferred, near, *prior, noise), inferred[0][: len(rows)]

    @property
    def niche_variance(self) -> Tensor:
        """Variance (dim,) of z_niche at a cell in the prior, its neighbours unknown: v spread."""
        return self.smooth_variance * self.spread

    @property
    @torch.no_grad()
    def cell_variance(self) -> Tensor:
        """Variance (dim,) of z_cell in the prior, whatever the niche: the diagonal of A diag(v spread) A' + S."""
        return self.niche_to_cell**2 @ self.niche_variance + self.log_residual.exp()

    def niche_given(self, mean: Tensor, variance: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Prior mean and variance of z_niche (B, D) given its neighbours' posterior ``mean`` and ``variance``
        (B, K, D); ``present`` (B, K). The field's conditional; without neighbours the marginal prior N(0, v spread).
        """
        there = present[..., None].to(mean.dtype)
        degree = there.sum(1)
        own = 1 + self.range * degree
        pull = self.range / own
        centre = pull * (mean * there).sum(1)
        spread = self.smooth_variance / own + pull**2 * (variance * there).sum(1)
        return centre, torch.where(degree > 0, spread, self.niche_variance)

    def marginal_log_likelihood(
        self,
        x: Tensor,
        depth: Tensor,
        batch: Tensor,
        samples: int,
        generator: torch.Generator | None = None,
        niche: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        r"""log p(x_i) of cells, (B,), by importance sampling.

        z_niche_i ~ N(c_i, diag M_i), given as ``niche`` (two of shape (B, D)), by default the marginal prior, with
        which neighbours are unknown: c = 0, M = v spread. z_cell_i is therefore N(A c_i, A M_i A' + S). z_cell is drawn
        from r, which is q(z_cell | x) made wider, z_niche from its exact conditional given z_cell:

            log p(x) = log E_r [ p(x | z_cell, z_niche) p(z_cell) / r(z_cell) ]
        """
        mean, log_variance = self.infer_cell(x, depth, batch)
        log_variance = log_variance + 2 * math.log(PROPOSAL_WIDTH)
        a, residual = self.niche_to_cell, self.log_residual.exp()
        if niche is None:
            niche = torch.zeros(len(x), a.shape[1], device=x.device), self.niche_variance.expand(len(x), -1)
        centre, prior_variance = niche
        expected = centre @ a.T
        joint = torch.distributions.MultivariateNormal(expected, (a * prior_variance[:, None]) @ a.T + residual.diag())
        gain = (a / residual[:, None]).T  # A' S^-1
        conditional = torch.linalg.inv(torch.diag_embed(prior_variance.reciprocal()) + gain @ a)
        factor = torch.linalg.cholesky(conditional)
        weights = []
        for _ in range(samples):
            z_cell = _draw(mean, log_variance, generator)
            off = (z_cell - mean) ** 2 * (-log_variance).exp()
            log_q = -0.5 * (off + log_variance + LOG_2PI).sum(-1)
            noise = torch.randn(centre.shape, generator=generator).to(x.device)
            pulled = ((z_cell - expected) @ gain.T)[:, None] @ conditional
            z_niche = centre + pulled[:, 0] + (factor @ noise[..., None])[..., 0]
            likelihood = self.log_likelihood(x, depth, batch, z_cell, z_niche)
            weights.append(likelihood + joint.log_prob(z_cell) - log_q)
        return torch.logsumexp(torch.stack(weights), 0) - math.log(samples)


def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + noise * (0.5 * log_variance).exp()


def _blank_start(shape: Shape) -> LinearStart:
    g, c, d = shape.n_genes, shape.n_cell, shape.n_niche
    components = Components(
        1.0, np.zeros(g, np.float32), np.zeros((g, c), np.float32), np.zeros((shape.n_batch, c), np.float32)
    )
    ones = np.ones(d)
    field = Field(np.zeros((c, d)), 1.0, *[ones] * 6) if d else None
    return LinearStart(components, field, np.zeros((c, d)), np.ones(c), 0.0, 1.0)
