"""Peaks of each bit, with crowded neighbours fitted together.

The profile of a spot, including the rings of the filter, is measured on the bright peaks of its bit: in ellipses if the
spots clearly are elliptical, else in circles. All peaks of a bit are then fitted by least squares, each in turn to the
residual of the others (as in DAOPHOT, Stetson 1987); the residual is searched for peaks hidden by a neighbour, and all
are fitted again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish.decoding import _peak_kernels as kernels
from merfish.decoding._peak_kernels import ROUND, Metric
from merfish.decoding.psf import crossing
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
# ratio of the axes of a filtered spot; smaller ones are ignored. On simulated round spots, ratios of 1.01 to 1.03 are
# measured on 300 of them, and up to 1.10 on 15
LEAST_RATIO = 1.1
MAJORITY_SIGMAS = 3.0  # standard errors by which most spots must fit an ellipse better than a circle
MISFIT_RADIUS = 2.0  # sigmas; most of the light of a spot is nearer
ORIENTATIONS = 4  # sectors of directions in which the width is measured
FEWEST_PEAKS = 30  # with fewer, a bit is not crowded and its profile cannot be measured


class Profile(NamedTuple):
    """Shape of the spots of one bit.

    height: (bin,) of a spot of height 1, by distance from its centre in bins of `BIN`. metric: that of
    distances; `ROUND` for round spots.
    """

    height: np.ndarray
    metric: Metric = ROUND


class Fit(NamedTuple):
    """Peaks of one bit: x, y (rows), height (peak,) float64, and their profile, None if unknown.

    noise: of the residual image, or of the image itself if the peaks were not fitted.
    """

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    profile: Profile | None
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


def shape_of(profile: Profile, sigma: float) -> kernels.Shape:
    """Shape of a spot from its profile; sigma: of the PSF, pixel."""
    height, metric = profile
    radius = np.arange(len(height)) * BIN * sigma
    fall = np.empty(len(height))
    fall[1:] = -np.gradient(height, radius)[1:] / radius[1:]
    fall[0] = fall[1]  # the top of the profile is smooth
    place = np.sqrt(np.arange(0, (radius[-1] / sigma) ** 2 + SQUARE_BIN, SQUARE_BIN)) * sigma
    across, down = float(np.sqrt(metric.yy)), float(np.sqrt(metric.xx))
    # squared distance of the corners of the rectangle around the points at distance 1
    corner = 2 * (metric.xx * metric.yy + abs(metric.xy) * across * down)
    beyond = np.zeros(int(np.ceil((corner - 1) * len(place))) + 1)
    height, fall = (np.append(np.interp(place, radius, values, right=0.0), beyond) for values in (height, fall))
    return kernels.Shape(
        metric, across, down, height, fall, 1 / (SQUARE_BIN * sigma**2), place[-1], CORE * sigma, STIFFNESS,
        MOST_STEP * sigma,
    )  # fmt: skip


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
) -> Profile | None:
    """Profile of a spot: medians over bright peaks, which are robust to neighbours.

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
    spots = kernels.Spots(x[chosen], y[chosen], top[chosen])
    by_sector = np.empty((ORIENTATIONS, round(REACH / BIN) + 1))
    kernels.spot_medians(image, spots, margin, ROUND, 1 / (BIN * sigma), by_sector)
    metric, usual = spot_metric(by_sector), median_profile(image, spots, margin, ROUND, sigma)
    if metric == ROUND:
        return usual
    elliptical = median_profile(image, spots, margin, metric, sigma)
    # hot pixels among the peaks can make round spots seem elliptical, but most of the spots are then round
    better = misfit(image, spots, elliptical, sigma) < misfit(image, spots, usual, sigma)
    return elliptical if better.mean() > 0.5 + MAJORITY_SIGMAS * 0.5 / np.sqrt(len(better)) else usual


def median_profile(image: np.ndarray, spots: kernels.Spots, margin: int, metric: Metric, sigma: float) -> Profile:
    """Profile with the given metric, of medians over ``spots``, which are at least ``margin`` from the border."""
    medians = np.empty((1, round(REACH / BIN) + 1))
    kernels.spot_medians(image, spots, margin, metric, 1 / (BIN * sigma), medians)
    known = np.flatnonzero(np.isfinite(medians[0]))
    height = np.interp(np.arange(medians.shape[1]), known, medians[0, known])
    height[-1] = 0.0
    return Profile(height, metric)


def misfit(image: np.ndarray, spots: kernels.Spots, profile: Profile, sigma: float) -> np.ndarray:
    """Mean absolute difference (peak,) of ``image`` from ``profile`` around each spot, relative to its height."""
    reach = int(np.ceil(MISFIT_RADIUS * sigma))
    down, across = (part.ravel() for part in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    inside = np.hypot(down, across) <= MISFIT_RADIUS * sigma
    rows, columns = np.rint(spots.y)[:, None] + down[inside], np.rint(spots.x)[:, None] + across[inside]
    dx, dy = columns - spots.x[:, None], rows - spots.y[:, None]
    place = np.sqrt(kernels.squared_distance(dx, dy, profile.metric)) / (BIN * sigma)
    expected = np.interp(place, np.arange(len(profile.height)), profile.height)
    return np.abs(image[rows.astype(int), columns.astype(int)] / spots.top[:, None] - expected).mean(1)


def spot_metric(profiles: np.ndarray) -> Metric:
    """Metric in which spots are round, `ROUND` if the ratio of their axes is below `LEAST_RATIO`.

    profiles (sector, bin): heights by distance in sectors of directions, see `_peak_kernels.spot_medians`. In the
    direction a, 1 / radius^2 at half the height is even + plus cos 2a + cross sin 2a.
    """
    bins = np.arange(profiles.shape[1], dtype=float)
    radii = np.array([crossing(bins, np.append(1.0, part[1:])) for part in profiles])
    if not np.isfinite(radii).all():
        return ROUND
    angle = np.arange(len(radii)) * np.pi / len(radii)
    square = radii**-2.0
    blur = np.sinc(1 / len(radii))  # mean over a sector of the cosine of twice the angle from its middle
    even, plus, cross = square.mean(), *(2 / blur * (square * wave(2 * angle)).mean() for wave in (np.cos, np.sin))
    uneven = np.hypot(plus, cross)
    if even + uneven < LEAST_RATIO**2 * (even - uneven):
        return ROUND
    root = np.sqrt(even**2 - uneven**2)
    return Metric(float((even + plus) / root), float(cross / root), float((even - plus) / root))
