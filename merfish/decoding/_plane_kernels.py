"""Kernel that measures molecules in adjacent planes; takes plain arrays and fills the ``out`` array."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel
from merfish.decoding._alignment_kernels import shift_at
from merfish.decoding._spot_kernels import nearest_peak, sample


@kernel
def light_by_plane(first, last, x, y, bits, scene, out):
    """Mean height over its bits of each molecule ``first`` to ``last`` - 1, in the plane below, its own and that above.

    x, y (rows), bits (molecule,) uint64: the bits to average. scene: see `_spot_kernels.Scene`; a bit has the height of
    its nearest peak or, without one, of the residual. out: (molecule, 3) float64, NaN without a plane or without bits.
    """
    height = scene.height
    n_bits, n_rows = scene.light.shape[0], scene.light.shape[1]
    for m in range(first, last):
        plane = int(y[m]) // height
        for k in range(3):
            top = (plane + k - 1) * height
            out[m, k] = np.nan
            if top < 0 or top >= n_rows:
                continue
            row = y[m] + (k - 1) * height
            total, n = 0.0, 0
            for bit in range(n_bits):
                if (bits[m] >> np.uint64(bit)) & np.uint64(1):
                    n += 1
                    i = nearest_peak(scene, x[m], row, bit)
                    if i >= 0:
                        total += scene.pa[i]
                    else:
                        down, across = shift_at(scene.warp, bit, row - top, x[m])
                        v, u = row + down, x[m] + across
                        total += scene.step * sample(scene.light[bit], v, u, top, top + height - 1)
            if n:
                out[m, k] = total / n
