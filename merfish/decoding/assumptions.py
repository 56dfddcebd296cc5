"""Checks of what the pixel decoders assume: aligned bits, spots of about the usual width, an error-correcting code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from merfish.codebook import Codebook, min_distance
from merfish.decoding.psf import USUAL_SIGMA, middle, psf_sigma
from merfish.decoding.spots import gather_peaks, measure_shifts
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

# Of the calls of `pixels` kept at a misidentification rate of 5 %, 10 to 13 % were wrong in three of 24 simulated
# fields with shifts of 0.35 to 0.6 sigma of the PSF, but at most 6.6 % in 12 fields with smaller ones
MOST_SHIFT = 0.35  # sigmas of the PSF, along an axis
# 6.7 % were wrong with spots 1.63 times as wide as usual, 5.2 % with spots 1.33 times as wide, and 7.6 % with a
# codebook of distance 2 (benchmarks/results/robustness.md)
MOST_WIDTH = 1.48  # relative to `USUAL_SIGMA`
LEAST_DISTANCE = 3  # of the codebook; the smallest that corrects one error


class Optics(NamedTuple):
    """Measurements at the centre of a field.

    n_peaks: number of peaks of all bits. sigma: of the PSF, pixel. shift: of the bits relative to each other, root mean
    square along an axis, pixel.
    """

    n_peaks: int
    sigma: float
    shift: float


def measure_optics(
    stack: np.ndarray | Bandpassed, normalization: Normalization, height: int, filters: tuple[float, float]
) -> Optics:
    """Measure width and shifts of the spots of a field.

    stack: (bit, plane * height, x), band-passed. filters: see `psf_sigma`.
    """
    sigma = psf_sigma(stack, height, filters)
    part = middle(stack, height)
    fits = gather_peaks(part, normalization, part.shape[1], sigma, np.empty(part.shape, np.int8))
    shift = measure_shifts(fits, part.shape[1], sigma).spread
    return Optics(sum(len(fit.x) for fit in fits), sigma, shift)


def broken_assumptions(fields: Sequence[Optics], codebook: Codebook) -> list[str]:
    """Reasons why more calls of `pixels` and `hamming` may be wrong than stated; empty if there are none.

    Fields are weighted by their number of peaks.
    """
    reasons = []
    weight, sigmas, shifts = np.array(fields, float).reshape(-1, 3).T
    if weight.any():
        sigma, shift = np.average(sigmas, weights=weight), np.sqrt(np.average(shifts**2, weights=weight))
        if shift > MOST_SHIFT * sigma:
            reasons.append(
                f"the bits are shifted relative to each other: root mean square {shift:.1f} px along an axis"
            )
        if sigma > MOST_WIDTH * USUAL_SIGMA:
            reasons.append(f"the spots are wide: sigma {sigma:.1f} px; {USUAL_SIGMA} px is usual")
    distance = min_distance(codebook.codes)
    if distance < LEAST_DISTANCE:
        reasons.append(f"the codebook cannot correct errors: its minimum distance is {distance}")
    return reasons
