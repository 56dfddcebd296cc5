r"""The model, on tensors.

For cell i, gene g and latent dimension d::

    z_niche_.d ~ N(0, v_d (1 + r_d L)^-1)              a smooth field over the cells of a section
    z_cell_id  ~ N(z_niche_id, S_d), d <= D            the cell, given its niche
    z_cell_id  ~ N(0, S_d), d > D                      dimensions that do not vary in space
    x_ig       ~ pi_ig [x = 0] + (1 - pi_ig) NB(l_i rho_ig / (1 - pi_ig), theta_g)
                                                       rho_i = softmax(decoder(z_cell_i, s_i))
                                                       logit pi_i linear in (z_cell_i, s_i)

L is the Laplacian of the neighbour graph, l_i the total count and s_i the batch; pi is 0 except for "zinb". Latent
dimensions are directions of unit variance, those that vary most in space first; z_niche is the smooth part of the first
D. ``LinearStart`` gives the initial values and the parameters of the field, with one range r for all dimensions.

After training, v, r and S are fitted again (``niche_prior``), and a share of the cells is assigned to cell types, whose
frequencies depend on the niche, instead of N(z_niche, S) (``celltypes``). What follows is the approximate posterior of
the evidence lower bound.

The encoder approximates the likelihood of each cell by a Gaussian N(t_i; z_cell_i, 1 / Lambda_i). Given these, the
posterior of both latents is Gaussian and exact. With g_id = 1 / (S_d + 1 / Lambda_id)::

    z_niche_.d | t ~ N(m_d, P_d^-1),   P_d = (1 + r_d L) / v_d + diag(g_d),   P_d m_d = g_d t_d

a sparse system that is solved for a whole section by conjugate gradients (``SpatialModule.solve``); z_cell given
z_niche is a product of Gaussians for each cell. Training alternates between the niches given the encoder and the
networks given the niches. ``spatialvae.posterior`` computes the posterior of the full model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from spatialvae import likelihoods, loss
from spatialvae.batches import batch_shifts
from spatialvae.celltypes import Types
from spatialvae.data import Cells, Graphs, minibatches
from spatialvae.decoder import Decoder
from spatialvae.encoder import CellEncoder, combined, log_normalised
from spatialvae.field import Measure, laplacian_of, solve, trace_measure
from spatialvae.linear import LinearStart
from spatialvae.measurement import Measurement
from spatialvae.mixture import Mixture

ROWS_AT_ONCE = 2048
UNSEEN = -80.0  # logit of a gene that was not measured: float32 still represents its share
NOTHING = -30.0  # log precision of the likelihood of a cell without counts
GRID = 200  # weights for which the precision from other cells is computed; others are interpolated
LEAST_DEPTH = 1e-6  # replaces a total count of zero: every likelihood is then one


@dataclass(frozen=True)
class Shape:
    """Sizes and options that determine the shapes of the parameters."""

    n_genes: int
    n_batch: int
    n_cell: int
    n_niche: int
    n_hidden: int
    likelihood: str
    linear_decoder: bool = False
    n_types: int = 0


@dataclass(frozen=True, eq=False)
class Niche:
    """Posterior of z_niche of all cells of a section: ``mean`` and ``variance`` (cell, D), and ``divergence`` (cell,),
    each cell's contribution to the divergence from the prior, in nats."""

    mean: Tensor
    variance: Tensor
    divergence: Tensor


@dataclass(frozen=True, eq=False)
class Space:
    """The graph of the field: its ``laplacian`` (cell, cell) and the ``measure`` of its trace (``field.Measure``)."""

    laplacian: sp.csr_array
    measure: Measure


@dataclass(frozen=True, eq=False)
class Section:
    """A table in the form that the model uses. ``depth`` float32 (cell,), total counts; ``batch`` int64 (cell,).
    ``fill`` predicts the log counts of missing genes from those of measured genes: weight (measured, missing) and
    constant (missing,). ``measurement``: detection efficiencies and wrong calls, if modelled."""

    cells: Cells
    graphs: Graphs | None
    space: Space | None
    depth: Tensor
    batch: Tensor
    fill: tuple[Tensor, Tensor] | None
    measurement: Measurement | None


@dataclass(frozen=True, eq=False)
class Sites:
    """Gaussian approximation to the likelihoods of z_cell: ``target`` and ``log_precision`` (cell, dim)."""

    target: Tensor
    log_precision: Tensor


