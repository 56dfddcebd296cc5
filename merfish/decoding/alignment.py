"""Residual shift of each bit of a field, estimated from the peaks.

A molecule has a peak in each of its on-bits. Among all pairs of nearby peaks of different bits, the displacements
within one molecule scatter about the difference of the two bits' shifts, and all others are uniform. A mixture of the
two is fitted, starting from a width that covers any shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from merfish.decoding._alignment_kernels import weigh_pairs

# lengths in sigmas of the PSF
REACH = 4.0  # two peaks of one molecule are closer than this
WIDTHS = (1.2, 0.8, 0.5, 0.3)  # scatter of the pairs about the shift, from one that covers any shift to the final one
ITERATIONS = 4  # at each width
FREE = 6  # iterations with the width fitted
NARROWEST = 0.03
USUAL_SHIFT = 1.0  # prior sigma of the shifts; a bit without pairs is not shifted
MOST_PAIRS = 30_000  # pairs; enough to measure a shift to 0.01 px


@dataclass(frozen=True, eq=False)
class BitShifts:
    """Shifts of the bits of a field.

    shift: (bit, 2) float64, y, x in pixel, of a bit's image relative to the mean of all bits. pairs: (bit,) float64,
    number of pairs of peaks of one molecule that include the bit. width: pixel, standard deviation of the displacement
    of such a pair along an axis; NaN without pairs.
    """

    shift: np.ndarray
    pairs: np.ndarray
    width: float


def bit_shifts(
    x: np.ndarray, y: np.ndarray, plane: np.ndarray, bit: np.ndarray, n_bits: int, sigma: float
) -> BitShifts:
    """Estimate the shifts of the bits of a field; x, y (pixel), plane, bit: (peak,); sigma: of the PSF, pixel."""
    i, j = _near_pairs(x, y, plane, bit, REACH * sigma)
    if not len(i):
        return BitShifts(np.zeros((n_bits, 2)), np.zeros(n_bits), np.nan)
    step = np.column_stack([y[j] - y[i], x[j] - x[i]])
    a, b = bit[i].astype(np.int64), bit[j].astype(np.int64)
    links, pull = np.empty((n_bits, n_bits)), np.empty((n_bits, 2))
    chance = 1 / (np.pi * (REACH * sigma) ** 2)
    shift, share, width = np.zeros((n_bits, 2)), 0.2, WIDTHS[0] * sigma
    for iteration in range(len(WIDTHS) * ITERATIONS + FREE):
        total, scatter = weigh_pairs(step, a, b, shift, share, width, chance, links, pull)
        share = float(np.clip(total / len(i), 1e-3, 0.999))
        if iteration < len(WIDTHS) * ITERATIONS:
            width = WIDTHS[iteration // ITERATIONS] * sigma
        else:
            spread = np.sqrt(scatter / (2 * max(total, 1e-9)))
            width = float(np.clip(spread, NARROWEST * sigma, WIDTHS[0] * sigma))
        shift = _solve(links, pull, (width / (USUAL_SHIFT * sigma)) ** 2)
    return BitShifts(shift, links.sum(axis=0) + links.sum(axis=1), width)


def _near_pairs(
    x: np.ndarray, y: np.ndarray, plane: np.ndarray, bit: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of peaks i, j (pair,) of different bits, i of the lower bit, closer than ``reach`` in one plane."""
    # in a crowded field a part of the peaks is enough: the expected number of pairs is limited to `MOST_PAIRS`
    order = np.lexsort((x, y, plane))
    area = max(float(np.ptp(x)) * float(np.ptp(y)) * len(np.unique(plane)), 1.0) if len(x) else 1.0
    expected = 0.5 * len(x) ** 2 / area * np.pi * reach**2
    chosen = order[: int(len(order) * min(MOST_PAIRS / max(expected, 1.0), 1.0))]
    points = np.column_stack([x[chosen], y[chosen], plane[chosen] * (4.0 * reach)])
    pairs = cKDTree(points).query_pairs(reach, output_type="ndarray") if len(points) else np.empty((0, 2), int)
    i, j = chosen[pairs[:, 0]], chosen[pairs[:, 1]]
    i, j = np.where(bit[i] < bit[j], (i, j), (j, i))
    keep = bit[i] != bit[j]
    first = np.lexsort((j[keep], i[keep]))
    return i[keep][first], j[keep][first]


def _solve(links: np.ndarray, pull: np.ndarray, stiffness: float) -> np.ndarray:
    """Shifts (bit, 2) whose differences best fit the steps, by regularised weighted least squares; their mean is 0.

    links (bit, bit), pull (bit, 2): see `weigh_pairs`.
    """
    links = links + links.T
    shift = np.linalg.solve(np.diag(links.sum(axis=1) + stiffness) - links, pull)
    return np.asarray(shift - shift.mean(axis=0))
