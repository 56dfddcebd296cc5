r"""Arrangements of cells at places, in which neighbours are as similar as in a section.

An arrangement a assigns cell a_i of a given set to place i, each cell to one place. Of all distributions over
arrangements in which each feature u_d of neighbours has a given mean product, that of maximum entropy is

    p(a) = exp(sum_d c_d T_d(a)) / Z,   T_d(a) = sum_{i ~ j} u_{a_i d} u_{a_j d}

with the sum over edges i ~ j of the graph of places, each counted once. All arrangements contain the same cells, so
that only their neighbourhoods are modelled. The couplings c maximise the likelihood of the arrangement that a section
has: E T_d equals T_d of the section. They are found by stochastic approximation (Robbins & Monro 1951; Younes 1988),
and arrangements are sampled by exchanging two cells at a time (Kawasaki 1966).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

ROUNDS = 80  # of stochastic approximation; the mean of the couplings of the second half is used
ROUND_SWEEPS = 10  # proposals per place in a round
GAIN = 0.5  # first step of couplings per unit of T per edge: couplings of weakly correlated features are T per edge
SLOWER = 10  # rounds after which steps are half as large
SWEEPS = 200  # proposals per place of a sample; T no longer changed after 50 on two sections of 1,000 and 2,000 cells


def products(order: np.ndarray, features: np.ndarray, adjacency: sp.csr_array) -> np.ndarray:
    """T (feature,) of the arrangement ``order`` (place,) of cells with ``features`` (cell, feature)."""
    there = features[order]
    return (there * (adjacency @ there)).sum(0) / 2


def sampled(
    order: np.ndarray,
    features: np.ndarray,
    couplings: np.ndarray,
    adjacency: sp.csr_array,
    sweeps: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """An arrangement int64 (place,) after ``sweeps`` of Metropolis exchanges from ``order`` (place,).

    Parameters
    ----------
    features : float (cell, feature)
    couplings : float (feature,), c
    adjacency : (place, place), symmetric, zeros and ones
    """
    from spatialvae import _potts_kernels as kernels

    order = order.astype(np.int64)
    root = np.ascontiguousarray(features, float)
    kernels.exchange(order, root, root * couplings, adjacency.indptr, adjacency.indices, sweeps * len(order), rng)
    return order


def fitted(features: np.ndarray, adjacency: sp.csr_array, rng: np.random.Generator) -> np.ndarray:
    """Couplings c (feature,) of a section whose cells, at their places, have ``features`` (cell, feature; centred, of
    unit variance) and the neighbours ``adjacency`` (cell, cell)."""
    edges = max(adjacency.nnz / 2, 1)
    wanted = products(np.arange(len(features)), features, adjacency) / edges
    order, couplings, total = rng.permutation(len(features)), np.zeros(len(wanted)), np.zeros(len(wanted))
    for i in range(ROUNDS):
        order = sampled(order, features, couplings, adjacency, ROUND_SWEEPS, rng)
        couplings = couplings + GAIN / (1 + i / SLOWER) * (wanted - products(order, features, adjacency) / edges)
        if i >= ROUNDS // 2:
            total += couplings
    return total / (ROUNDS - ROUNDS // 2)


def arranged(
    features: np.ndarray, adjacency: sp.csr_array, places: sp.csr_array, rng: np.random.Generator
) -> np.ndarray:
    """A new arrangement of the cells of a section, int64 (place,): rows of ``features``.

    Each cell occurs once if there are as many places as cells. Otherwise cells are chosen at random, and their numbers
    of occurrences differ by at most one.

    Parameters
    ----------
    features : float (cell, feature), in which neighbours may be similar
    adjacency : (cell, cell), neighbours in the section, symmetric, zeros and ones
    places : (place, place), neighbours among the new places, likewise
    """
    sd = features.std(0)
    features = (features - features.mean(0)) / np.where(sd > 0, sd, 1)
    couplings = fitted(features, adjacency, rng)
    n, number = len(features), places.shape[0]
    order = np.concatenate([rng.permutation(n) for _ in range(-(-number // n))])[:number]
    return sampled(rng.permutation(order), features, couplings, places, SWEEPS, rng)
