"""Clustering of an embedding: spatial domains and their number.

Cells are clustered by the average of their latents over the nearest neighbours (``find_domains``). Near a border such
an average mixes two domains. The labels are therefore refined (``refined``): each cell is averaged again, over more
neighbours but only over those that probably are in the same domain. Different latents, numbers of neighbours and
initial values of the mixture give different domains, and no criterion that was tried finds the best of them; their
consensus agrees better with known domains than they do on average (``spatial_domains``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialvae.data import minibatches
from spatialvae.errors import InputError, check_count

if TYPE_CHECKING:
    import scipy.sparse as sp
    from sklearn.mixture import GaussianMixture

    from spatialvae.graph import NeighbourGraph

AVERAGED_NEIGHBOURS = (8, 15, 30)  # half, once and twice the number whose mean is the usual summary of a neighbourhood
MIXTURE_STARTS = 10  # of each mixture, whose likelihood has several maxima
MOST_FITTED = 50_000  # cells to which a mixture is fitted
MOST_DOMAINS = 20  # largest number tried if none is given
HALVINGS = 9  # random halvings of the cells for each number, in turn with each of the neighbourhoods
HALVINGS_BY_CHANCE = 3  # the same with cells at permuted positions
HALVING_STARTS = 2
MOST_HALVED = 10_000  # cells
REFINED_NEIGHBOURS = 36  # three rings of a hexagonal grid; 24 to 80 gained similarly on patches of 33 to 400 cells
REFINEMENTS = 10
ROWS_AT_ONCE = 4096
EQUAL_AGREEMENT = 0.05  # difference from the highest; .03 to .1 gave similar numbers on 17 tissues
LEAST_AGREEMENT = 0.5  # adjusted Rand index; if no number of domains reaches it, there is one domain
LEAST_EXCESS = 0.1  # the same for the mean excess over chance: .14 to .46 with domains, -.02 to .04 without


def stability(latent: np.ndarray, near: NeighbourGraph | None = None, seed: int = 0) -> pd.DataFrame:
    """Stability of Gaussian mixture clusters of ``latent`` (cell, dim) for each number of clusters; with neighbours
    ``near``, of latents averaged over each number in ``AVERAGED_NEIGHBOURS``.

    Mixtures are fitted to two random halves of the cells, and their labels of all cells are compared (Lange, Roth,
    Braun & Buhmann 2004). Averages of neighbours that are in different halves are similar even if the tissue has no
    domains: the same is therefore done with cells at permuted positions. At most 10,000 cells are used.

    Returns one row for each number ``k`` of components, 2 to 20, with the mean ``agreement`` over halvings, an adjusted
    Rand index, its standard deviation, ``spread``, and the mean agreement at permuted positions, ``by_chance`` (NaN
    without ``near``).
    """
    latent = np.asarray(latent, float)
    if near is None:
        return _agreements([latent], HALVINGS, seed).assign(by_chance=np.nan)
    shuffled = latent[np.random.default_rng(seed).permutation(len(latent))]
    here, moved = ([averaged(z, near.nearest(size)) for size in AVERAGED_NEIGHBOURS] for z in (latent, shuffled))
    chance = _agreements(moved, HALVINGS_BY_CHANCE, seed)["agreement"]
    return _agreements(here, HALVINGS, seed).assign(by_chance=chance)


def _agreements(latents: Sequence[np.ndarray], halvings: int, seed: int) -> pd.DataFrame:
    """``k``, ``agreement`` and ``spread`` of ``stability``; halvings use ``latents`` (cell, dim) in turn."""
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    used = rng.permutation(len(latents[0]))[:MOST_HALVED]
    latents, middle, rows = [latent[used] for latent in latents], len(used) // 2, []
    for k in range(2, min(MOST_DOMAINS, middle) + 1):
        found = []
        for i in range(halvings):
            latent = latents[i % len(latents)]
            halves = np.split(rng.permutation(len(used)), [middle])
            labels = (_mixture(latent[half], k, seed + i, HALVING_STARTS).predict(latent) for half in halves)
            found.append(adjusted_rand_score(*labels))
        rows.append((k, float(np.mean(found)), float(np.std(found))))
    return pd.DataFrame(rows, columns=["k", "agreement", "spread"])


def most_stable(found: pd.DataFrame) -> int:
    """The number of clusters from the table of ``stability``: the largest with about the highest agreement, at most
    0.05 below it; 1 if the highest is less than 0.5, or the mean agreement exceeds that by chance by less than 0.1."""
    k, agreement = found[["k", "agreement"]].to_numpy().T
    if not len(k) or agreement.max() < LEAST_AGREEMENT:
        return 1
    if (found["agreement"] - found["by_chance"]).mean() < LEAST_EXCESS:
        return 1
    return int(k[agreement >= agreement.max() - EQUAL_AGREEMENT].max())


def spatial_domains(latents: Sequence[np.ndarray], near: NeighbourGraph, k: int, seed: int = 0) -> np.ndarray:
    """Find ``k`` domains: the consensus of clusterings by each of ``latents`` (cell, dim), averaged over each number of
    neighbours in ``AVERAGED_NEIGHBOURS`` and refined over ``REFINED_NEIGHBOURS``.

    ``near`` holds at least ``REFINED_NEIGHBOURS`` neighbours of each cell.

    Returns the probabilities of domains, float64 (cell, k). Raises InputError as ``find_domains``.
    """
    wide, found = near.nearest(REFINED_NEIGHBOURS).adjacency(), []
    for latent in latents:
        for size in AVERAGED_NEIGHBOURS:
            start = find_domains(averaged(latent, near.nearest(size)), k, seed)
            found.append(refined(latent, wide, start))
    return consensus(found)


def averaged(latent: np.ndarray, near: NeighbourGraph) -> np.ndarray:
    """Mean of ``latent`` (cell, dim) over each cell and its neighbours."""
    return (latent + near.adjacency() @ latent) / (1 + near.degree)[:, None]


def find_domains(latent: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Cluster cells by a Gaussian mixture of ``k`` components with one common covariance.

    Parameters
    ----------
    latent : float (cell, dim)
    k : number of domains, 1 to the number of cells

    Returns
    -------
    float64 (cell, k), the probabilities of domains

    Raises
    ------
    InputError : if ``k`` is not in 1 to the number of cells
    """
    check_count("the number of domains", k)
    if k > len(latent):
        raise InputError(f"the number of domains is {k}; expected at most {len(latent)}, the number of cells")
    latent = np.asarray(latent, float)
    fitted = latent
    if len(latent) > MOST_FITTED:
        fitted = latent[np.random.default_rng(seed).choice(len(latent), MOST_FITTED, replace=False)]
    return _mixture(fitted, k, seed, MIXTURE_STARTS).predict_proba(latent)


