"""Checks of what the pixel decoders assume: aligned bits, spots of about the usual width, an error-correcting code."""

from __future__ import annotations

import numpy as np

from merfish.codebook import Codebook, min_distance
from merfish.decoding.psf import USUAL_SIGMA, middle, psf_sigma
from merfish.decoding.spots import gather_peaks, measure_shifts
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

# Of the calls of `pixels` kept at a misidentification rate of 5 %, 6.6 to 7.6 % were wrong in simulated fields with
# shifts of 0.59 sigma of the PSF, with spots 1.63 times as wide as usual, and with a codebook of distance 2; 5.2 to
# 5.3 % with shifts of 0.3 sigma and with spots 1.33 times as wide (benchmarks/results/robustness.md). The limits lie
# half-way between.
MOST_SHIFT = 0.45  # sigmas of the PSF, along an axis
MOST_WIDTH = 1.48  # relative to `USUAL_SIGMA`
LEAST_DISTANCE = 3  # of the codebook; the smallest that corrects one error


def broken_assumptions(
    stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization, height: int
) -> list[str]:
    """Reasons why more calls of `pixels` and `hamming` may be wrong than stated; empty if there are none.

    stack: (bit, plane * height, x), band-passed.
    """
    sigma = psf_sigma(stack, height)
    part = middle(stack, height)
    fits = gather_peaks(part, normalization, part.shape[1], sigma, np.empty(part.shape, np.int8))
    shift = measure_shifts(fits, part.shape[1], sigma).spread
    reasons = []
    if shift > MOST_SHIFT * sigma:
        reasons.append(f"the bits are shifted relative to each other: root mean square {shift:.1f} px along an axis")
    if sigma > MOST_WIDTH * USUAL_SIGMA:
        reasons.append(f"the spots are wide: sigma {sigma:.1f} px; {USUAL_SIGMA} px is usual")
    distance = min_distance(codebook.codes)
    if distance < LEAST_DISTANCE:
        reasons.append(f"the codebook cannot correct errors: its minimum distance is {distance}")
    return reasons
