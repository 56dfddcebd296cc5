"""Peaks of each bit, crowded neighbours fitted together.

A spot's radial profile, filter rings included, is measured from the bright peaks of its bit. All peaks of a bit are
then fitted by least squares, one after the other against what the others leave (as DAOPHOT does, Stetson 1987); what is
left is searched for the peaks that hid in a neighbour's flank, and all are fitted again.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.decoding import _peak_kernels as kernels
from merfish.imaging.normalize import locate_peaks, noise_of

PEAK_SIGMAS = 5.0  # height of a peak over the noise
PEAK_HEIGHT = 0.15  # and over a typical molecule's height
HIDDEN_HEIGHT = 0.25  # the same for peaks found when the others are taken out: a profile that fits badly leaves some
PASSES = 3  # of fitting all peaks; before each but the first, hidden ones are looked for
SWEEPS = 2  # over the peaks in each pass
CORE = 1.5  # pixel; around a peak, what its fit looks at
STIFFNESS = 0.02  # holds the place of a peak that is cut off by the border; a whole peak has about 2
MOST_STEP = 0.3  # pixel; a peak moves at most in one sweep
BINS = 4.0  # of the profile, a pixel
REACH = 4.5  # pixel; of the profile
PROFILE_PEAKS = 500  # a bit, at most, that the profile is measured from
STAY = 0.7  # of the threshold, below which a fitted peak is none
FEWEST_PEAKS = 30  # with fewer a bit is not crowded, and its profile is not known


def fit_peaks(image: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Peaks of one bit (plane * height, x) float32, normalised, whose light is taken out: x, y, height (peak,)."""
    threshold = max(PEAK_SIGMAS * noise_of(image), PEAK_HEIGHT)
    x, y, top = locate_peaks(image, height, threshold)
    profile = measure_profile(image, height, x, y, top)
    if profile is None:
        return x, y, top
    slope = np.gradient(profile) * BINS
    slope[0] = 0.0  # its top is smooth
    fresh = 0
    for step in range(PASSES):
        if step:
            fresh = len(x)
            # what the crowd added to the noise is gone
            threshold = max(PEAK_SIGMAS * noise_of(image), PEAK_HEIGHT)
            more = locate_peaks(image, height, max(threshold, HIDDEN_HEIGHT))
            x, y, top = (np.append(old, new) for old, new in zip((x, y, top), more, strict=True))
        kernels.fit_spots(image, height, fresh, x, y, top, profile, slope, BINS, CORE, STIFFNESS, MOST_STEP, SWEEPS)
    stay = top > threshold * STAY
    return x[stay], y[stay], top[stay]


def measure_profile(image: np.ndarray, height: int, x: np.ndarray, y: np.ndarray, top: np.ndarray) -> np.ndarray | None:
    """Radial profile (bin,) of a spot 1 high: the median over bright peaks, which neighbours hardly move.

    None when there are too few peaks.
    """
    margin = int(np.ceil(REACH)) + 1
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
    bins = int(REACH * BINS) + 1
    table = pd.Series(share.ravel()).groupby(np.rint(distance * BINS).astype(int).ravel()).median()
    profile = np.interp(np.arange(bins), table.index.to_numpy(), table.to_numpy())
    profile[-1] = 0.0
    return profile
