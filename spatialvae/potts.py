r"""Potts models of labels (cell types or domains) on the neighbour graph.

    p(s) = exp(-H(s)) / Z,   -H(s) = sum_i  h_{s_i} . x_i  +  sum_{i ~ j} J_{s_i s_j}

with a symmetric matrix J of couplings between labels, a field h_a of each label on covariates x_i of cells, and a sum
over edges i ~ j, each counted once (Potts 1952; with two labels, Ising). J_ab > 0 means that a and b are neighbours
more often than their abundances predict, by a factor e^J_ab per edge. Adding a constant to J changes nothing, and
adding u_a + u_b to J_ab is equivalent to a field u_a times the degree of a cell: couplings are therefore normalised to
rows that sum to zero, and the degree is a covariate if it varies. Z is a sum over all labellings and cannot be
computed. The couplings are fitted by the pseudo-likelihood of Besag (1975), the product of p(s_i | its neighbours),
which is a multinomial regression on the neighbours' labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.special import log_softmax, logsumexp
from scipy.stats import t as student

from spatialvae.errors import InputError
from spatialvae.inference import adjusted

PRIOR_SD = 3.0  # of a parameter, in nats: keeps the couplings of labels that are never neighbours finite
MOST_STEPS = 50  # of Newton's method
TOLERANCE = 1e-8  # of the squared Newton step in units of standard errors
ROWS_AT_ONCE = 4096
SMOOTHING_ROUNDS = 5


@dataclass(frozen=True, eq=False)
class Potts:
    """A fitted model with K labels and P covariates.

    ``couplings`` (K, K), symmetric with rows that sum to zero, and ``fields`` (K, P), with columns that sum to zero, in
    nats; their standard errors; ``covariates`` float64 (cell, P) of the fit; ``log_likelihood``, the log
    pseudo-likelihood; ``freedom``, the degrees of freedom of the standard errors.
    """

    couplings: np.ndarray
    coupling_errors: np.ndarray
    fields: np.ndarray
    field_errors: np.ndarray
    covariates: np.ndarray
    log_likelihood: float
    freedom: float


def fit_potts(
    labels: np.ndarray,
    adjacency: sp.csr_array,
    covariates: np.ndarray | None = None,
    blocks: np.ndarray | None = None,
) -> Potts:
    """Fit couplings and fields by maximum pseudo-likelihood, with standard errors that account for dependence.

    The score u_i of cell i has mean zero given all other cells. Scores of cells that are not neighbours are therefore
    uncorrelated, and the variance of their sum is V, the sum of u_i u_j' over i = j and over edges in both directions.
    The covariance of the estimate is Godambe's H^-1 V H^-1, for large tables and if the model is correct. If labels
    also depend on something that is not in the model, such as gradients in the tissue, scores are correlated over
    longer distances; V is then the sum over ``blocks`` of the squares of their summed scores. A few wide blocks are
    safer than many.

    Parameters
    ----------
    labels : int (cell,), 0 to K - 1, each of which occurs
    adjacency : sparse (cell, cell), symmetric, zeros and ones
    covariates : float (cell, P); by default ones and, if it varies, the degree less its mean
    blocks : int (cell,), from 0, as of ``inference.spatial_blocks``; if None, the model is assumed to be correct

    Raises
    ------
    InputError : for fewer than 2 labels, labels that do not occur, or a graph that is not symmetric
    """
    labels = np.asarray(labels)
    _check(labels, adjacency)
    k = int(labels.max()) + 1
    x = _default_covariates(adjacency) if covariates is None else np.asarray(covariates, float)
    own = np.eye(k)[labels]
    z = np.hstack([adjacency @ own, x])
    basis = _basis(k, x.shape[1])
    theta = np.zeros(basis.shape[1])
    value, gradient, hessian = _objective(theta, basis, own, z)
    for _ in range(MOST_STEPS):
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while True:
            tried = _objective(theta + length * step, basis, own, z)
            if tried[0] >= value or length < 1e-6:
                break
            length /= 2
        theta, (value, gradient, hessian) = theta + length * step, tried
        if step @ hessian @ step < TOLERANCE:
            break
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ _score_variance(_scores(theta, basis, own, z), adjacency, blocks) @ inverse
    errors = np.sqrt(np.maximum(np.einsum("im,mn,in->i", basis, covariance, basis), 0)).reshape(k, -1)
    found = (basis @ theta).reshape(k, -1)
    freedom = np.inf if blocks is None else float(blocks.max())
    penalty = float(theta @ theta) / (2 * PRIOR_SD**2)
    return Potts(found[:, :k], errors[:, :k], found[:, k:], errors[:, k:], x, value + penalty, freedom)


def interactions(model: Potts, names: Sequence[str]) -> pd.DataFrame:
    """Table of couplings, with one row per pair of labels, strongest first.

    Columns: ``label``, ``neighbour``, ``coupling`` in nats per edge, its standard ``error``, ``low`` and ``high`` (95 %
    interval), ``p_value`` (two-sided, of no coupling) and ``fdr`` (Benjamini & Hochberg 1995).
    """
    a, b = np.triu_indices(len(names))
    coupling, error = model.couplings[a, b], np.maximum(model.coupling_errors[a, b], 1e-300)
    p = 2 * student.sf(np.abs(coupling / error), model.freedom)
    half = student.ppf(0.975, model.freedom) * error
    table = pd.DataFrame(
        {
            "label": np.array(names)[a],
            "neighbour": np.array(names)[b],
            "coupling": coupling,
            "error": error,
            "low": coupling - half,
            "high": coupling + half,
            "p_value": p,
            "fdr": adjusted(p),
        }
    )
    return table.sort_values("coupling", key=np.abs, ascending=False, ignore_index=True)


def sample_potts(
    couplings: np.ndarray,
    fields: np.ndarray,
    adjacency: sp.csr_array,
    sweeps: int,
    seed: int = 0,
    start: np.ndarray | None = None,
    clusters: bool = False,
) -> np.ndarray:
    """Draw labels by ``sweeps`` of Gibbs sampling, or of Swendsen & Wang (1987) with ``clusters``: int32 (cell,).

    Cluster updates mix faster if couplings are strong. Bonds represent the excess of each label's coupling to itself
    over all couplings between labels; the remaining couplings act between clusters (partial decoupling, Higdon 1998).

    Parameters
    ----------
    couplings : float (K, K), symmetric, in nats
    fields : float (cell, K), h_a . x_i of each cell: ``model.covariates @ model.fields.T``
    adjacency : sparse (cell, cell), symmetric, zeros and ones
    start : int (cell,), initial labels; if None, drawn from the fields alone

    Raises
    ------
    InputError : if couplings are not symmetric or fields have another shape
    """
    from spatialvae import _potts_kernels as kernels

    rng = np.random.default_rng(seed)
    couplings, fields, indptr, indices = _arrays(couplings, fields, adjacency)
    if start is None:
        share = np.exp(log_softmax(fields, 1)).cumsum(1)
        start = (rng.random((len(fields), 1)) > share[:, :-1]).sum(1)
    state = np.array(start, np.int32)
    if clusters:
        others = np.where(np.eye(len(couplings), dtype=bool), -np.inf, couplings)
        bond = max(0.0, float(np.diag(couplings).min() - others.max()))
        kernels.swendsen_wang(state, fields, couplings, bond, indptr, indices, sweeps, rng)
    else:
        kernels.gibbs(state, fields, couplings, indptr, indices, sweeps, rng)
    return state


def log_partition(
    couplings: np.ndarray,
    fields: np.ndarray,
    adjacency: sp.csr_array,
    steps: int = 500,
    chains: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """log Z and its standard error, in nats, by annealed importance sampling (Neal 2001).

    Couplings are increased in ``steps`` from zero, where Z is known, to their values. Each of the ``chains`` gives an
    unbiased estimate of Z. Other arguments as of ``sample_potts``.
    """
    from spatialvae import _potts_kernels as kernels

    couplings, fields, indptr, indices = _arrays(couplings, fields, adjacency)
    weight = kernels.annealed(fields, couplings, indptr, indices, steps, chains, np.random.default_rng(seed))
    relative = np.exp(weight - logsumexp(weight) + np.log(chains))  # their mean is 1
    value = float(logsumexp(fields, 1).sum() + logsumexp(weight) - np.log(chains))
    return value, float(relative.std(ddof=1) / np.sqrt(chains))


def smooth_labels(
    log_odds: np.ndarray, adjacency: sp.csr_array, sweeps: int = 200, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Combine the log-likelihoods of labels of each cell with a Potts model of the labels of neighbours.

    p(s | y) is proportional to exp(sum_i log_odds_i,s_i + J sum_{i ~ j} [s_i = s_j]). J and the labels are updated in
    turns: J by pseudo-likelihood given the labels (Besag 1986), labels by their marginal probabilities, which are means
    over Gibbs sweeps.

    Parameters
    ----------
    log_odds : float (cell, K), log p(y_i | label) up to a constant for each cell, in nats
    adjacency : sparse (cell, cell), symmetric, zeros and ones

    Returns
    -------
    label : int64 (cell,)
    probability : float64 (cell, K)
    """
    from spatialvae import _potts_kernels as kernels

    k = log_odds.shape[1]
    coupling, state = 0.0, log_odds.argmax(1)
    probability = np.exp(log_softmax(log_odds, 1))
    rng = np.random.default_rng(seed)
    for _ in range(SMOOTHING_ROUNDS if k > 1 else 0):
        coupling = _one_coupling(state, adjacency, k)
        arrays = _arrays(coupling * np.eye(k), log_odds, adjacency)
        labels = np.array(state, np.int32)
        probability = kernels.marginals(labels, arrays[1], arrays[0], *arrays[2:], sweeps, rng)
        state = probability.argmax(1)
    return state, probability


