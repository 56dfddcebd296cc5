"""Peaks of each bit, with crowded neighbours fitted together.

The radial profile of a spot, including the rings of the filter, is measured on the bright peaks of its bit. All peaks
of a bit are then fitted by least squares, each in turn to the residual of the others (as in DAOPHOT, Stetson 1987); the
residual is searched for peaks hidden by a neighbour, and all are fitted again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish.decoding import _peak_kernels as kernels
from merfish.imaging.normalize import NoiseMap, locate_peaks

PEAK_SIGMAS = 5.0  # height of a peak relative to the local noise
PEAK_HEIGHT = 0.15  # and relative to a typical molecule's height
HIDDEN_HEIGHT = 0.25  # the same for peaks found in the residual, where a poor fit of the profile leaves some
PASSES = 6  # maximum number of fits of all peaks; hidden peaks are searched for before each but the first
FEW_MORE = 0.01  # relative to the number of peaks; with fewer new ones there is no further pass
SHARE_SWEEPS = 12  # sweeps over peaks with known positions; two 0.6 sigma apart then reach 0.9 of their heights
SWEEPS = 2  # sweeps over the peaks in each pass
SETTLED = 0.004  # of a molecule's height, or pixel; smaller changes of a height or position are skipped
STIFFNESS = 0.02  # regularises the position of a peak cut off by the border; a whole peak has about 2
# lengths in sigmas of the PSF
CORE = 1.1  # radius of the fit of a peak
MOST_STEP = 0.22  # largest move of a peak in one sweep
BIN = 0.185  # of the profile
SQUARE_BIN = 0.1  # squared; bin of the profile by squared distance, which needs no square root and is fine enough
REACH = 3.33  # radius of the profile
TOUCHING = 1.5  # peaks closer than this to a crowded molecule are fitted with it
PROFILE_PEAKS = 500  # approximate maximum number of peaks of a bit on which the profile is measured
STAY = 0.7  # relative to the threshold; fitted peaks below it are dropped
FEWEST_PEAKS = 30  # with fewer, a bit is not crowded and its profile cannot be measured


class Fit(NamedTuple):
    """Peaks of one bit: x, y (rows), height (peak,) float64, and their radial profile (bin,), None if unknown.

    noise: of the residual image, or of the image itself if the peaks were not fitted.
    """

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    profile: np.ndarray | None
    noise: NoiseMap


def fit_peaks(image: np.ndarray, height: int, sigma: float) -> Fit:
    """Find and fit the peaks of one bit, and subtract them from the image.

    image: (plane * height, x) float32, normalised; the residual on return. sigma: of the PSF, pixel. With fewer than
    `FEWEST_PEAKS` peaks there is no fit, and the image is not changed.
    """
    noise = NoiseMap.of(image, height)
    x, y, top = _peaks_above(image, height, noise, PEAK_HEIGHT)
    profile = measure_profile(image, height, x, y, top, sigma)
    if profile is None:
        return Fit(x, y, top, None, noise)
    fresh = 0
    for step in range(PASSES):
        if step:
            fresh = len(x)
            noise = NoiseMap.of(image, height)  # of the residual
            more = _peaks_above(image, height, noise, HIDDEN_HEIGHT)
            x, y, top = (np.append(old, new) for old, new in zip((x, y, top), more, strict=True))
        fit_together(image, height, Fit(x, y, top, profile, noise), fresh, sigma)
        if step > 1 and len(x) - fresh < FEW_MORE * len(x):
            break
    stay = top > STAY * threshold(noise, x, y, PEAK_HEIGHT)
    return Fit(x[stay], y[stay], top[stay], profile, noise)


def fit_together(image: np.ndarray, height: int, fit: Fit, fresh: int, sigma: float) -> None:
    """Fit the peaks of one bit to the residual image, from which those from ``fresh`` on are not subtracted yet."""
    if fit.profile is not None:
        spots = kernels.Spots(fit.x, fit.y, fit.height)
        kernels.fit_spots(image, height, spots, fresh, shape_of(fit.profile, sigma), SWEEPS, SETTLED)


def shape_of(profile: np.ndarray, sigma: float) -> kernels.Shape:
    """Shape of a spot from its radial profile (bin,) in bins of `BIN`; sigma: of the PSF, pixel."""
    radius = np.arange(len(profile)) * BIN * sigma
    fall = np.empty(len(profile))
    fall[1:] = -np.gradient(profile, radius)[1:] / radius[1:]
    fall[0] = fall[1]  # the top of the profile is smooth
    place = np.sqrt(np.arange(0, (radius[-1] / sigma) ** 2 + SQUARE_BIN, SQUARE_BIN)) * sigma
    beyond = np.zeros(len(place) + 1)  # to the corners of a square
    profile, fall = (np.append(np.interp(place, radius, values, right=0.0), beyond) for values in (profile, fall))
    return kernels.Shape(
        profile, fall, 1 / (SQUARE_BIN * sigma**2), place[-1], CORE * sigma, STIFFNESS, MOST_STEP * sigma
    )


def share_peaks(
    left: np.ndarray, height: int, fit: Fit, mine: np.ndarray, x: np.ndarray, y: np.ndarray, sigma: float
) -> Fit:
    """Replace the peaks of crowded molecules in a bit by one at the position of each molecule.

    left: (row, x) float32, the residual, updated. mine: (peak,) bool, the peaks to replace. x, y (rows) (molecule,):
    positions of the molecules, some of which are off in this bit. The heights are fitted together, weak peaks are
    dropped, and the positions of the others are refined.
    """
    assert fit.profile is not None  # without a profile no peaks are shared
    shape = shape_of(fit.profile, sigma)
    px, py = np.concatenate([x, fit.x[~mine]]), np.concatenate([y, fit.y[~mine]])
    top = np.concatenate([np.zeros(len(x)), fit.height[~mine]])
    kernels.add_spots(left, height, kernels.Spots(fit.x[mine], fit.y[mine], fit.height[mine]), shape)
    touched = np.empty(len(px), bool)
    kernels.find_near(x, y, px, py, TOUCHING * sigma, touched)
    together = np.flatnonzero(touched)
    kernels.share_light(left, height, kernels.Spots(px, py, top), together, shape, SHARE_SWEEPS, SETTLED)
    stay = top > STAY * threshold(fit.noise, px, py, PEAK_HEIGHT)
    kernels.add_spots(left, height, kernels.Spots(px[~stay], py[~stay], top[~stay]), shape)
    px, py, top, touched = px[stay], py[stay], top[stay], touched[stay]
    part = fit._replace(x=px[touched], y=py[touched], height=top[touched])
    fit_together(left, height, part, len(part.x), sigma)
    px[touched], py[touched], top[touched] = part.x, part.y, part.height
    return fit._replace(x=px, y=py, height=top)


def threshold(noise: NoiseMap, x: np.ndarray, y: np.ndarray, least: float) -> np.ndarray:
    """Minimum height (peak,) of a peak at x, y (rows): clear of the noise, and at least ``least``."""
    return np.maximum(np.maximum(noise.level(x, y), 0.0) + PEAK_SIGMAS * noise.sigma(x, y), least)


def _peaks_above(
    image: np.ndarray, height: int, noise: NoiseMap, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, top = locate_peaks(image, height, max(PEAK_SIGMAS * noise.least, least))
    clear = top > threshold(noise, x, y, least)
    return x[clear], y[clear], top[clear]


def measure_profile(
    image: np.ndarray, height: int, x: np.ndarray, y: np.ndarray, top: np.ndarray, sigma: float
) -> np.ndarray | None:
    """Radial profile (bin,) of a spot of height 1: the median over bright peaks, which is robust to neighbours.

    None if there are too few peaks.
    """
    margin = int(np.ceil(REACH * sigma)) + 1
    whole = (
        (x > margin) & (x < image.shape[1] - 1 - margin) & (y % height > margin) & (y % height < height - 1 - margin)
    )
    if whole.sum() < FEWEST_PEAKS:
        return None
    bright = np.flatnonzero(whole & (top >= np.median(top[whole])))
    chosen = bright[:: max(len(bright) // PROFILE_PEAKS, 1)]
    around = np.arange(-margin + 1, margin)
    rows = np.rint(y[chosen]).astype(int)[:, None, None] + around[:, None]
    columns = np.rint(x[chosen]).astype(int)[:, None, None] + around
    distance = np.hypot(rows - y[chosen, None, None], columns - x[chosen, None, None])
    share = image[rows, columns] / top[chosen, None, None]
    bins = round(REACH / BIN) + 1
    bin_of = np.rint(distance / (BIN * sigma)).astype(np.int16).ravel()
    order = np.argsort(bin_of, kind="stable")
    counts = np.bincount(bin_of)
    known = np.flatnonzero(counts)
    medians = [np.median(part) for part in np.split(share.ravel()[order], np.cumsum(counts[known])[:-1])]
    profile = np.interp(np.arange(bins), known, medians)
    profile[-1] = 0.0
    return profile
