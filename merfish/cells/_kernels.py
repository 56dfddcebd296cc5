"""Numba kernels of the segmentation."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel


@kernel
def flood(level, mask, n_levels, labels):
    """Grow labels over a mask in order of increasing level; a pixel takes the first label that reaches it by its sides.

    level: (z, y, x) integers from 0 to n_levels - 1. mask: (z, y, x) bool. labels: (z, y, x) int32, 0 for unlabelled
    pixels, updated in place. Each level has a queue, in which pixels wait in the order in which they were reached.
    """
    depth, height, width = level.shape
    following = np.full(level.size, -1, np.int32)
    first, last = np.full(n_levels, -1, np.int32), np.full(n_levels, -1, np.int32)
    lowest = n_levels
    for pixel in range(level.size):
        z, y, x = pixel // (width * height), pixel // width % height, pixel % width
        if labels[z, y, x]:
            at = level[z, y, x]
            lowest = min(lowest, at)
            if first[at] < 0:
                first[at] = pixel
            else:
                following[last[at]] = pixel
            last[at] = pixel
    while lowest < n_levels:
        pixel = first[lowest]
        if pixel < 0:
            lowest += 1
            continue
        first[lowest] = following[pixel]
        z, y, x = pixel // (width * height), pixel // width % height, pixel % width
        for side in range(6):
            v, u = y + (side == 2) - (side == 0), x + (side == 3) - (side == 1)
            w = z + (side == 5) - (side == 4)
            if w < 0 or v < 0 or u < 0 or w >= depth or v >= height or u >= width or labels[w, v, u]:
                continue
            if not mask[w, v, u]:
                continue
            labels[w, v, u] = labels[z, y, x]
            at, reached = level[w, v, u], (w * height + v) * width + u
            if first[at] < 0:
                first[at] = reached
            else:
                following[last[at]] = reached
            last[at] = reached
            lowest = min(lowest, at)


@kernel
def uniform(labels, reach, out):
    """Fill out, bool (y, x): whether all pixels at most ``reach`` away along both axes have the same label."""
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            same = True
            for v in range(max(y - reach, 0), min(y + reach + 1, height)):
                for u in range(max(x - reach, 0), min(x + reach + 1, width)):
                    if labels[v, u] != labels[y, x]:
                        same = False
                        break
                if not same:
                    break
            out[y, x] = same
