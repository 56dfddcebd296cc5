"""The linear start of the model: principal components of log counts and the spatial field in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from spatialvae.counts import Counts
from spatialvae.data import Cells, Graphs
from spatialvae.field import Field, fit_field, laplacian_of, spectral_means

DENSE_GENES = 3000  # up to here the gene covariance is made in full


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of ``log(1 + scale x / depth)``: ``mean`` (gene,), ``loadings`` (gene, component) with
    orthonormal columns, ``batch_mean`` (batch, component) the scores' mean in each batch."""

    scale: float
    mean: np.ndarray
    loadings: np.ndarray
    batch_mean: np.ndarray

    def scores(self, cells: Cells) -> np.ndarray:
        """(cell, component) float32, centred within each batch."""
        offset = self.mean @ self.loadings + self.batch_mean
        out = np.empty((cells.n_cells, self.loadings.shape[1]), np.float32)
        for rows, logs in log_normalised(cells.counts, self.scale):
            out[rows] = logs @ self.loadings - offset[cells.batches[rows]]
        return out


@dataclass(frozen=True, eq=False)
class LinearStart:
    """What the network starts from. ``niche_to_cell`` (component, direction) predicts a cell's scores from its
    niche; ``residual`` (component,) is the variance that remains; ``log_det`` per cell of (1 + range L);
    ``spread`` the mean variance at a cell of a field of unit variance parameter."""

    components: Components
    field: Field | None
    niche_to_cell: np.ndarray
    residual: np.ndarray
    log_det: float
    spread: float


def log_normalised(counts: Counts, scale: float) -> Iterator[tuple[slice, sp.csr_array]]:
    """``log(1 + scale x / depth)`` in blocks of cells: rows, and their values float32 (row, gene)."""
    for rows, block in counts.blocks():
        factor = (scale / counts.depth[rows]).astype(np.float32)
        block.data = np.log1p(block.data * np.repeat(factor, np.diff(block.indptr)))
        yield rows, block


def fit_components(cells: Cells, n_components: int, seed: int = 0) -> Components:
    """PCA by the gene covariance, or by a truncated SVD when genes are many."""
    n, genes = cells.counts.shape
    k = min(n_components, genes - 1, n - 1)
    scale = float(np.median(cells.depth))
    full = genes <= DENSE_GENES
    sums, products = np.zeros((len(cells.batch_names), genes)), np.zeros((genes, genes) if full else 0)
    for rows, logs in log_normalised(cells.counts, scale):
        batches = sp.csr_array(
            (np.ones(logs.shape[0]), cells.batches[rows], np.arange(logs.shape[0] + 1)),
            shape=(logs.shape[0], len(sums)),
        )
        sums += (batches.T @ logs).toarray()
        if full:
            dense = logs.toarray()
            products += dense.T @ dense
    mean = sums.sum(0) / n
    if full:
        loadings = np.linalg.eigh(products / n - np.outer(mean, mean))[1][:, ::-1][:, :k]
    else:
        loadings = _right_vectors(cells.counts, scale, mean, k, seed)
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(0), np.arange(k)])
    members = np.bincount(cells.batches, minlength=len(sums))[:, None]
    batch_mean = (sums - members * mean) / np.maximum(members, 1) @ loadings
    return Components(scale, mean.astype(np.float32), loadings.astype(np.float32), batch_mean.astype(np.float32))


def _right_vectors(counts: Counts, scale: float, mean: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The first ``k`` right singular vectors (gene, k) of the centred logs."""
    from scipy.sparse.linalg import LinearOperator, svds

    n, genes = counts.shape

    def times(v: np.ndarray) -> np.ndarray:
        return np.concatenate([logs @ v - mean @ v for _, logs in log_normalised(counts, scale)])

    def transposed_times(v: np.ndarray) -> np.ndarray:
        return sum(logs.T @ v[rows] for rows, logs in log_normalised(counts, scale)) - np.multiply.outer(mean, v.sum(0))

    centred = LinearOperator(
        (n, genes), matvec=times, rmatvec=transposed_times, matmat=times, rmatmat=transposed_times, dtype=np.float32
    )
    _, values, right = svds(centred, k, rng=np.random.default_rng(seed))
    return right[np.argsort(-values)].T


def fit_linear(cells: Cells, graphs: Graphs | None, n_components: int, max_niche: int, seed: int = 0) -> LinearStart:
    """Components, the spatial field in them, and the regression of scores on the niche."""
    components = fit_components(cells, n_components, seed)
    scores = components.scores(cells).astype(float)
    variance = scores.var(0) + 1e-8
    if graphs is None:
        return LinearStart(components, None, np.zeros((scores.shape[1], 0)), variance, 0.0, 1.0)
    laplacian = laplacian_of(graphs.near.adjacency())
    field = fit_field(scores, graphs.wide.adjacency(), laplacian, max_niche)
    niche_to_cell = scores.T @ scores / len(scores) @ field.directions
    explained = np.einsum("cd,d,cd->c", niche_to_cell, 1 - field.noise.clip(0.02, 1), niche_to_cell)
    residual = np.maximum(variance - explained, 0.05 * variance)
    means = spectral_means(laplacian, field.range)
    return LinearStart(components, field, niche_to_cell, residual, *means)
