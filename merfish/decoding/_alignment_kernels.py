"""Kernel of the shift estimation; takes plain arrays and fills the ``out`` arrays."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel


@kernel
def weigh_pairs(step, a, b, shift, share, width, chance, links, pull):
    """Weight pairs of peaks by the probability that both belong to one molecule, and sum the weights by pair of bits.

    step (pair, 2): y, x from the peak of bit ``a`` (pair,) to that of bit ``b`` (pair,). shift (bit, 2): y, x. A
    fraction ``share`` of the pairs is normally distributed about the difference of the shifts, with standard deviation
    ``width`` along each axis; the others are uniform, with density ``chance``.
    out: links (bit, bit), sum of the weights by a and b; pull (bit, 2), weighted sum of the steps to the bit minus
    those from it. Returns the sum of the weights, and the weighted sum of the squared residuals of the steps.
    """
    links[:] = 0.0
    pull[:] = 0.0
    total = scatter = 0.0
    top = share / (2 * np.pi * width**2)
    others = (1 - share) * chance
    for k in range(len(a)):
        i, j = a[k], b[k]
        off = (step[k, 0] - shift[j, 0] + shift[i, 0]) ** 2 + (step[k, 1] - shift[j, 1] + shift[i, 1]) ** 2
        near = top * np.exp(-off / (2 * width**2))
        weight = near / (near + others)
        links[i, j] += weight
        for axis in range(2):
            pull[i, axis] -= weight * step[k, axis]
            pull[j, axis] += weight * step[k, axis]
        total += weight
        scatter += weight * off
    return total, scatter