def _one_coupling(labels: np.ndarray, adjacency: sp.csr_array, k: int) -> float:
    """The coupling J of equal labels, by pseudo-likelihood, in a model with a free field for each label."""
    from scipy.optimize import minimize

    own = np.eye(k)[labels]
    near = adjacency @ own

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(theta[0] * near + theta[1:], 1)
        rest = own - np.exp(logs)
        prior = theta / PRIOR_SD**2
        value = (own * logs).sum() - theta @ prior / 2
        return -float(value), -np.r_[(rest * near).sum(), rest.sum(0)] + prior

    return float(minimize(cost, np.zeros(1 + k), jac=True, method="L-BFGS-B").x[0])


def _check(labels: np.ndarray, adjacency: sp.csr_array) -> None:
    if adjacency.shape != (len(labels), len(labels)):
        raise InputError(f"{len(labels)} labels for a graph of {adjacency.shape[0]} cells; expected one for each cell")
    counts = np.bincount(labels)
    if len(counts) < 2 or (counts == 0).any():
        raise InputError(f"labels occur {counts.tolist()} times; expected at least two labels, each at least once")
    if abs(adjacency - adjacency.T).sum() > 0:
        raise InputError("the graph is not symmetric; expected every edge in both directions")


def _default_covariates(adjacency: sp.csr_array) -> np.ndarray:
    degree = np.asarray(adjacency.sum(1), float).ravel()
    ones = np.ones((len(degree), 1))
    return ones if np.ptp(degree) == 0 else np.c_[ones, degree - degree.mean()]