def consensus(found: Sequence[np.ndarray]) -> np.ndarray:
    """Mean probabilities (cell, domain) of several clusterings of the same cells into as many domains.

    The domains of each clustering are matched to those of the mean, one to one, such that their probabilities agree
    best (Dudoit & Fridlyand 2003), and the mean is updated, in turn. The result depends on the clustering that is the
    first mean: each is tried, and the mean with which all agree best is returned, among those in which no domain is
    lost if there is one.
    """
    means = [_agreed(found, first) for first in found]
    return max(means, key=lambda mean: (len(np.unique(mean[0].argmax(1))), mean[1]))[0]


def _agreed(found: Sequence[np.ndarray], mean: np.ndarray) -> tuple[np.ndarray, float]:
    """The consensus that starts from ``mean``, and its agreement with ``found``: the mean probability that a cell is
    in the same domain."""
    from scipy.optimize import linear_sum_assignment

    before = -np.inf
    while True:
        matched = [each[:, linear_sum_assignment(mean.T @ each, maximize=True)[1]] for each in found]
        mean = np.mean(matched, 0)
        agreement = float(np.mean([(mean * each).sum(1).mean() for each in matched]))
        if agreement <= before + 1e-9:
            return mean, agreement
        before = agreement


def refined(latent: np.ndarray, neighbours: sp.csr_array, probability: np.ndarray) -> np.ndarray:
    """Refine domains by averages of cells over the neighbours in the same domain.

    Cell i is averaged over itself and its neighbours j with weights w_ij = sum_d p_id p_jd, the probability that both
    are in one domain. In domain d this average is N(mean_d, S / m_i), where m_i is the sum of its weights; S is fitted
    to the averages, so that it includes the correlation of neighbours. Weights, parameters and probabilities are
    updated in turn until no label changes or a domain would be lost, at most ``REFINEMENTS`` times.

    Parameters
    ----------
    latent : float (cell, dim), not averaged
    neighbours : adjacency matrix (cell, cell)
    probability : float (cell, domain), the domains to start from

    Returns
    -------
    float64 (cell, domain), the new probabilities
    """
    latent = np.asarray(latent, float)
    ridge = _ridge(latent)
    for _ in range(REFINEMENTS):
        weights = _same_domain(neighbours, probability)
        size = 1 + weights.sum(1)
        mean = (latent + weights @ latent) / size[:, None]
        share = probability * size[:, None]
        total = np.maximum(share.sum(0), 1e-9)
        centre = share.T @ mean / total[:, None]
        scatter = (mean.T * size) @ mean - (centre.T * total) @ centre
        precision = np.linalg.inv(scatter / len(mean) + ridge * np.eye(len(scatter)))
        distance = -2 * mean @ precision @ centre.T + np.einsum("de,de->d", centre @ precision, centre)
        log_joint = np.log(np.maximum(probability.mean(0), 1e-12)) - 0.5 * size[:, None] * distance
        before, now = probability.argmax(1), log_joint.argmax(1)
        if len(np.unique(now)) < len(np.unique(before)):
            break
        odds = np.exp(log_joint - log_joint.max(1, keepdims=True))
        probability = odds / odds.sum(1, keepdims=True)
        if (now == before).all():
            break
    return probability


