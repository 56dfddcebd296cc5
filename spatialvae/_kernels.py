"""Numba kernels of `spatialvae`, each with one pass over a minibatch instead of about a dozen tensor operations.

They run on one thread, mostly on float32 arrays. Sums may be reordered so that loops vectorise; the order is the same
in every run. On-disk caching is safe because no kernel is compiled in a forked process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy import float32, int32

FAST = {"reassoc", "contract", "nsz", "arcp"}
kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
inline: Callable[..., Any] = numba.njit(inline="always", error_model="numpy", fastmath=FAST)

NEAR = 16  # largest count in the lookup table; Stirling's series has errors below 1e-9 for larger ones
LEAST_MEAN = 1e-30  # of a gene with a large count: its share may be too small for float32
MOST_ADDED = float32(60)  # largest logit of an additional zero: with larger ones the mean might overflow in float32


@inline
def _exp(x):
    """e^x with a relative error of 1.2e-7 (Cephes' polynomial), vectorisable; x is clipped to [-87, 88]."""
    x = max(float32(-87), min(x, float32(88)))
    n = np.floor(x * float32(1.44269504) + float32(0.5))
    r = x - n * float32(0.693359375) - n * float32(-2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1)
    return p * np.int32((int32(n) + int32(127)) << int32(23)).view(np.float32)


@inline
def _log(x):
    """log x of a positive normal number, with an error of 1.2e-7 (Cephes' polynomial), vectorisable."""
    bits = np.float32(x).view(np.int32)
    e = int32(bits - int32(0x3F3504F3)) >> int32(23)
    m = np.int32(bits - int32(e << int32(23))).view(np.float32) - float32(1)
    p = float32(7.0376836292e-2)
    p = p * m + float32(-1.1514610310e-1)
    p = p * m + float32(1.1676998740e-1)
    p = p * m + float32(-1.2420140846e-1)
    p = p * m + float32(1.4249322787e-1)
    p = p * m + float32(-1.6668057665e-1)
    p = p * m + float32(2.0000714765e-1)
    p = p * m + float32(-2.4999993993e-1)
    p = p * m + float32(3.3333331174e-1)
    scale = float32(e)
    p = p * m * m * m + scale * float32(-2.12194440e-4) - float32(0.5) * m * m
    return m + p + scale * float32(0.693359375)


@inline
def _highest(row):
    """The maximum of ``row``, computed on integers with the same order: unlike on floats, the loop vectorises."""
    most = int32(-(2**31))
    for g in range(len(row)):
        bits = np.float32(row[g]).view(np.int32)
        most = max(most, int32(bits ^ ((bits >> int32(31)) & int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> int32(31)) & int32(0x7FFFFFFF))).view(np.float32)


@inline
def _stirling(y):
    """log G(y) without its constant term, for y > 16."""
    return (y - 0.5) * math.log(y) - y + (1 - 1 / (30 * y * y)) / (12 * y)


@inline
def _stirling_slope(y):
    return math.log(y) - 1 / (2 * y) - (1 - 1 / (10 * y * y)) / (12 * y * y)


@kernel
def _rising(theta, value, slope):
    """Fill ``value`` (gene, count) with log G(x + theta) - log G(theta) - log x! for x up to NEAR, and ``slope`` with
    its derivative with respect to log theta; return the constants to add to Stirling's series of each for larger
    counts, float64 (2, gene)."""
    rest = np.empty((2, len(theta)))
    value[:, 0] = slope[:, 0] = 0
    for k in range(NEAR):
        for g in range(len(theta)):
            value[g, k + 1] = value[g, k] + _log((theta[g] + float32(k)) / float32(k + 1))
            slope[g, k + 1] = slope[g, k] + theta[g] / (theta[g] + float32(k))
    for g in range(len(theta)):
        near = float(theta[g]) + NEAR
        rest[0, g] = value[g, NEAR] - (_stirling(near) - _stirling(NEAR + 1.0))
        rest[1, g] = slope[g, NEAR] - theta[g] * _stirling_slope(near)
    return rest


@kernel
def negative_binomial(x, logits, logit_zero, depth, log_theta, value, by_logit, by_zero, by_theta):
    """NB log-probability of ``x`` (cell, gene) with mean = depth * softmax(logits), summed over genes.

    Fills ``value`` (cell,) and its derivatives with respect to logits, ``by_logit``, and log theta, ``by_theta``,
    (cell, gene) each. Most counts are zero: terms of all entries are computed in vectorised loops, then those of
    non-zero counts only.

    With ``logit_zero`` (cell, gene), logits of additional zeros, the mean of the NB is divided by the probability that
    there is no additional zero, and ``by_zero`` is filled with the derivatives with respect to ``logit_zero``. Numba
    compiles a separate version for None.
    """
    n, genes = x.shape
    theta, inverse, share = np.empty((3, genes), np.float32)
    rising, slope = np.empty((2, genes, NEAR + 1), np.float32)
    where = np.empty(genes + 1, np.int32)
    for g in range(genes):
        theta[g] = _exp(log_theta[g])
        inverse[g] = _exp(-log_theta[g])
    rest = _rising(theta, rising, slope)
    for i in range(n):
        highest = _highest(logits[i])
        total = float32(0)
        for g in range(genes):
            share[g] = _exp(logits[i, g] - highest)
            total += share[g]
        shift = _log(depth[i] / total) - highest
        scale = float32(1) / total
        likelihood, pulled = float32(0), float32(0)
        for g in range(genes):
            share[g] *= scale
            ratio = depth[i] * share[g] * inverse[g]
            if logit_zero is not None:
                added = _exp(min(logit_zero[i, g], MOST_ADDED))  # odds
                ratio *= float32(1) + added
            above = float32(1) + ratio
            part = float32(1) / above
            odds = -(_log(above) + (ratio - (above - float32(1))) * part)  # log(theta / (theta + mu))
            none = theta[g] * odds
            near = x[i, g] if x[i, g] <= NEAR else float32(0)
            pull = x[i, g] * part - theta[g] * ratio * part
            turn = none + theta[g] * ratio * part - x[i, g] * part
            if logit_zero is not None:
                counted = _exp(none) if x[i, g] == 0 else float32(1)
                all_ways = counted + (added if x[i, g] == 0 else float32(0))
                weight = counted / all_ways  # probability that a zero is not additional
                kept = float32(1) / (float32(1) + added)
                # for small x > 0, x log mu includes -x log kept
                likelihood += (float32(1) - near) * _log(all_ways * kept)
                none = none if x[i, g] > 0 else float32(0)
                pull *= weight
                turn *= weight
                by_zero[i, g] = added * kept * (pull - float32(1)) + (float32(1) - weight)
            none = none if x[i, g] <= NEAR else float32(0)
            likelihood += none + near * (logits[i, g] + shift - log_theta[g] + odds)
            by_logit[i, g] = pull
            by_theta[i, g] = turn
            pulled += pull
        found = 0
        for g in range(genes):
            where[found] = g
            found += x[i, g] > 0
        for j in range(found):
            g = where[j]
            if x[i, g] <= NEAR:
                likelihood += rising[g, int(x[i, g])]
                by_theta[i, g] += slope[g, int(x[i, g])]
            else:
                # terms that grow with x cancel: their sum is computed in double precision (float() would not convert)
                count, size = np.float64(x[i, g]), np.float64(theta[g])
                mean = np.float64(depth[i]) * share[g]
                if logit_zero is not None:
                    mean *= 1 + np.float64(_exp(min(logit_zero[i, g], MOST_ADDED)))
                ratio, far = max(mean, LEAST_MEAN) / size, size + count
                powers = count * math.log1p(1 / ratio) + size * math.log1p(ratio)
                likelihood += float32(rest[0, g] + _stirling(far) - _stirling(count + 1) - powers)
                by_theta[i, g] += float32(rest[1, g] + theta[g] * _stirling_slope(far))
        for g in range(genes):
            by_logit[i, g] -= share[g] * pulled
        value[i] = likelihood


@kernel
def log_normalised(x, factor, out):
    """Fill ``out`` with log(1 + factor x), (cell, gene); ``factor`` (cell,)."""
    for i in range(x.shape[0]):
        for g in range(x.shape[1]):
            out[i, g] = _log(float32(1) + factor[i] * x[i, g])


@kernel
def dense_rows(indptr, indices, data, rows, out):
    """Fill ``out`` (row, column) with ``rows`` of a CSR matrix."""
    for i in range(len(rows)):
        for g in range(out.shape[1]):
            out[i, g] = 0
        for at in range(indptr[rows[i]], indptr[rows[i] + 1]):
            out[i, indices[at]] = data[at]


@kernel
def tally(rows, values, length, depth):
    """Add the number of entries of each row to ``length`` (row,) and the sum of their values to ``depth`` (row,)."""
    for e in range(len(rows)):
        length[rows[e]] += 1
        depth[rows[e]] += values[e]


@kernel
def append_entries(rows, columns, values, free, indices, data):
    """Write each entry to the next free slot of its row; ``free`` (row,) is updated."""
    for e in range(len(rows)):
        at = free[rows[e]]
        indices[at] = columns[e]
        data[at] = values[e]
        free[rows[e]] = at + 1


@inline
def _exp_all(x, out):
    """Fill ``out`` with e^x, in one long loop, since the rows of latents are too short to vectorise well."""
    flat, flat_out = x.reshape(x.size), out.reshape(out.size)
    for e in range(x.size):
        flat_out[e] = _exp(flat[e])


@kernel
def draw_cell(mean, log_variance, prior_mean, prior_log_variance, noise, variance, z, kl):
    """Kernel of ``loss.draw_cell``: fills ``variance`` and ``z``, (cell, dim) each, and ``kl`` (cell,)."""
    n, dims = mean.shape
    _exp_all(log_variance, variance)
    precision = np.empty(dims, np.float32)
    for d in range(dims):
        precision[d] = _exp(-prior_log_variance[d])
    for i in range(n):
        total = float32(0)
        for d in range(dims):
            off = mean[i, d] - prior_mean[i, d]
            total += (variance[i, d] + off * off) * precision[d] - float32(1) - log_variance[i, d]
            total += prior_log_variance[d]
            z[i, d] = mean[i, d] + noise[i, d] * np.sqrt(variance[i, d])
        kl[i] = float32(0.5) * total


@kernel
def draw_cell_backward(mean, prior_mean, prior_log_variance, variance, z, d_z, d_kl, d_mean, d_log, d_prior, d_spread):
    """Fills the derivatives with respect to mean, log variance and prior mean, (cell, dim) each, and adds those with
    respect to the prior log variance to ``d_spread`` (dim,)."""
    n, dims = mean.shape
    precision = np.empty(dims, np.float32)
    for d in range(dims):
        precision[d] = _exp(-prior_log_variance[d])
    for i in range(n):
        half = float32(0.5) * d_kl[i]
        for d in range(dims):
            ratio = variance[i, d] * precision[d]
            off = mean[i, d] - prior_mean[i, d]
            pull = d_kl[i] * off * precision[d]
            d_mean[i, d] = d_z[i, d] + pull
            d_prior[i, d] = -pull
            d_log[i, d] = float32(0.5) * d_z[i, d] * (z[i, d] - mean[i, d]) + half * (ratio - float32(1))
            d_spread[d] += half * (float32(1) - ratio - off * off * precision[d])
