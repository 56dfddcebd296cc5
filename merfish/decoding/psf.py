"""Width of the point spread function (PSF), measured on the spots of a band-passed stack."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from merfish._jit import map_bits
from merfish.config import FILTER_SIGMAS
from merfish.decoding import _peak_kernels as kernels
from merfish.imaging.normalize import NoiseMap, locate_peaks
from merfish.imaging.preprocess import Bandpassed

USUAL_SIGMA = 1.35  # pixel; the width for which the filters of `merfish.config` are given; used if there are few spots
RANGE = (0.6, 5.0)  # pixel; a narrower peak is a single pixel, a wider one is not a spot
CLEAR = 8.0  # minimum height of the spots that are used, relative to the noise
FEWEST_SPOTS = 30
MOST_SPOTS = 500  # spots of a bit, of the brighter half: dim neighbours and noise then have little influence
SIDE = 512  # pixel, of the region at the centre of the field that is measured
STEP = 0.25  # pixel, of the profile


def psf_sigma(
    stack: np.ndarray | Bandpassed, height: int, filters: tuple[float, float] = FILTER_SIGMAS["spots"]
) -> float:
    """Sigma of the PSF in pixels, the median over bits.

    stack: (bit, plane * height, x), band-passed. filters: sigmas of smoothing and background of the band-pass, pixel;
    used only if ``stack`` is an array. Sigma is that of the Gaussian which, integrated over pixels and band-passed in
    the same way, falls to half its maximum at the same radius as the median profile of the clear spots. It is
    `USUAL_SIGMA` if no bit has enough spots.
    """
    if isinstance(stack, Bandpassed) and stack.sigma is not None:
        return stack.sigma
    part = middle(stack, height)
    if isinstance(stack, Bandpassed):
        filters = stack.smoothing, stack.background
    radii = np.array(map_bits(half_radius, part))
    radii = radii[np.isfinite(radii)]
    sigma = float(np.median(np.interp(radii, *_half_radii(*filters)))) if len(radii) else USUAL_SIGMA
    if isinstance(stack, Bandpassed):
        stack.sigma = sigma
    return sigma


@lru_cache
def _half_radii(smoothing: float, background: float) -> tuple[np.ndarray, np.ndarray]:
    """Table of `expected_half_radius`: radii and sigmas, pixel."""
    sigmas = np.linspace(*RANGE, 100)
    return np.array([expected_half_radius(sigma, smoothing, background) for sigma in sigmas]), sigmas


def middle(stack: np.ndarray | Bandpassed, height: int) -> np.ndarray | Bandpassed:
    """The centre of the middle plane of each bit, at most `SIDE` pixels along each axis."""
    first = stack.shape[1] // height // 2 * height
    down, across = (slice((n - min(n, SIDE)) // 2, (n + min(n, SIDE)) // 2) for n in (height, stack.shape[2]))
    if isinstance(stack, np.ndarray):
        return stack[:, first + down.start : first + down.stop, across]
    part = stack.images[:, first // height, down, across]
    return Bandpassed(part, smoothing=stack.smoothing, background=stack.background, leaks=stack.leaks)


def half_radius(image: np.ndarray) -> float:
    """Radius (pixel) at which the spots of a filtered image (y, x) fall to half their maximum; NaN if there are few."""
    noise = NoiseMap.of(image, len(image))
    x, y, top = locate_peaks(image, len(image), CLEAR * noise.least)
    margin = int(RANGE[1]) + 2
    clear = (top > CLEAR * noise.sigma(x, y)) & (np.minimum(x, y) > margin)
    clear &= (x < image.shape[1] - margin) & (y < image.shape[0] - margin)
    if clear.sum() < FEWEST_SPOTS:
        return np.nan
    chosen = np.flatnonzero(clear & (top >= np.median(top[clear])))[:MOST_SPOTS]
    profile = np.empty((1, int(RANGE[1] / STEP)))
    kernels.spot_medians(
        image, kernels.Spots(x[chosen], y[chosen], top[chosen]), margin, kernels.ROUND, 1 / STEP, profile
    )
    return crossing(np.arange(profile.shape[1]) * STEP, profile[0])


def expected_half_radius(sigma: float, smoothing: float, background: float) -> float:
    """Radius (pixel) at which a Gaussian spot, integrated over pixels and band-passed, falls to half its maximum."""
    radius = np.arange(0, 3 * RANGE[1], STEP)
    near, far = (sigma**2 + 1 / 12 + width**2 for width in (smoothing, background))
    profile = np.exp(-(radius**2) / (2 * near)) / near - np.exp(-(radius**2) / (2 * far)) / far
    return crossing(radius, profile / profile[0])


def crossing(radius: np.ndarray, profile: np.ndarray) -> float:
    """Radius at which a profile first falls below one half, interpolated linearly; NaN if it does not."""
    known = np.isfinite(profile)
    radius, profile = radius[known], profile[known]
    below = np.flatnonzero(profile < 0.5)
    if not len(below) or below[0] == 0:
        return np.nan
    k = below[0]
    return float(np.interp(0.5, profile[[k, k - 1]], radius[[k, k - 1]]))