def _same_domain(neighbours: sp.csr_array, probability: np.ndarray) -> sp.csr_array:
    """``neighbours`` (cell, cell) with the probabilities that both cells are in one domain as values."""
    found = neighbours.astype(float)
    for rows in minibatches(np.arange(len(probability)), ROWS_AT_ONCE):
        part = slice(found.indptr[rows[0]], found.indptr[rows[-1] + 1])
        ends = np.repeat(rows, np.diff(found.indptr[rows[0] : rows[-1] + 2]))
        found.data[part] = np.einsum("ed,ed->e", probability[ends], probability[found.indices[part]])
    return found


def in_order_of_size(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 (cell,) and ``probability`` (cell, domain) with domains renumbered in order of decreasing size."""
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=probability.shape[1]), kind="stable")
    return probability[:, order].argmax(1), probability[:, order]


def _ridge(latent: np.ndarray) -> float:
    """A variance that is added to covariances of ``latent`` (cell, dim), so that they can be inverted."""
    rounding = float(np.finfo(np.float32).eps * np.abs(latent).max())  # rows that differ by less count as equal
    return max(1e-6 * float(latent.var(0).mean()), rounding**2, np.finfo(float).tiny)


def _mixture(latent: np.ndarray, k: int, seed: int, starts: int) -> GaussianMixture:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        k, covariance_type="tied", n_init=starts, reg_covar=_ridge(latent), random_state=seed, max_iter=300
    )
    with equal_rows_allowed(), warnings.catch_warnings():
        # with few cells the likelihood is flat: labels converge long before it does
        warnings.filterwarnings("ignore", message="Best performing initialization did not converge")
        return mixture.fit(latent)


@contextmanager
def equal_rows_allowed() -> Iterator[None]:
    """Suppress scikit-learn's warning about fewer distinct rows than clusters: cells can be equal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        yield
