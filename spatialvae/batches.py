r"""Where batches lie, apart from how many cells of each type they have.

Types of cells lie at the same places in all batches but for a shift; how frequent they are is each batch's own. For
scores y of cell i in batch s::

    y_i | type k ~ N(t_k + shift_s, V_k),   p(k | s) = pi_sk,   V_k diagonal

fitted by expectation and conditional maximisation (Meng & Rubin 1993): shifts given types, types given shifts. A
difference of means, which depends on composition as well, is thus explained by pi where types explain it. What belongs
together is taken from what is near before anything is shifted: batches that lie further apart than types do cannot be
told from batches of other types.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

CELLS = 6000  # of all batches together, that types are fitted to
LEAST_CELLS = 50  # of these, of each batch that has as many
TYPES = 20  # at most
CELLS_OF_TYPE = 20  # on average, at least
PRIOR_CELLS = 5.0  # of one Gaussian's variance, that each type's variance and each shift are shrunk by
ROUNDS = 5  # that clusters of shifted cells start from: parts of a type that a shift unites become one
MOST_STEPS = 100  # of a round
ROUNDING = 1e-12  # of the largest variance of a score: smaller ones are rounding errors
LEAST_GAIN = 1e-3  # of the likelihood in a step, in nats a cell


def batch_shifts(scores: np.ndarray, batches: np.ndarray, n_batch: int, seed: int = 0) -> np.ndarray:
    """Positions of batches (batch, score), independent of their composition, from ``scores`` (cell, score).

    The mean of shifts over all cells is zero.
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
    """Shifts (batch, score) of ``y`` (cell, score), from clusters after ``shift``."""
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
    """Of ``y`` (cell, score) in Gaussians of ``mean`` and diagonal ``precision`` (type, score): (cell, type)."""
    square = y**2 @ precision.T - 2 * y @ (precision * mean).T + (precision * mean**2).sum(1)
    return 0.5 * (np.log(precision / (2 * math.pi)).sum(1) - square)