class SpatialModule(nn.Module):
    """All parameters, and the buffers needed to embed a new section."""

    scale: Tensor
    mean: Tensor
    decode: Tensor
    left: Tensor
    share: Tensor
    range: Tensor
    smooth_variance: Tensor
    spread: Tensor

    def __init__(self, shape: Shape, start: LinearStart | None = None) -> None:
        """Without ``start``, parameters and buffers get placeholders of the right shapes, to be loaded from a file."""
        super().__init__()
        self.shape = shape
        start = start or _blank_start(shape)
        field = start.field
        given: dict[str, np.ndarray | float] = {
            "scale": start.scale,
            "mean": start.mean,
            "decode": start.decode,
            "left": start.left,
            "share": start.share,
            "range": np.full(shape.n_niche, field.range if field else 0.0),
            "smooth_variance": field.smooth if field else np.ones(shape.n_niche),
            "spread": np.full(shape.n_niche, field.spread if field else 1.0),
        }
        for name, value in given.items():
            self.register_buffer(name, _tensor(value))
        self.set_types(Types.of_sizes(shape.n_types, shape.n_niche, shape.n_cell))
        self.log_residual = nn.Parameter(_tensor(start.own).log())
        self.log_theta = nn.Parameter(torch.ones(shape.n_genes))
        encode = _tensor(start.encode)
        self.cell_encoder = CellEncoder(encode.T, -self.mean @ encode, _tensor(start.shift), shape.n_hidden)
        hidden = None if shape.linear_decoder else shape.n_hidden
        zeros = shape.likelihood == "zinb"
        self.decoder = Decoder(self.decode, _tensor(start.effect), self.share.log(), hidden, zeros)

    def section(self, cells: Cells, graphs: Graphs | None) -> Section:
        """Prepare everything that does not depend on trained parameters."""
        space = None if graphs is None or not self.shape.n_niche else self.space(graphs)
        fill = self._fill(torch.from_numpy(cells.missing)) if cells.missing.any() else None
        depth = torch.from_numpy(np.maximum(cells.depth, np.float32(LEAST_DEPTH)))
        return Section(cells, graphs, space, depth, torch.from_numpy(cells.batches), fill, cells.measurement)

    def space(self, graphs: Graphs) -> Space:
        """The graph of the field. A cell without neighbours gets the mean prior variance of a cell in the field (on
        average over dimensions, if their ranges differ)."""
        laplacian = laplacian_of(graphs.near)
        excess = float(((1 / self.spread - 1) / self.range.clamp(min=1e-12)).mean())
        alone = np.where(laplacian.diagonal() == 0, excess, 0.0)
        laplacian = sp.csr_array(laplacian + sp.diags_array(alone))
        return Space(laplacian, trace_measure(laplacian))

    @torch.no_grad()
    def _fill(self, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional mean of the log counts of genes ``missing`` (gene,) given the others', in the linear model
        y = mean + decode u + noise, u ~ N(0, 1): the weight (seen, missing) and the constant (missing,)."""
        decode, mean = self.decode.double(), self.mean.double()
        missing = missing.to(mean.device)
        seen = decode[~missing]
        inner = torch.eye(decode.shape[1], dtype=decode.dtype, device=decode.device) + seen.T @ seen / self.left
        weight = seen @ torch.linalg.solve(inner, decode[missing].T) / self.left
        return weight.float(), (mean[missing] - mean[~missing] @ weight).float()

    def counts(self, section: Section, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(section.cells.counts.dense(rows)).to(self.mean.device)

    def encoded(self, section: Section, rows: np.ndarray, x: Tensor) -> tuple[Tensor, Tensor]:
        """Target and log precision (B, dim) of the approximate likelihood of z_cell, from the counts ``x`` (B, gene)
        of ``rows``."""
        index = torch.from_numpy(rows)
        depth, batch = section.depth[index].to(x.device), section.batch[index].to(x.device)
        target, log_precision = self.cell_encoder(self.log_counts(section, rows, x), batch)
        return target, torch.where((depth > LEAST_DEPTH)[:, None], log_precision, NOTHING)

    def log_counts(self, section: Section, rows: np.ndarray, x: Tensor) -> Tensor:
        """Log-normalised counts (B, gene) of ``rows``, without the first estimate of the effects of batches on genes;
        genes that were not measured are filled in."""
        index, scale = torch.from_numpy(rows), self.scale
        depth = section.depth[index].to(x.device)
        if self.shape.n_batch > 1:
            x = x * (-self.decoder.effect).exp()[section.batch[index].to(x.device)]
            depth = x.sum(1)
        if section.fill is not None:
            missing = torch.from_numpy(section.cells.missing).to(x.device)
            share = self.share
            if section.measurement is not None:
                share = section.measurement.seen(share.log()).exp()
            scale = scale * share[~missing].sum()
        y = log_normalised(x, scale / depth.clamp(min=1))
        if section.fill is not None:
            weight, constant = (value.to(y.device) for value in section.fill)
            y[:, missing] = y[:, ~missing] @ weight + constant
        return y

    @torch.no_grad()
    def sites(self, section: Section) -> Sites:
        """The approximate likelihoods of all cells, on the CPU."""
        found = torch.empty(2, section.cells.n_cells, self.shape.n_cell)
        for rows in minibatches(np.arange(section.cells.n_cells), ROWS_AT_ONCE):
            for out, value in zip(found, self.encoded(section, rows, self.counts(section, rows)), strict=True):
                out[torch.from_numpy(rows)] = value.cpu()
        return Sites(found[0], found[1])

    @torch.no_grad()
    def solve(
        self,
        space: Space | None,
        sites: Sites,
        known: np.ndarray | None = None,
        start: Tensor | None = None,
    ) -> Niche:
        """Posterior of z_niche of all cells, given the ``sites`` of the cells that are ``known``, bool (cell,), all by
        default. ``start`` (cell, D) is the initial guess of the mean.

        The mean is exact up to ``field.TOLERANCE``. The variance is approximated with g averaged over the surroundings
        of each cell, the divergence with g averaged over all cells (``spatialvae.posterior`` computes the variance more
        accurately).
        """
        n = len(sites.target)
        if space is None:
            return Niche(torch.empty(n, 0), torch.empty(n, 0), torch.zeros(n))
        weight, target, v, r = self._system(sites, known)
        first = None if start is None else start.numpy()
        mean = solve(space.laplacian, r, weight, weight * target, first)
        nodes, shares = space.measure
        prior = 1 + np.outer(nodes, r)
        after = prior + weight.mean(0)
        alone = np.asarray(space.laplacian.sum(1)).reshape(-1, 1) > 0
        others = _precision_from_others(space, prior, weight, r)
        variance = v / (np.where(alone, 1 / self.spread.cpu().numpy(), others) + weight)
        entropy = shares @ (prior / after - 1 + np.log(after / prior))
        energy = mean * (mean + r * (space.laplacian @ mean)) / v
        divergence = 0.5 * (energy + entropy).sum(1)
        return Niche(*(torch.from_numpy(np.asarray(a, np.float32)) for a in (mean, variance, divergence)))

    def _system(self, sites: Sites, known: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """v g and t, (cell, D) each, of the system for z_niche; v and r, (D,) each."""
        d = self.shape.n_niche
        own = self.log_residual.detach().exp()
        v, r = (value.cpu().double().numpy() for value in (self.smooth_variance, self.range))
        weight = v / (own[:d].cpu().double().numpy() + np.exp(-sites.log_precision[:, :d].double().numpy()))
        if known is not None:
            weight = np.where(known[:, None], weight, 0.0)
        return weight, sites.target[:, :d].double().numpy(), v, r

    @torch.no_grad()
    def cells_given(self, sites: Sites, niche: Niche) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (cell, dim) of z_cell, including the uncertainty of ``niche``."""
        own = self.log_residual.exp().cpu()
        prior_mean = self.prior_of_cells(niche.mean)[0]
        mean, log_variance = combined(sites.target, sites.log_precision, prior_mean, own)
        variance = log_variance.exp()
        d = self.shape.n_niche
        variance[:, :d] += (variance[:, :d] / own[:d]) ** 2 * niche.variance
        return mean, variance

    def means(self, section: Section) -> tuple[Tensor, Tensor]:
        """Posterior means of z_niche (cell, D) and z_cell (cell, dim), on the CPU."""
        sites = self.sites(section)
        niche = self.solve(section.space, sites)
        return niche.mean, self.cells_given(sites, niche)[0]

    @torch.no_grad()
    def recentre(self, mean: Tensor) -> None:
        """Subtract ``mean`` (dim,) from z_cell and shift encoder and decoder by it: p(x | z_cell) does not change."""
        self.cell_encoder.first.bias[: self.shape.n_cell].sub_(mean)
        for layer in (self.decoder.hidden, self.decoder.out, self.decoder.zero):
            if layer is not None:
                layer.bias.add_(layer.weight[:, : self.shape.n_cell] @ mean)

    @torch.no_grad()
    def align(self, section: Section) -> None:
        """Subtract the shifts of batches (``batches``) from z_cell, without changing p(x | z_cell). The data do not
        determine them in dimensions that hardly change expression, and the field does not penalise a constant."""
        z = self.means(section)[1].double().numpy()
        shift = _tensor(batch_shifts(z - z.mean(0), section.cells.batches, self.shape.n_batch)[0]).to(self.mean.device)
        self.cell_encoder.shift.add_(shift)
        self.decoder.origin.add_(shift)

    @torch.no_grad()
    def rescale(self, scale: Tensor) -> None:
        """Multiply z_niche and z_cell by ``scale`` (dim,), without changing p(x). Types must not have been set."""
        n, encoder, decoder = self.shape.n_cell, self.cell_encoder, self.decoder
        for value in (encoder.first.weight, encoder.out.weight):
            value[:n] *= scale[:, None]
        for value in (encoder.first.bias, encoder.out.bias, encoder.shift.T, decoder.origin.T):
            value[:n] *= scale if value.ndim == 1 else scale[:, None]
        encoder.out.bias[n:] -= 2 * scale.log()
        for layer in (decoder.hidden, decoder.out, decoder.zero):
            if layer is not None:
                layer.weight[:, :n] /= scale
        self.log_residual.add_(2 * scale.log())
        self.smooth_variance.mul_(scale[: self.shape.n_niche] ** 2)

    def drop_types(self) -> None:
        """Make z_cell Gaussian given z_niche, as it is during training."""
        self.set_types(Types.of_sizes(0, self.shape.n_niche, self.shape.n_cell))

    def set_types(self, types: Types) -> None:
        """Set the cell types, which define p(z_cell | z_niche)."""
        self.shape = replace(self.shape, n_types=len(types.bias))
        for name, value in vars(types).items():
            self.register_buffer(f"type_{name}", value.to(self.mean.device))

    @property
    def types(self) -> Types:
        return Types(**{name: getattr(self, f"type_{name}") for name in Types.__annotations__})

    def cells_around(self, niche_mean: Tensor, niche_variance: Tensor) -> Mixture:
        """Distribution of z_cell, (B, component, dim), if z_niche is Gaussian with mean and variance (B, D)."""
        return self.types.around((niche_mean, niche_variance), self.log_residual.exp())

    def cells_within(self, niche: Tensor) -> Mixture:
        """Distribution of z_cell given ``niche`` (B, D)."""
        return self.types.within(niche, self.log_residual.exp())

    def unknown_niche(self, n_cells: int) -> tuple[Tensor, Tensor]:
        """Prior mean and variance (cell, D) of z_niche of single cells."""
        variance = self.niche_variance.expand(n_cells, -1)
        return torch.zeros_like(variance), variance

    def prior_of_cells(self, niche_mean: Tensor, niche_variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (B, dim) and variance (B, dim) of z_cell without types if z_niche is Gaussian, (B, D) each; the variance
        is (dim,) for a known niche."""
        own, rest = self.log_residual.exp(), self.shape.n_cell - niche_mean.shape[1]
        mean = nn.functional.pad(niche_mean, (0, rest))
        return mean, own if niche_variance is None else own + nn.functional.pad(niche_variance, (0, rest))

    @property
    def niche_variance(self) -> Tensor:
        """Prior variance (D,) of z_niche of a single cell: v spread."""
        return self.smooth_variance * self.spread

    @property
    @torch.no_grad()
    def cell_variance(self) -> Tensor:
        """Prior variance (dim,) of z_cell of a single cell, without types: v spread + S (S where d > D)."""
        return self.prior_of_cells(self.niche_variance[None], self.niche_variance[None])[1][0]

    def logits(self, section: Section, rows: np.ndarray, z_cell: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of each gene's share of the counts of ``rows``, and logits of additional zeros or None, (B, gene)."""
        logits, logit_zero = self.decoder(z_cell, section.batch[torch.from_numpy(rows)].to(z_cell.device))
        if section.measurement is not None:
            logits = section.measurement.seen(logits)
        return logits, logit_zero

    def slopes(self, section: Section, rows: np.ndarray, z_cell: Tensor) -> tuple[Tensor, Tensor | None]:
        """Derivatives of ``logits`` with respect to ``z_cell`` (B, dim): (B, gene, dim) each."""
        batch = section.batch[torch.from_numpy(rows)].to(z_cell.device)
        slopes, of_zero = self.decoder.slopes(z_cell, batch)
        if section.measurement is not None:
            slopes = section.measurement.slopes(self.decoder(z_cell, batch)[0], slopes)
        return slopes, of_zero

    def measured(self, section: Section, logits: Tensor) -> Tensor:
        """``logits`` with those of genes that were not measured set so low that their share is zero."""
        if section.fill is None:
            return logits
        return logits.masked_fill(torch.from_numpy(section.cells.missing).to(logits.device), UNSEEN)

    def log_mean(self, section: Section, rows: np.ndarray, logits: Tensor, logit_zero: Tensor | None) -> Tensor:
        """Log mean (B, gene) of the Poisson or NB distribution of the counts. Those of measured genes sum to the total
        count; those of missing genes are on the same scale. With zero inflation it is the mean before additional zeros,
        scaled so that the expected counts still sum to the total."""
        total = self.measured(section, logits).logsumexp(-1, keepdim=True)
        log_mean = logits - total + section.depth[torch.from_numpy(rows)].to(logits.device).log()[:, None]
        return log_mean if logit_zero is None else log_mean + nn.functional.softplus(logit_zero)

    @property
    def bounded_log_theta(self) -> Tensor:
        """Log inverse dispersion (gene,) as the likelihoods use it."""
        return self.log_theta.clamp(-8, 10)

    def log_likelihood(self, section: Section, rows: np.ndarray, x: Tensor, z_cell: Tensor) -> Tensor:
        """log p(x | z_cell) of ``rows``, (B,), in nats: of the measured genes, given their total count."""
        depth = section.depth[torch.from_numpy(rows)].to(x.device)
        logits, logit_zero = self.logits(section, rows, z_cell)
        logits = self.measured(section, logits)
        if self.shape.likelihood == "poisson":
            return likelihoods.poisson(x, self.log_mean(section, rows, logits, logit_zero))
        return likelihoods.negative_binomial_of_logits(x, logits, depth, self.bounded_log_theta, logit_zero)

    def noise(self, n_cells: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers for one draw of both latents, (cell, D + dim)."""
        return torch.randn(n_cells, self.shape.n_niche + self.shape.n_cell, generator=generator)

    def terms(self, section: Section, rows: np.ndarray, niche: Niche, noise: Tensor) -> loss.Terms:
        """The three terms of the bound for ``rows``, with one draw of each latent from ``noise`` (row, D + dim)."""
        device, index = self.mean.device, torch.from_numpy(rows)
        niche_noise, cell_noise = noise.to(device).split([self.shape.n_niche, self.shape.n_cell], 1)
        z_niche = niche.mean[index].to(device) + niche.variance[index].sqrt().to(device) * niche_noise
        x = self.counts(section, rows)
        prior_mean, _ = self.prior_of_cells(z_niche)
        mean, log_variance = combined(*self.encoded(section, rows, x), prior_mean, self.log_residual.exp())
        z_cell, kl_cell = loss.draw_cell(mean, log_variance, prior_mean, self.log_residual, cell_noise)
        if self.shape.n_types:  # the divergence from a mixture has no closed form: it is estimated from the same draw
            log_q = Mixture.gaussian(mean, log_variance.exp()).log_density(z_cell[:, None])
            prior = self.cells_within(z_niche)
            kl_cell = (log_q - prior.log_density(z_cell[:, None]))[:, 0]
        likelihood = self.log_likelihood(section, rows, x, z_cell)
        return loss.Terms(likelihood, kl_cell, niche.divergence[index].to(device), mean)


def _precision_from_others(space: Space, prior: np.ndarray, weight: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Precision of z_niche from other cells, relative to 1 / v, float64 (cell, D), from ``prior`` (node, D), 1 + r L at
    the nodes of ``space.measure``, and the data ``weight`` (cell, D).

    It is exact, in the mean over cells, if all weights are equal. Here they are averaged with the correlation of the
    posterior under their mean, so that cells far from all data keep the variance of the prior.
    """
    shares = space.measure[1]
    local = solve(space.laplacian, r / (1 + weight.mean(0)), np.zeros_like(weight), weight)
    found = np.empty_like(local)
    for d in range(weight.shape[1]):
        grid = np.append(0, np.geomspace(1e-3, 1e-3 + max(local[:, d].max(), 1e-3), GRID))
        found[:, d] = np.interp(local[:, d], grid, 1 / (shares @ (1 / (prior[:, d, None] + grid))) - grid)
    return found


def _tensor(value: np.ndarray | float) -> Tensor:
    return torch.tensor(np.array(value, np.float32, order="C"))


def _blank_start(shape: Shape) -> LinearStart:
    g, c = shape.n_genes, shape.n_cell
    return LinearStart(
        1.0,
        np.zeros(g),
        np.zeros((g, c)),
        np.zeros((g, c)),
        np.zeros((shape.n_batch, c)),
        np.ones(c),
        1.0,
        np.ones(g),
        None,
        np.zeros((shape.n_batch, g)),
    )
