"""The loop that fits the shifts of the bits: plain arrays in, ``out`` arrays filled."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel


@kernel
def weigh_pairs(step, a, b, shift, share, width, chance, links, pull):
    """Weigh pairs of peaks by how likely they belong to one molecule, and sum over the pairs of each two bits.

    step (pair, 2): from the peak of bit ``a`` (pair,) to that of ``b``; shift (bit, 2) y, x. Of the pairs ``share`` lie
    about the difference of the shifts, with sigma ``width``, the others anywhere, with density ``chance``.
    out: links (bit, bit), sum of the weights by a and b; pull (bit, 2), sum of the weighted steps to the bit, less
    those from it. Returns the sum of the weights, and the weighted sum of squares of the steps that the
    shifts do not explain.
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
