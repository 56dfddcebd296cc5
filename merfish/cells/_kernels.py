"""The loops of the segmentation: plain arrays in, labels or ``out`` filled."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel


@kernel
def flood(level, mask, n_levels, labels):
    """Grow the labels over the mask, lowest levels first, 4-connected; a pixel takes the label that reaches it first.

    level (y, x) integers from 0 to n_levels - 1; mask (y, x) bool; labels (y, x) int32, 0 where unknown, updated.
    Each level has a queue, in which pixels wait in the order in which they were reached.
    """
    height, width = level.shape
    following = np.full(height * width, -1, np.int32)
    first, last = np.full(n_levels, -1, np.int32), np.full(n_levels, -1, np.int32)
    lowest = n_levels
    for pixel in range(height * width):
        if labels[pixel // width, pixel % width]:
            at = level[pixel // width, pixel % width]
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
        y, x = pixel // width, pixel % width
        for side in range(4):
            v, u = y + (side == 2) - (side == 0), x + (side == 3) - (side == 1)
            if v < 0 or u < 0 or v >= height or u >= width or labels[v, u] or not mask[v, u]:
                continue
            labels[v, u] = labels[y, x]
            at, reached = level[v, u], v * width + u
            if first[at] < 0:
                first[at] = reached
            else:
                following[last[at]] = reached
            last[at] = reached
            lowest = min(lowest, at)


@kernel
def uniform(labels, reach, out):
    """Whether all pixels at most ``reach`` away along both axes have the label of the middle one; out bool (y, x)."""
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
