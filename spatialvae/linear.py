"""The linear start of the model: principal components of log counts and the spatial field in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

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
        projected = log_normalised(cells.counts, cells.depth, self.scale) @ self.loadings
        centred = projected - self.mean @ self.loadings - self.batch_mean[cells.batches]
        return np.asarray(centred, np.float32)


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


def log_normalised(counts: sp.csr_array, depth: np.ndarray, scale: float) -> sp.csr_array:
    """``log(1 + scale x / depth)``, sparse, float32."""
    out = counts.copy()
    out.data = np.log1p(out.data * np.repeat(scale / depth, np.diff(out.indptr)).astype(np.float32))
    return out


def fit_components(cells: Cells, n_components: int, seed: int = 0) -> Components:
    """PCA by the gene covariance, or by a truncated SVD when genes are many."""
    n, genes = cells.counts.shape
    k = min(n_components, genes - 1, n - 1)
    scale = float(np.median(cells.depth))
    logs = log_normalised(cells.counts, cells.depth, scale)
    mean = np.asarray(logs.mean(0)).ravel()
    if genes <= DENSE_GENES:
        covariance = (logs.T @ logs).toarray() / n - np.outer(mean, mean)
        loadings = np.linalg.eigh(covariance)[1][:, ::-1][:, :k]
    else:
        from scipy.sparse.linalg import LinearOperator, svds

        centred = LinearOperator(
            logs.shape,
            matvec=lambda v: logs @ v - mean @ v,
            rmatvec=lambda v: logs.T @ v - mean * v.sum(),
            matmat=lambda v: logs @ v - mean @ v,
            rmatmat=lambda v: logs.T @ v - np.outer(mean, v.sum(0)),
            dtype=np.float32,
        )
        _, values, right = svds(centred, k, rng=np.random.default_rng(seed))
        loadings = right[np.argsort(-values)].T
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(0), np.arange(k)])
    projected = logs @ loadings - mean @ loadings
    members = np.bincount(cells.batches, minlength=len(cells.batch_names))
    sums = np.stack([np.bincount(cells.batches, column, len(members)) for column in projected.T], 1)
    batch_mean = sums / np.maximum(members, 1)[:, None]
    return Components(scale, mean.astype(np.float32), loadings.astype(np.float32), batch_mean.astype(np.float32))


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
