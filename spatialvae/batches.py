r"""Effects of batches that do not depend on the composition of the batches.

Cell types are the same in all batches up to an effect of the batch; their frequencies are specific to each batch. Types
are found in scores y of log counts, in which the effect of batch s is a shift::

    y_i | type k ~ N(t_k + shift_s, V_k),   p(k | s) = pi_sk,   V_k diagonal

fitted by ECM (Meng & Rubin 1993): shifts given types, types given shifts. A difference of batch means that is due to
composition is thus explained by pi, not by the shift. The initial types are clusters of unshifted cells. If batches are
further apart than types, each type then stays in one batch; shifts equal to the batch means are therefore tried too,
and used if they lead to a much higher likelihood. Batches that are further apart than types and also differ in
composition may be shifted wrongly.

A factor on the abundance of a gene shifts its log counts only if they are high: zeros remain zeros. Given types, such
factors are fitted to sums of counts (``gene_effects``), and removed from counts; the shift of the scores is what
remains.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
from scipy.special import logsumexp

from spatialvae.counts import Counts

CELLS = 6000  # largest number of cells that types are fitted to, over all batches
LEAST_CELLS = 50  # of each batch among these, if it has as many
TYPES = 20  # at most
CELLS_OF_TYPE = 20  # on average, at least
PRIOR_CELLS = 5.0  # pseudo-cells that shrink the variances of types to the total variance, and shifts to 0
ROUNDS = 5  # each starts from new clusters of the shifted cells, which merge the parts of a type in several batches
MOST_STEPS = 100  # per round
ROUNDING = 1e-12  # relative to the largest variance of a score: smaller variances are rounding errors
LEAST_ADVANTAGE = 0.5  # of starting from the means of batches, nats per cell: they confuse composition with shifts
LEAST_GAIN = 1e-3  # of the likelihood in a step, nats per cell
PRIOR_COUNTS = 5.0  # pseudo-counts that shrink the effect of a batch on a gene to 0, and profiles of types to the mean
SCALINGS = 30  # of the proportional fitting of effects and profiles
MOST = math.log(10)  # largest effect: a single count of a gene that is rare in one batch must not dominate its cell

Fit = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # shifts, and the parameters of types: see ``_fitted``


def batch_shifts(scores: np.ndarray, batches: np.ndarray, n_batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shifts of batches, float64 (batch, score), and probabilities of types, float32 (cell, type), from ``scores``
    (cell, score) and ``batches`` int (cell,).

    The mean shift over all cells is zero.
    """
    shift = np.zeros((n_batch, scores.shape[1]))
    if n_batch == 1:
        return shift, np.ones((len(scores), 1), np.float32)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(batches == b)) for b in range(n_batch)]
    rows = np.concatenate([of[: max(CELLS // n_batch, LEAST_CELLS)] for of in shuffled])
    fits = [_rounds(scores[rows], batches[rows], start, seed) for start in (shift, _means(scores, batches, n_batch))]
    shift, *types = fits[fits[1][0] > fits[0][0] + LEAST_ADVANTAGE][1]
    shares = np.concatenate(
        [
            _shares(scores[first : first + CELLS], batches[first : first + CELLS], shift, *types)[0].astype(np.float32)
            for first in range(0, len(scores), CELLS)
        ]
    )
    return shift - (np.bincount(batches, minlength=n_batch) / len(batches)) @ shift, shares


def gene_effects(counts: Counts, batches: np.ndarray, n_batch: int, types: np.ndarray) -> np.ndarray:
    """Log factors of batches on the abundance of genes, float64 (batch, gene), given probabilities of ``types`` (cell,
    type) of the cells.

    The counts of type k in batch s are multinomial with shares proportional to p_kg exp(effect_sg). Sums of counts of
    each type and of each batch are sufficient statistics; p and effects are fitted to both in turn (iterative
    proportional fitting, Deming & Stephan 1940). The mean effect over all cells is zero.
    """
    of_batch = sp.csr_array((np.ones(len(batches)), (batches, np.arange(len(batches)))), (n_batch, len(batches)))
    by_type, by_batch = np.zeros((types.shape[1], counts.n_genes)), np.zeros((n_batch, counts.n_genes))
    for rows, block in counts.blocks():
        by_type += types[rows].T @ block
        by_batch += of_batch[:, rows] @ block
    total = of_batch @ (types * counts.depth[:, None].astype(float))
    mean = by_type.sum(0) / by_type.sum()
    profile = (by_type + PRIOR_COUNTS * mean) / (by_type.sum(1, keepdims=True) + PRIOR_COUNTS)
    factor = np.ones_like(by_batch)
    for _ in range(SCALINGS):
        exposure = total / (factor @ profile.T)
        factor = (by_batch + PRIOR_COUNTS) / (exposure @ profile + PRIOR_COUNTS)
        exposure = total / (factor @ profile.T)
        profile = (by_type + PRIOR_COUNTS * mean) / (exposure.T @ factor + PRIOR_COUNTS)
    effect = np.log(factor)
    effect -= (np.bincount(batches, minlength=n_batch) / len(batches)) @ effect
    return np.clip(effect, -MOST, MOST)


def _means(scores: np.ndarray, batches: np.ndarray, n_batch: int) -> np.ndarray:
    """Mean ``scores`` of each batch, (batch, score)."""
    total = np.stack([np.bincount(batches, column, n_batch) for column in scores.T], 1)
    return total / np.maximum(np.bincount(batches, minlength=n_batch), 1)[:, None]


def _rounds(y: np.ndarray, batches: np.ndarray, shift: np.ndarray, seed: int) -> tuple[float, Fit]:
    """The log likelihood, nats per cell, and the last of several fits, each starting from the shifts of the one
    before."""
    for _ in range(ROUNDS):
        likelihood, fit = _fitted(y, batches, shift, seed)
        shift = fit[0]
    return likelihood, fit


def _fitted(y: np.ndarray, batches: np.ndarray, shift: np.ndarray, seed: int) -> tuple[float, Fit]:
    """The log likelihood, nats per cell, and shifts (batch, score) fitted to ``y`` (cell, score), starting from the
    clusters of ``y`` less ``shift``, log frequencies (batch, type), means and precisions (type, score) of types."""
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
        frequency = np.log(count / count.sum(1, keepdims=True))
        share, total = _shares(y, batches, shift, frequency, mean, precision)
        if total < before + LEAST_GAIN:
            break
        before = total
    return total, (shift, frequency, mean, precision)


def _shares(
    y: np.ndarray,
    batches: np.ndarray,
    shift: np.ndarray,
    frequency: np.ndarray,
    mean: np.ndarray,
    precision: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Probabilities of types (cell, type), and the mean log likelihood of cells in nats."""
    joint = frequency[batches] + _log_density(y - shift[batches], mean, precision)
    total = logsumexp(joint, 1)
    return np.exp(joint - total[:, None]), float(total.mean())


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
