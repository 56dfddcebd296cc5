r"""Draws from a fitted model: expression and counts of measured cells, counts of genes that were not measured, and
new tissue::

    measured cells  z_niche, z_cell ~ p( . | all counts)    (``posterior.latent_draws``)
    new positions   z_niche ~ N(0, v (1 + r L)^-1), optionally given the counts of fixed cells;
                    z_cell ~ p( . | z_niche) (``celltypes``), or that of a cell of the table with a similar niche; or
                    both latents of the table's cells in a new arrangement (``arrangement``)
    both            x ~ p(x | z_cell, total count)          (``module``)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from spatialvae import likelihoods
from spatialvae.arrangement import arranged
from spatialvae.data import graphs_of, minibatches
from spatialvae.errors import InputError, check_count
from spatialvae.mixture import Mixture
from spatialvae.module import ROWS_AT_ONCE, Section, SpatialModule
from spatialvae.posterior import expansion, latent_draws, niche_draws

CANDIDATES = 30  # nearest cells of the table in z_niche, from one of which a new cell takes its z_cell
MOST_COMPARED = 5000  # cells of the table, from one of which a new cell takes its total count

Places = tuple[np.ndarray, np.ndarray]  # coordinates (cell, axis) and sample names (cell,)


@dataclass(frozen=True, eq=False)
class Imputed:
    """Imputed counts, float32 (cell, gene) each: the expected counts and the bounds of the predictive interval."""

    expected: np.ndarray
    low: np.ndarray
    high: np.ndarray


@torch.no_grad()
def expected_counts(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean counts (row, gene) given ``z`` (row, dim) and total counts, before zero inflation, and the probability of
    additional zeros, (row, gene) or (), 0, without zero inflation."""
    logits, logit_zero = module.logits(section, rows, z)
    zero = torch.zeros(()) if logit_zero is None else torch.sigmoid(logit_zero)
    return module.log_mean(section, rows, logits, logit_zero).exp(), zero


def draw_counts(
    module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor, rng: np.random.Generator
) -> np.ndarray:
    """One draw of the counts of ``rows``, int32 (row, gene), given ``z`` (row, dim) and total counts."""
    mean, zero = (value.cpu().double().numpy() for value in expected_counts(module, section, rows, z))
    theta = module.bounded_log_theta.detach().exp().cpu().double().numpy()
    poisson = module.shape.likelihood == "poisson"
    return likelihoods.sample(mean, None if poisson else theta, zero if zero.ndim else None, rng)


