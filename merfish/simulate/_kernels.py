"""Numba kernels of `merfish.simulate`."""

from __future__ import annotations

import math

import numpy as np

from merfish._jit import kernel


@kernel
def _pixel_shares(centre, sigma, first, share):
    """Fraction of a 1-D Gaussian within each pixel ``first + i`` (pixel i covers i - 0.5 to i + 0.5)."""
    scale = 1.0 / (sigma * math.sqrt(2.0))
    below = math.erf((first - 0.5 - centre) * scale)
    for i in range(len(share)):
        above = math.erf((first + i + 0.5 - centre) * scale)
        share[i] = 0.5 * (above - below)
        below = above


@kernel
def add_spot(image, y, x, flux, sigma, ratio=1.0):
    """Add a pixel-integrated Gaussian of total ``flux`` at (y, x) to ``image`` (y, x), truncated at 5 sigma.

    sigma: geometric mean of the widths along y and x, whose ratio is ``ratio``.
    """
    height, width = image.shape
    sigma_y, sigma_x = sigma * math.sqrt(ratio), sigma / math.sqrt(ratio)
    reach_y, reach_x = math.ceil(5.0 * sigma_y), math.ceil(5.0 * sigma_x)
    top = max(math.floor(y) - reach_y, 0)
    bottom = min(math.floor(y) + reach_y + 2, height)
    left = max(math.floor(x) - reach_x, 0)
    right = min(math.floor(x) + reach_x + 2, width)
    if top >= bottom or left >= right:
        return
    down = np.empty(bottom - top)
    across = np.empty(right - left)
    _pixel_shares(y, sigma_y, top, down)
    _pixel_shares(x, sigma_x, left, across)
    for i in range(bottom - top):
        row = flux * down[i]
        for j in range(right - left):
            image[top + i, left + j] += np.float32(row * across[j])


@kernel
def render_spots(first, last, y, x, z, flux, sigma, ratio, focal_range, image):
    """Add the spots of all molecules to every plane of the bits ``first`` to ``last`` - 1.

    y, x (bit, molecule) pixels, in the image of each bit; z (molecule,) plane index; flux (bit, molecule) total
    photons, 0 = dark; sigma (bit,) pixels in focus, ratio: see `add_spot`; out: image (bit, z, y, x) float32, added to.
    Out of focus, a spot widens like a Gaussian beam at constant flux, sigma * sqrt(1 + (dz / focal_range)^2), with dz
    and focal_range in planes.
    Each bit is rendered by one thread, so that sums do not depend on the number of threads.
    """
    n_planes = image.shape[1]
    for bit in range(first, last):
        for m in range(flux.shape[1]):
            if flux[bit, m] <= 0.0:
                continue
            for plane in range(n_planes):
                wide = sigma[bit]
                if n_planes > 1:
                    defocus = (plane - z[m]) / focal_range
                    wide *= math.sqrt(1.0 + defocus * defocus)
                    if wide > 8.0 * sigma[bit]:
                        continue  # the peak is below 2 % of that in focus
                add_spot(image[bit, plane], y[bit, m], x[bit, m], flux[bit, m], wide, ratio)
