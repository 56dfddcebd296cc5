"""Linear initialisation of the model: directions of log counts, batch shifts along them, and their spatial field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from spatialvae.batches import batch_shifts
from spatialvae.counts import Counts
from spatialvae.data import Cells, Graphs
from spatialvae.errors import InputError
from spatialvae.field import Field, fit_field, laplacian_of, spatial_directions

DENSE_GENES = 3000  # largest number of genes for which the full covariance is computed
LEAST_VARIANCE = 1e-6  # smallest variance of a component relative to the first: smaller ones are rounding errors
POWER_STEPS = 4  # of the randomised decomposition (Halko, Martinsson & Tropp 2011)
OVERSAMPLED = 10


@dataclass(frozen=True, eq=False)
class LinearStart:
    """Initial values of the network.

    ``scale`` and ``mean`` (gene,) define y = log(1 + scale x / depth) - mean. ``encode`` (gene, dim) maps y to latents
    of unit variance, ``decode`` (gene, dim) maps latents to y. ``shift`` (batch, dim) is the position of each batch.
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


def log_normalised(counts: Counts, scale: float) -> Iterator[tuple[slice, sp.csr_array]]:
    """Iterate over blocks of rows and their ``log(1 + scale x / depth)``, sparse float32 (row, gene)."""
    for rows, block in counts.blocks():
        factor = (scale / np.maximum(counts.depth[rows], 1)).astype(np.float32)
        block.data = np.log1p(block.data * np.repeat(factor, np.diff(block.indptr)))
        yield rows, block


def fit_components(cells: Cells, n_components: int, seed: int = 0) -> tuple[float, np.ndarray, np.ndarray, float]:
    """PCA of cells with counts, from the covariance of genes, or, for many genes, by a randomised decomposition.

    Returns scale, mean (gene,), loadings (gene, component) with orthonormal columns, and the remaining variance per
    gene.

    Raises InputError if all cells have the same composition.
    """
    n, genes = int((cells.depth > 0).sum()), cells.counts.n_genes
    k = min(n_components, genes - 1, n - 1)
    scale = float(np.median(cells.depth[cells.depth > 0]))
    full = genes <= DENSE_GENES
    mean, squares, products = np.zeros(genes), 0.0, np.zeros((genes, genes) if full else 0)
    for _, logs in log_normalised(cells.counts, scale):
        mean += logs.sum(0, dtype=float) / n
        squares += float((logs.data.astype(float) ** 2).sum()) / n
        if full:
            dense = logs.toarray()
            products += dense.T @ dense
    total = squares - float(mean @ mean)
    if full:
        values, vectors = np.linalg.eigh(products / n - np.outer(mean, mean))
        values, loadings = values[::-1][:k], vectors[:, ::-1][:, :k]
    else:
        values, loadings = _leading(cells, scale, mean, k, seed)
    if not total > 1e-9 * squares:
        raise InputError(f"all {n} cells with counts have the same composition of {genes} genes: nothing to model")
    k = max(int((values > LEAST_VARIANCE * values[0]).sum()), 1)
    loadings = loadings[:, :k] * np.sign(loadings[np.abs(loadings[:, :k]).argmax(0), np.arange(k)])
    return scale, mean, loadings, max(total - float(values[:k].sum()), 1e-6 * total) / genes


def _leading(cells: Cells, scale: float, mean: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``k`` variances and principal directions (gene, k) of the centred logs, by subspace iteration."""
    n, genes = int((cells.depth > 0).sum()), len(mean)
    width = min(k + OVERSAMPLED, genes, n)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((genes, width)))[0]
    for _ in range(POWER_STEPS):
        image = np.zeros((genes, width))
        for _, logs in log_normalised(cells.counts, scale):
            image += logs.T @ (logs @ basis)
        image = image / n - np.outer(mean, mean @ basis)
        basis = np.linalg.qr(image)[0]
    inner = np.zeros((width, width))
    for _, logs in log_normalised(cells.counts, scale):
        seen = logs @ basis
        inner += seen.T @ seen
    values, turn = np.linalg.eigh(inner / n - np.outer(mean @ basis, mean @ basis))
    return values[::-1][:k], basis @ turn[:, ::-1][:, :k]


def fit_linear(cells: Cells, graphs: Graphs | None, n_components: int, max_niche: int, seed: int = 0) -> LinearStart:
    """Fit principal components, batch shifts, directions of unit variance and the field of those that vary in space.

    At most ``n_components`` directions are used, and at most ``max_niche`` of them for z_niche.
    """
    scale, mean, loadings, left = fit_components(cells, n_components, seed)
    scores = np.empty((cells.n_cells, loadings.shape[1]))
    for rows, logs in log_normalised(cells.counts, scale):
        scores[rows] = logs @ loadings - mean @ loadings
    there = cells.depth > 0
    shift = batch_shifts(scores[there], cells.batches[there], len(cells.batch_names), seed)
    scores -= shift[cells.batches]
    wide = None if graphs is None else graphs.wide.adjacency()
    scores = _imputed(scores, there, wide)
    scores -= scores.mean(0)
    directions = spatial_directions(scores, wide)
    y = scores @ directions
    own, field = y.var(0) + 1e-8, None
    order = np.arange(y.shape[1])
    if graphs is not None:
        field = fit_field(y, laplacian_of(graphs.near.adjacency()), max_niche)
        own[field.chosen] = field.rough * field.rough_spread + field.noise
        order = np.r_[field.chosen, np.setdiff1d(order, field.chosen)]
    shares = sum(block.sum(0, dtype=float) for _, block in cells.counts.blocks()) + 0.5
    shares = shares / shares.sum()
    encode, decode = loadings @ directions, loadings @ np.linalg.inv(directions).T
    return LinearStart(
        scale,
        mean,
        encode[:, order],
        decode[:, order],
        (shift @ directions)[:, order],
        own[order],
        left,
        shares if cells.measurement is None else cells.measurement.share_there(shares),
        field,
    )


def _imputed(scores: np.ndarray, there: np.ndarray, neighbours: sp.csr_array | None) -> np.ndarray:
    """``scores`` with those of cells without counts replaced by the mean of their neighbours with counts, or zero."""
    if there.all():
        return scores
    scores = np.where(there[:, None], scores, 0)
    if neighbours is not None:
        known = np.maximum(neighbours @ there.astype(float), 1)
        scores[~there] = ((neighbours @ scores) / known[:, None])[~there]
    return scores
