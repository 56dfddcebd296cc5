"""Linear initialisation of the model: directions of log counts, effects of batches, and the field of the directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from spatialvae.batches import batch_shifts, gene_effects
from spatialvae.counts import column_sums
from spatialvae.data import Cells, Graphs
from spatialvae.encoder import FIRST_PRECISION
from spatialvae.errors import InputError
from spatialvae.field import Field, fit_field, laplacian_of, solve, spatial_directions

DENSE_GENES = 3000  # largest number of genes for which the full covariance is computed
LEAST_VARIANCE = 1e-6  # smallest variance of a component relative to the first: smaller ones are rounding errors
POWER_STEPS = 4  # of the randomised decomposition (Halko, Martinsson & Tropp 2011)
OVERSAMPLED = 10
CORRECTIONS = 2  # of counts: types, and with them effects, are found better in corrected counts


@dataclass(frozen=True, eq=False)
class LinearStart:
    """Initial values of the network.

    ``scale`` and ``mean`` (gene,) define y = log(1 + scale x / depth) - mean, where counts x are divided by the factors
    of their batch on genes, exp ``effect`` (batch, gene), and depth is their sum. ``encode`` (gene, dim) maps y to
    latents of unit variance, ``decode`` (gene, dim) maps latents to y. ``shift`` (batch, dim) is the position of each
    batch.
    ``own`` (dim,) is the variance of z_cell around z_niche; ``left`` the mean over genes of the variance that the
    latents do not explain; ``share`` (gene,) each gene's share of all counts, or of all molecules with a measurement
    model.
    """

    scale: float
    mean: np.ndarray
    encode: np.ndarray
    decode: np.ndarray
    shift: np.ndarray
    own: np.ndarray
    left: float
    share: np.ndarray
    field: Field | None
    effect: np.ndarray


def corrected(cells: Cells, effect: np.ndarray) -> Iterator[tuple[slice, sp.csr_array, np.ndarray]]:
    """Iterate over blocks of rows, their counts divided by exp ``effect`` (batch, gene), sparse float32 (row, gene),
    and the sums of these (row,)."""
    factor = np.exp(-effect).astype(np.float32)
    for rows, block in cells.counts.blocks():
        depth = cells.depth[rows]
        if len(effect) > 1:
            block.data *= factor[np.repeat(cells.batches[rows], np.diff(block.indptr)), block.indices]
            depth = block.sum(1)
        yield rows, block, depth


def log_normalised(cells: Cells, scale: float, effect: np.ndarray) -> Iterator[tuple[slice, sp.csr_array]]:
    """Iterate over blocks of rows and log(1 + scale x / depth) of ``corrected`` counts, sparse float32 (row, gene)."""
    for rows, block, depth in corrected(cells, effect):
        factor = (scale / np.maximum(depth, 1)).astype(np.float32)
        block.data = np.log1p(block.data * np.repeat(factor, np.diff(block.indptr)))
        yield rows, block


def fit_components(
    cells: Cells, n_components: int, effect: np.ndarray, seed: int = 0
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """PCA of cells with counts, from the covariance of genes, or, for many genes, by a randomised decomposition.

    Returns scale, mean (gene,), loadings (gene, component) with orthonormal columns, and the remaining variance per
    gene.

    Raises InputError if all cells have the same composition.
    """
    n, genes = int((cells.depth > 0).sum()), cells.counts.n_genes
    k = min(n_components, genes - 1, n - 1)
    depth = np.concatenate([depth for _, _, depth in corrected(cells, effect)])
    scale = float(np.median(depth[depth > 0]))
    full = genes <= DENSE_GENES
    mean, squares, products = np.zeros(genes), 0.0, np.zeros((genes, genes) if full else 0)
    for _, logs in log_normalised(cells, scale, effect):
        mean += column_sums(logs) / n
        squares += float((logs.data.astype(float) ** 2).sum()) / n
        if full:
            dense = logs.toarray()
            products += dense.T @ dense
    total = squares - float(mean @ mean)
    if full:
        values, vectors = np.linalg.eigh(products / n - np.outer(mean, mean))
        values, loadings = values[::-1][:k], vectors[:, ::-1][:, :k]
    else:
        values, loadings = _leading(cells, scale, effect, mean, k, seed)
    if not total > 1e-9 * squares:
        raise InputError(f"all {n} cells with counts have the same composition of {genes} genes: nothing to model")
    k = max(int((values > LEAST_VARIANCE * values[0]).sum()), 1)
    loadings = loadings[:, :k] * np.sign(loadings[np.abs(loadings[:, :k]).argmax(0), np.arange(k)])
    return scale, mean, loadings, max(total - float(values[:k].sum()), 1e-6 * total) / genes


def _leading(
    cells: Cells, scale: float, effect: np.ndarray, mean: np.ndarray, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``k`` variances and principal directions (gene, k) of the centred logs, by subspace iteration."""
    n, genes = int((cells.depth > 0).sum()), len(mean)
    width = min(k + OVERSAMPLED, genes, n)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((genes, width)))[0]
    for _ in range(POWER_STEPS):
        image = np.zeros((genes, width))
        for _, logs in log_normalised(cells, scale, effect):
            image += logs.T @ (logs @ basis)
        image = image / n - np.outer(mean, mean @ basis)
        basis = np.linalg.qr(image)[0]
    inner = np.zeros((width, width))
    for _, logs in log_normalised(cells, scale, effect):
        seen = logs @ basis
        inner += seen.T @ seen
    values, turn = np.linalg.eigh(inner / n - np.outer(mean @ basis, mean @ basis))
    return values[::-1][:k], basis @ turn[:, ::-1][:, :k]


