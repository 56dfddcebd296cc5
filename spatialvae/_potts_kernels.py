"""Numba kernels for ``potts`` and ``arrangement``.

States are int32 (cell,), fields (cell, K) and couplings (K, K) float64. Graphs are in compressed row form (``indptr``,
``indices``), with every edge in both directions. ``rng`` is a NumPy generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")
inline: Callable[..., Any] = numba.njit(inline="always", error_model="numpy")


@inline
def _draw(score, rng):
    """Draw a label with probabilities proportional to exp(score); ``score`` is overwritten."""
    highest = score[0]
    for a in range(1, len(score)):
        highest = max(highest, score[a])
    total = 0.0
    for a in range(len(score)):
        score[a] = np.exp(score[a] - highest)
        total += score[a]
    left, a = rng.random() * total, 0
    while a < len(score) - 1 and left >= score[a]:
        left -= score[a]
        a += 1
    return a


@kernel
def gibbs(state, fields, couplings, indptr, indices, sweeps, rng):
    """Draw the label of each cell given its neighbours, all cells in turn, ``sweeps`` times."""
    score = np.empty(fields.shape[1])
    for _ in range(sweeps):
        for i in range(len(state)):
            score[:] = fields[i]
            for e in range(indptr[i], indptr[i + 1]):
                score += couplings[state[indices[e]]]
            state[i] = _draw(score, rng)


@kernel
def energy(state, fields, couplings, indptr, indices):
    """Sum of couplings over edges, and sum of fields over cells."""
    pairs = own = 0.0
    for i in range(len(state)):
        own += fields[i, state[i]]
        for e in range(indptr[i], indptr[i + 1]):
            pairs += couplings[state[i], state[indices[e]]]
    return pairs / 2, own


@inline
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@kernel
def swendsen_wang(state, fields, couplings, bond, indptr, indices, sweeps, rng):
    """Join neighbours with the same label with probability 1 - exp(-bond), then draw the label of each cluster given
    all others. The remaining couplings, ``couplings - bond I``, act between clusters."""
    n, k = fields.shape
    left = couplings - bond * np.eye(k)
    parent, cluster = np.empty(n, np.int32), np.empty(n, np.int32)
    ends, members, score = np.empty(n + 1, np.int32), np.empty(n, np.int32), np.empty(k)
    closed = np.exp(-bond)
    for _ in range(sweeps):
        for i in range(n):
            parent[i] = i
        for i in range(n):
            for e in range(indptr[i], indptr[i + 1]):
                j = indices[e]
                if i < j and state[i] == state[j] and rng.random() >= closed:
                    parent[_root(parent, i)] = _root(parent, j)
        ends[:] = 0
        for i in range(n):
            cluster[i] = _root(parent, i)
            ends[cluster[i] + 1] += 1
        for c in range(n):
            ends[c + 1] += ends[c]
        for i in range(n - 1, -1, -1):  # counting sort: ends[c + 1] decreases to the first index of cluster c
            ends[cluster[i] + 1] -= 1
            members[ends[cluster[i] + 1]] = i
        for c in range(n):
            first = ends[c + 1]
            last = ends[c + 2] if c + 2 <= n else n
            if first == last:
                continue
            score[:] = 0
            for m in range(first, last):
                i = members[m]
                score += fields[i]
                for e in range(indptr[i], indptr[i + 1]):
                    j = indices[e]
                    if cluster[j] != c:
                        score += left[state[j]]
                    else:
                        for a in range(k):
                            score[a] += left[a, a] / 2  # every inner edge is visited twice
            drawn = _draw(score, rng)
            for m in range(first, last):
                state[members[m]] = drawn


@kernel
def annealed(fields, couplings, indptr, indices, steps, chains, rng):
    """Log weights (chain,) of annealed importance sampling; couplings are increased from 0 in ``steps`` steps."""
    n, k = fields.shape
    weight, score = np.zeros(chains), np.empty(k)
    state = np.empty(n, np.int32)
    for chain in range(chains):
        for i in range(n):
            score[:] = fields[i]
            state[i] = _draw(score, rng)
        for step in range(1, steps + 1):
            weight[chain] += energy(state, fields, couplings, indptr, indices)[0] / steps
            if step < steps:
                gibbs(state, fields, couplings * (step / steps), indptr, indices, 1, rng)
    return weight


@kernel
def marginals(state, fields, couplings, indptr, indices, sweeps, rng):
    """Mean over ``sweeps`` of the probabilities of the labels of each cell given its neighbours, (cell, label)."""
    n, k = fields.shape
    mean, score = np.zeros((n, k)), np.empty(k)
    for _ in range(sweeps):
        for i in range(n):
            score[:] = fields[i]
            for e in range(indptr[i], indptr[i + 1]):
                score += couplings[state[indices[e]]]
            state[i] = _draw(score, rng)
            mean[i] += score / score.sum()
    return mean / sweeps


@kernel
def exchange(order, features, coupled, indptr, indices, proposals, rng):
    """Exchange the cells of two random places of ``order`` int64 (place,), in place, by the Metropolis rule, with the
    sum of ``features[a] . coupled[b]`` over neighbouring cells a and b as the log density."""
    n, dim = len(order), features.shape[1]
    for _ in range(proposals):
        i, j = int(n * rng.random()), int(n * rng.random())
        a, b = order[i], order[j]
        if a == b:
            continue
        gain = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            if indices[e] != j:  # the product of the pair itself stays the same
                near = coupled[order[indices[e]]]
                for d in range(dim):
                    gain += (features[b, d] - features[a, d]) * near[d]
        for e in range(indptr[j], indptr[j + 1]):
            if indices[e] != i:
                near = coupled[order[indices[e]]]
                for d in range(dim):
                    gain += (features[a, d] - features[b, d]) * near[d]
        if gain >= 0 or rng.random() < np.exp(gain):
            order[i], order[j] = b, a