def _basis(k: int, n_covariates: int) -> np.ndarray:
    """The linear map from free parameters to couplings and fields (K, K + P), flattened, with orthonormal columns."""
    contrasts = np.linalg.qr(np.c_[np.ones((k, 1)), np.eye(k)[:, 1:]])[0][:, 1:]  # (K, K - 1), columns sum to zero
    columns = []
    for a in range(k - 1):
        for b in range(a, k - 1):
            pair = np.outer(contrasts[:, a], contrasts[:, b])
            pair = pair if a == b else (pair + pair.T) / np.sqrt(2)
            columns.append(np.hstack([pair, np.zeros((k, n_covariates))]).ravel())
    for a in range(k - 1):
        for p in range(n_covariates):
            columns.append(np.hstack([np.zeros((k, k)), np.outer(contrasts[:, a], np.eye(n_covariates)[p])]).ravel())
    return np.array(columns).T


def _objective(
    theta: np.ndarray, basis: np.ndarray, own: np.ndarray, z: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log pseudo-likelihood plus log prior, its gradient and its negative Hessian, in the free parameters."""
    k, q = own.shape[1], z.shape[1]
    logs = log_softmax(z @ (basis @ theta).reshape(k, q).T, 1)
    p = np.exp(logs)
    gradient = ((own - p).T @ z).ravel()
    hessian = np.empty((k, q, k, q))
    for a in range(k):
        for b in range(a, k):
            block = z.T @ (z * (p[:, a] * ((a == b) - p[:, b]))[:, None])
            hessian[a, :, b], hessian[b, :, a] = block, block.T
    prior = 1 / PRIOR_SD**2
    value = float((own * logs).sum() - prior / 2 * theta @ theta)
    reduced = basis.T @ hessian.reshape(k * q, k * q) @ basis + prior * np.eye(len(theta))
    return value, basis.T @ gradient - prior * theta, reduced


def _scores(theta: np.ndarray, basis: np.ndarray, own: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Derivatives of each cell's log pseudo-likelihood with respect to the free parameters, (cell, parameter)."""
    k, q = own.shape[1], z.shape[1]
    rest = own - np.exp(log_softmax(z @ (basis @ theta).reshape(k, q).T, 1))
    parts = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(z), ROWS_AT_ONCE)]
    return np.concatenate([(rest[rows, :, None] * z[rows, None]).reshape(-1, k * q) @ basis for rows in parts])


def _score_variance(scores: np.ndarray, adjacency: sp.csr_array, blocks: np.ndarray | None) -> np.ndarray:
    if blocks is None:
        total = scores.T @ (scores + adjacency @ scores)
        values, vectors = np.linalg.eigh(total)
        return (vectors * np.maximum(values, 0)) @ vectors.T
    n = int(blocks.max()) + 1
    sums = sp.csr_array((np.ones(len(blocks)), (blocks, np.arange(len(blocks))))) @ scores
    return sums.T @ sums * n / max(n - 1, 1)


def _arrays(
    couplings: np.ndarray, fields: np.ndarray, adjacency: sp.csr_array
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    couplings = np.ascontiguousarray(couplings, float)
    if not np.array_equal(couplings, couplings.T):
        raise InputError("couplings are not symmetric; expected J_ab = J_ba")
    if fields.shape != (adjacency.shape[0], len(couplings)):
        wanted = (adjacency.shape[0], len(couplings))
        raise InputError(f"fields have shape {fields.shape}; expected (cell, label) = {wanted}")
    graph = sp.csr_array(adjacency)
    return couplings, np.ascontiguousarray(fields, float), graph.indptr.astype(np.int64), graph.indices.astype(np.int64)
