r"""Batch shifts that do not depend on the composition of the batches.

Cell types have the same means in all batches up to a shift of the batch; their frequencies are specific to each batch.
For the scores y of cell i in batch s::

    y_i | type k ~ N(t_k + shift_s, V_k),   p(k | s) = pi_sk,   V_k diagonal

fitted by ECM (Meng & Rubin 1993): shifts given types, types given shifts. A difference of batch means that is due to
composition is thus explained by pi, not by the shift. The initial types are clusters of unshifted cells: if batches are
further apart than types, a shift cannot be distinguished from a difference in types.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

CELLS = 6000  # largest number of cells that types are fitted to, over all batches
LEAST_CELLS = 50  # of each batch among these, if it has as many
TYPES = 20  # at most
CELLS_OF_TYPE = 20  # on average, at least
PRIOR_CELLS = 5.0  # pseudo-cells that shrink the variances of types to the total variance, and shifts to 0
ROUNDS = 5  # each starts from new clusters of the shifted cells, which merge the parts of a type in several batches
MOST_STEPS = 100  # per round
ROUNDING = 1e-12  # relative to the largest variance of a score: smaller variances are rounding errors
LEAST_GAIN = 1e-3  # of the likelihood in a step, nats per cell


def batch_shifts(scores: np.ndarray, batches: np.ndarray, n_batch: int, seed: int = 0) -> np.ndarray:
    """Shifts of batches, float64 (batch, score), from ``scores`` (cell, score) and ``batches`` int (cell,).

    The mean shift over all cells is zero.
    """
    shift = np.zeros((n_batch, scores.shape[1]))
    if n_batch == 1:
        return shift
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(batches == b)) for b in range(n_batch)]
    rows = np.concatenate([of[: max(CELLS // n_batch, LEAST_CELLS)] for of in shuffled])
    for _ in range(ROUNDS):
        shift = _fitted(scores[rows], batches[rows], shift, seed)
    return shift - (np.bincount(batches, minlength=n_batch) / len(batches)) @ shift


def _fitted(y: np.ndarray, batches: np.ndarray, shift: np.ndarray, seed: int) -> np.ndarray:
    """Shifts (batch, score) fitted to ``y`` (cell, score), starting from the clusters of ``y`` less ``shift``."""
    member = np.eye(len(shift))[batches]
    variance = np.maximum((y - shift[batches]).var(0), ROUNDING * y.var(0).max())
    share, before = _clusters(y - shift[batches], seed), -math.inf
    for _ in range(MOST_STEPS):
        size = share.sum(0)[:, None]
        moved = y - shift[batches]
        mean = share.T @ moved / np.maximum(size, 1e-9)
        scatter = share.T @ moved**2 - size * mean**2
        precision = (size + PRIOR_CELLS) / (np.maximum(scatter, 0) + PRIOR_CELLS * variance)
        of_cells = share @ precision
        weight = member.T @ of_cells + PRIOR_CELLS / variance
        shift = member.T @ (of_cells * y - share @ (precision * mean)) / weight
        count = member.T @ share + 1.0
        joint = np.log(count / count.sum(1, keepdims=True))[batches] + _log_density(y - shift[batches], mean, precision)
        total = logsumexp(joint, 1)
        share = np.exp(joint - total[:, None])
        if total.mean() < before + LEAST_GAIN:
            break
        before = float(total.mean())
    return shift


def _clusters(y: np.ndarray, seed: int) -> np.ndarray:
    """Clusters of ``y``, one-hot (cell, type)."""
    from sklearn.cluster import KMeans

    from spatialvae.analysis import equal_rows_allowed

    number = max(min(TYPES, len(y) // CELLS_OF_TYPE), 1)
    with equal_rows_allowed():
        return np.eye(number)[KMeans(number, n_init=1, random_state=seed).fit_predict(y)]


def _log_density(y: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Log density (cell, type) of ``y`` (cell, score) in Gaussians with ``mean`` and diagonal ``precision``,
    (type, score) each."""
    square = y**2 @ precision.T - 2 * y @ (precision * mean).T + (precision * mean**2).sum(1)
    return 0.5 * (np.log(precision / (2 * math.pi)).sum(1) - square)