def fit_linear(cells: Cells, graphs: Graphs | None, n_components: int, max_niche: int, seed: int = 0) -> LinearStart:
    """Fit principal components, effects of batches, directions of unit variance and the field of those that vary in
    space.

    At most ``n_components`` directions are used, and at most ``max_niche`` of them for z_niche.
    """
    return _fitted(cells, graphs, n_components, max_niche, seed)[0]


def niche_latents(cells: Cells, graphs: Graphs, n_components: int, max_niche: int, seed: int = 0) -> np.ndarray:
    """Posterior means (cell, dim) of those dimensions of z_cell that vary in space, in a linear model of the log counts
    of ``cells``.

    Effects of samples are removed like those of batches: samples have cell types and domains in common, each with its
    own frequencies.
    """
    groups = groups_of(cells)
    names = tuple(map(str, range(groups.max() + 1)))
    start, y = _fitted(replace(cells, batches=groups, batch_names=names), graphs, n_components, max_niche, seed)
    field = start.field
    assert field is not None
    d = len(field.chosen)
    target, own = y[:, :d], start.own[:d]
    precision = np.where(cells.depth > 0, FIRST_PRECISION, 0.0)[:, None]
    weight = field.smooth * precision / (1 + own * precision)
    niche = solve(laplacian_of(graphs.near), np.full(d, field.range), weight, weight * target)
    return niche + own * precision / (1 + own * precision) * (target - niche)


def groups_of(cells: Cells) -> np.ndarray:
    """The combination of sample and batch of each cell, int64 (cell,) from 0."""
    return np.unique(np.c_[cells.samples, cells.batches], axis=0, return_inverse=True)[1].ravel()


def _fitted(
    cells: Cells, graphs: Graphs | None, n_components: int, max_niche: int, seed: int
) -> tuple[LinearStart, np.ndarray]:
    """The initial values, and the latents (cell, dim) of all cells, without their prior."""
    there, n_batch = cells.depth > 0, len(cells.batch_names)
    effect = np.zeros((n_batch, cells.counts.n_genes))
    for left_to_do in range(CORRECTIONS if n_batch > 1 else 0, -1, -1):
        scale, mean, loadings, left = fit_components(cells, n_components, effect, seed)
        scores = np.empty((cells.n_cells, loadings.shape[1]))
        for rows, logs in log_normalised(cells, scale, effect):
            scores[rows] = logs @ loadings - mean @ loadings
        shift, found = batch_shifts(scores[there], cells.batches[there], n_batch, seed)
        if left_to_do:
            types = np.zeros((cells.n_cells, found.shape[1]), np.float32)
            types[there] = found
            effect = gene_effects(cells.counts, cells.batches, n_batch, types)
    scores -= shift[cells.batches]
    wide = None if graphs is None else graphs.wide.adjacency()
    scores = _imputed(scores, there, wide)
    scores -= scores.mean(0)
    directions = spatial_directions(scores, wide)
    y = scores @ directions
    own, field = y.var(0) + 1e-8, None
    order = np.arange(y.shape[1])
    if graphs is not None:
        field = fit_field(y, laplacian_of(graphs.near), max_niche)
        own[field.chosen] = field.rough * field.rough_spread + field.noise
        order = np.r_[field.chosen, np.setdiff1d(order, field.chosen)]
    shares = cells.counts.of_genes() + 0.5
    shares = shares / shares.sum()
    encode, decode = loadings @ directions, loadings @ np.linalg.inv(directions).T
    start = LinearStart(
        scale,
        mean,
        encode[:, order],
        decode[:, order],
        (shift @ directions)[:, order],
        own[order],
        left,
        shares if cells.measurement is None else cells.measurement.share_there(shares),
        field,
        effect,
    )
    return start, y[:, order]


def _imputed(scores: np.ndarray, there: np.ndarray, neighbours: sp.csr_array | None) -> np.ndarray:
    """``scores`` with those of cells without counts replaced by the mean of their neighbours with counts, or zero."""
    if there.all():
        return scores
    scores = np.where(there[:, None], scores, 0)
    if neighbours is not None:
        known = np.maximum(neighbours @ there.astype(float), 1)
        scores[~there] = ((neighbours @ scores) / known[:, None])[~there]
    return scores