def predictive(
    module: SpatialModule, section: Section, rows: np.ndarray, n_samples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts drawn from the posterior predictive distribution of ``section``, in blocks of rows.

    Yields a part of ``rows`` and its counts, int32 (sample, row, gene).
    """
    rng = np.random.default_rng([seed, 1])
    for part, _, z_cell in latent_draws(module, section, rows, n_samples, seed):
        yield part, np.stack([draw_counts(module, section, part, z, rng) for z in z_cell])


@torch.no_grad()
def shares(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor, batch: int | None) -> np.ndarray:
    """Each gene's share of the molecules, before detection, float32 (row, gene), given ``z`` (row, dim); decoded as
    ``batch``, or as each cell's own batch if None."""
    codes = section.batch[torch.from_numpy(rows)] if batch is None else torch.full((len(rows),), batch)
    return torch.softmax(module.decoder(z, codes.to(z.device))[0], -1).cpu().numpy()


def expression(
    module: SpatialModule,
    section: Section,
    draws: Iterable[tuple[np.ndarray, Tensor]],
    library_size: float | None,
    batch: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Normalised expression, in blocks of rows: each gene's share times ``library_size``.

    If ``library_size`` is None, shares are multiplied by the cell's total count, or, with a measurement model, by its
    number of molecules before detection. ``draws`` yields rows and z_cell (sample, row, dim). Yields rows and float32
    (sample, row, gene).
    """
    for rows, z_cell in draws:
        share = np.stack([shares(module, section, rows, z, batch) for z in z_cell])
        size: np.ndarray | float = section.cells.depth[rows][:, None] if library_size is None else library_size
        if library_size is None and section.measurement is not None:
            size = section.measurement.there(share, section.cells.depth[rows])[..., None]
        yield rows, share * np.asarray(size, np.float32)


def impute(
    module: SpatialModule, section: Section, genes: np.ndarray, n_samples: int, interval: float, seed: int
) -> Imputed:
    """Impute the counts of ``genes`` (column,) in all cells, from ``n_samples`` posterior draws.

    The interval has probability ``interval`` and equal tails.
    """
    n, rng = section.cells.n_cells, np.random.default_rng([seed, 1])
    expected, low, high = np.zeros((3, n, len(genes)), np.float32)
    ends = [(1 - interval) / 2, (1 + interval) / 2]
    for rows, _, z_cell in latent_draws(module, section, np.arange(n), n_samples, seed):
        counts = np.empty((n_samples, len(rows), len(genes)), np.int32)
        for draw, z in zip(counts, z_cell, strict=True):
            mean, zero = expected_counts(module, section, rows, z)
            expected[rows] += (mean * (1 - zero)).cpu().numpy()[:, genes] / n_samples
            draw[:] = draw_counts(module, section, rows, z, rng)[:, genes]
        low[rows], high[rows] = np.quantile(counts, ends, axis=0, method="inverted_cdf")
    return Imputed(expected, low, high)


def joined_places(places: Places, others: Places) -> Places:
    """``places`` followed by ``others``. Raises InputError if their numbers of axes differ."""
    axes = places[0].shape[1], others[0].shape[1]
    if axes[0] != axes[1]:
        raise InputError(f"coordinates of {axes[0]} axes cannot be joined with coordinates of {axes[1]} axes")
    return np.concatenate([places[0], others[0]]), np.concatenate([places[1], others[1]])


def niches_at(
    module: SpatialModule,
    places: Places,
    n_samples: int,
    seed: int,
    given: tuple[Section, Places] | None = None,
) -> Tensor:
    """Draws of z_niche at ``places``, (sample, place, D), from the prior or given the counts of another section."""
    n, d = len(places[1]), module.shape.n_niche
    weight, target = np.zeros((n, d, d)), np.zeros((n, d))
    if given is not None:
        section, others = given
        found = expansion(module, section, module.sites(section))
        weight, target = np.concatenate([weight, found.weight]), np.concatenate([target, found.target])
        places = joined_places(places, others)
    return niche_draws(module, module.space(graphs_of(*places)), weight, target, n_samples, seed, np.arange(n))


def niches_alone(module: SpatialModule, n_cells: int, seed: int) -> Tensor:
    """Independent draws of z_niche from its prior at a single cell, (cell, D)."""
    noise = torch.randn(n_cells, module.shape.n_niche, generator=torch.Generator().manual_seed(seed))
    return noise * module.niche_variance.sqrt().cpu()


@torch.no_grad()
def cells_of_model(module: SpatialModule, niche: Tensor, seed: int) -> Tensor:
    """Draws of z_cell (..., cell, dim) from p(z_cell | z_niche), given ``niche`` (..., cell, D)."""
    generator = torch.Generator().manual_seed(seed + 1)
    parts = niche.flatten(0, -2).to(module.mean.device).split(ROWS_AT_ONCE)
    drawn = [module.cells_within(part).draw(1, generator)[0] for part in parts]
    return torch.cat(drawn).reshape(*niche.shape[:-1], module.shape.n_cell).to(module.mean.device)


def predictive_at(
    module: SpatialModule,
    section: Section,
    places: Places,
    rows: np.ndarray,
    n_samples: int,
    seed: int,
    given: tuple[Section, Places],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As ``predictive``, from the positions and total counts of ``rows`` and the counts of other cells, ``given``;
    all cells are drawn jointly."""
    here = places[0][rows], places[1][rows]
    z_cell = cells_of_model(module, niches_at(module, here, n_samples, seed, given), seed)
    rng = np.random.default_rng([seed, 1])
    for part in minibatches(np.arange(len(rows)), ROWS_AT_ONCE):
        yield rows[part], np.stack([draw_counts(module, section, rows[part], z[part], rng) for z in z_cell])


@torch.no_grad()
def predictive_of(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    n_samples: int,
    seed: int,
    expected: Callable[[np.ndarray], Mixture],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As ``predictive``, with z_cell of each cell drawn independently from the mixture ``expected(rows)``.

    Raises InputError if ``n_samples`` is less than 1.
    """
    check_count("n_samples", n_samples)
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    for part in minibatches(rows, ROWS_AT_ONCE):
        z_cell = expected(part).draw(n_samples, generator).to(module.mean.device)
        yield part, np.stack([draw_counts(module, section, part, z, rng) for z in z_cell])


def latents_of_table(module: SpatialModule, section: Section, seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Rows of the cells of ``section`` that have counts, and one draw of their posterior: z_niche (row, D) and z_cell
    (row, dim). These are a draw of the aggregate posterior (Tomczak & Welling 2018, who use it as a prior):
    unlike a Gaussian, it preserves the cell types of the section."""
    rows = np.flatnonzero(section.cells.depth > 0)
    drawn = [(niche[0].cpu(), z[0]) for _, niche, z in latent_draws(module, section, rows, 1, seed)]
    niche, z = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return rows, niche, z


def cells_of_table(module: SpatialModule, section: Section, niche: Tensor, seed: int) -> tuple[np.ndarray, Tensor]:
    """Rows (cell,) of cells of ``section`` for new cells in ``niche`` (cell, D), and their z_cell (cell, dim).

    Cell j of the section is picked with a probability proportional to the density at ``niche`` of N(z_niche_j, S), with
    z_niche_j of the same draw of the posterior. (Posterior means of z_niche are not used: they are shrunk more the
    fewer the counts, so that cells with few counts would be picked too rarely.)
    """
    rng = np.random.default_rng([seed, 2])
    rows, there, z = latents_of_table(module, section, seed)
    if niche.shape[1]:
        sd, k = (0.5 * module.log_residual[: niche.shape[1]]).exp().detach().cpu(), min(CANDIDATES, len(rows))
        distance, near = cKDTree((there / sd).numpy()).query((niche / sd).numpy(), k)
        distance, near = distance.reshape(len(niche), k), near.reshape(len(niche), k)
        chosen = near[np.arange(len(niche)), (rng.gumbel(size=near.shape) - 0.5 * distance**2).argmax(1)]
    else:
        chosen = rng.integers(len(rows), size=len(niche))
    return rows[chosen], z[torch.from_numpy(chosen)]


def table_rearranged(
    module: SpatialModule, section: Section, places: Places, seed: int
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Rows of the cells of ``section`` that are put at ``places``, with their z_niche (place, D) and z_cell (place,
    dim): a new arrangement of the section's cells, in which neighbours are as similar in z_cell and in the logarithm of
    the total count as in the section (``arrangement``)."""
    assert section.graphs is not None
    rows, niche, z = latents_of_table(module, section, seed)
    near = section.graphs.near[rows][:, rows]
    features = np.column_stack([z.cpu().numpy(), np.log(section.cells.depth[rows])]).astype(float)
    order = arranged(features, near, graphs_of(*places).near, np.random.default_rng([seed, 2]))
    index = torch.from_numpy(order)
    return rows[order], niche[index], z[index.to(z.device)]


def cells_like(module: SpatialModule, section: Section, z: Tensor, seed: int) -> np.ndarray:
    """For each row of ``z`` (cell, dim) the row of the nearest cell of ``section``, in units of the prior standard
    deviation of z_cell; among ``MOST_COMPARED`` random cells at most."""
    rows = np.flatnonzero(section.cells.depth > 0)
    rows = np.random.default_rng([seed, 4]).permutation(rows)[:MOST_COMPARED]
    there, sd = module.means(section)[1][rows], module.cell_variance.sqrt().cpu()
    return rows[cKDTree((there / sd).numpy()).query((z.cpu() / sd).numpy())[1]]


def as_if(section: Section, like: np.ndarray, depth: np.ndarray | None) -> Section:
    """The section of new cells, with the batches and total counts of the rows ``like`` (cell,) of ``section``, or with
    total counts ``depth`` (cell,). All genes are treated as measured.

    Raises InputError if ``depth`` has another shape, or is not positive and finite.
    """
    chosen = torch.from_numpy(like)
    size = section.depth[chosen]
    if depth is not None:
        try:
            size = torch.from_numpy(np.broadcast_to(np.asarray(depth, np.float32), (len(like),)).copy())
        except ValueError as error:
            raise InputError(f"library_size is not a number or one number for each of {len(like)} cells") from error
        if not (torch.isfinite(size).all() and (size > 0).all()):
            raise InputError("library_size must be positive and finite")
    return replace(section, depth=size, batch=section.batch[chosen], fill=None)
