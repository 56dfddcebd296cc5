"""Kernels of the shift estimation; they take plain arrays and fill the ``out`` arrays."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel

FAR = 100.0  # squared residual relative to the variance, beyond which a weight is below the rounding error of 1


@kernel
def weigh_pairs(step, place, a, b, warp, share, width, chance, links, pull):
    """Weight pairs of peaks by the probability that both belong to one molecule, and sum the weights by pair of bits.

    step (pair, 2): y, x from the peak of bit ``a`` (pair,) to that of bit ``b`` (pair,). place (pair, term): the terms
    1, v, u in which the shift of a bit is linear. warp (bit, 2, term): coefficients of the shifts along y and x. A
    fraction ``share`` of the pairs is normally distributed about the difference of the shifts, with standard deviation
    ``width`` along each axis; the others are uniform, with density ``chance``.
    out: links (bit, bit, term, term), weighted sums of products of two terms, by a and b; pull (bit, 2, term), weighted
    sums of the steps to the bit, minus those from it, times the terms. Returns the sum of the weights, and the weighted
    sum of the squared residuals of the steps.
    """
    links[:] = 0.0
    pull[:] = 0.0
    total = scatter = 0.0
    top = share / (2 * np.pi * width**2)
    others = (1 - share) * chance
    n_terms = place.shape[1]
    for k in range(len(a)):
        i, j = a[k], b[k]
        off = 0.0
        for axis in range(2):
            rest = step[k, axis]
            for t in range(n_terms):
                rest -= (warp[j, axis, t] - warp[i, axis, t]) * place[k, t]
            off += rest * rest
        if off > FAR * width**2:
            continue
        near = top * np.exp(-off / (2 * width**2))
        weight = near / (near + others)
        for t in range(n_terms):
            part = weight * place[k, t]
            for u in range(n_terms):
                links[i, j, t, u] += part * place[k, u]
            for axis in range(2):
                pull[i, axis, t] -= part * step[k, axis]
                pull[j, axis, t] += part * step[k, axis]
        total += weight
        scatter += weight * off
    return total, scatter


@kernel
def shift_at(warp, bit, y, x):
    """Shift y, x (pixel) of a bit's image at y (within its plane), x; warp (bit, 2, 3): coefficients of 1, y, x."""
    down, across = warp[bit, 0], warp[bit, 1]
    return down[0] + down[1] * y + down[2] * x, across[0] + across[1] * y + across[2] * x
