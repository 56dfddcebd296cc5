"""The loop over the planes of the spot decoder: plain arrays in, ``out`` array filled."""

from __future__ import annotations

import numpy as np

from merfish._jit import parallel_kernel, prange
from merfish.decoding._spot_kernels import sample


@parallel_kernel
def light_by_plane(x, y, bits, scene, radius, out):
    """Mean height of each molecule's bits at its place in the plane below, in its own and in the plane above.

    x, y (rows), bits (molecule,) uint64: the bits looked at. scene: peaks and light, see `_spot_kernels.Scene`; radius:
    pixel, at most the grid's cell, within which a peak belongs to the molecule; without a peak the light is taken.
    out: (molecule, 3) float64, NaN where there is no plane, and without bits.
    """
    px, py, pa, pb, cell, height = scene.px, scene.py, scene.pa, scene.pb, scene.cell, scene.height
    start, order, n_across = scene.start, scene.order, scene.n_across
    n_bits, n_rows = scene.light.shape[0], scene.light.shape[1]
    n_cells = len(start) - 1
    for m in prange(len(x)):
        plane = int(y[m]) // height
        for k in range(3):
            first = (plane + k - 1) * height
            out[m, k] = np.nan
            if first < 0 or first >= n_rows:
                continue
            row = y[m] + (k - 1) * height
            nearest = np.full(n_bits, radius * radius)
            seen = np.full(n_bits, np.nan)
            for r in range(int(row / cell) - 1, int(row / cell) + 2):
                for c in range(int(x[m] / cell) - 1, int(x[m] / cell) + 2):
                    if r < 0 or c < 0 or c >= n_across or r * n_across + c >= n_cells:
                        continue
                    for place in range(start[r * n_across + c], start[r * n_across + c + 1]):
                        i = order[place]
                        d = (px[i] - x[m]) ** 2 + (py[i] - row) ** 2
                        if d < nearest[pb[i]] and int(py[i]) // height == plane + k - 1:
                            nearest[pb[i]] = d
                            seen[pb[i]] = pa[i]
            total, n = 0.0, 0
            for bit in range(n_bits):
                if (bits[m] >> np.uint64(bit)) & np.uint64(1):
                    n += 1
                    if np.isnan(seen[bit]):
                        v, u = row + scene.shift_y[bit], x[m] + scene.shift_x[bit]
                        total += scene.step * sample(scene.light[bit], v, u, first, first + height - 1)
                    else:
                        total += seen[bit]
            out[m, k] = total / n
