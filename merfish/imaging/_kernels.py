"""The Numba loops of this folder."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel, parallel_kernel, prange

TAPS = 16
_ROWS = 32  # a strip of so many rows, filtered along x, stays in a core's cache while it is filtered along y


@parallel_kernel
def shift_planes(planes, starts, weights_y, weights_x, out):
    """Resample planes (plane, y, x) at (y + dy, x + dx) into ``out`` float32, as two passes of `TAPS` taps.

    starts: (plane, 2) int64, first row and column under the taps for output row and column 0; weights_y, weights_x:
    (plane, TAPS) float32. Beyond the edges the image is mirrored about its outermost pixels.
    """
    n_planes, height, width = planes.shape
    strips = (height + _ROWS - 1) // _ROWS
    for task in prange(n_planes * strips):
        p = task // strips
        first = (task % strips) * _ROWS
        last = min(first + _ROWS, height)
        n_rows = last - first + TAPS - 1
        padded = np.empty(width + TAPS - 1, np.float32)
        rows = np.empty((n_rows, width), np.float32)
        for r in range(n_rows):
            source = planes[p, _mirror(first + r + starts[p, 0], height)]
            for c in range(width + TAPS - 1):
                column = c + starts[p, 1]
                if column < 0 or column >= width:
                    column = _mirror(column, width)
                padded[c] = source[column]
            row = rows[r]
            row[:] = 0.0
            for t in range(TAPS):
                weight = weights_x[p, t]
                if weight != 0.0:
                    for c in range(width):
                        row[c] += weight * padded[c + t]
        for r in range(first, last):
            target = out[p, r]
            target[:] = 0.0
            for t in range(TAPS):
                weight = weights_y[p, t]
                if weight != 0.0:
                    row = rows[r - first + t]
                    for c in range(width):
                        target[c] += weight * row[c]


@kernel
def _mirror(index, size):
    """The pixel that stands for ``index`` when the image is mirrored about its outermost pixels."""
    if size == 1:
        return 0
    period = 2 * size - 2
    index = index % period
    return index if index < size else period - index


@parallel_kernel
def remove_hot_pixels(image, out):
    """Copy ``image`` (y, x) to float32 ``out``; a pixel far above all its neighbours takes the highest of them.

    "Far" is 4 times the range of the neighbours: light that went through a lens, even a spot of sigma 0.7 px, does
    not fall so steeply. Such pixels stay in place while the sample drifts.
    """
    height, width = image.shape
    for y in prange(height):
        for x in range(width):
            value = np.float32(image[y, x])
            low = np.float32(np.inf)
            high = np.float32(-np.inf)
            for v in range(max(0, y - 1), min(height, y + 2)):
                for u in range(max(0, x - 1), min(width, x + 2)):
                    if v != y or u != x:
                        other = np.float32(image[v, u])
                        low = min(low, other)
                        high = max(high, other)
            out[y, x] = high if value - low > 4 * (high - low) else value
