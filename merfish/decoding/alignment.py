"""Residual shift of each bit of a field, estimated from the peaks.

A molecule has a peak in each of its on-bits. Among all pairs of nearby peaks of different bits, the displacements
within one molecule scatter about the difference of the two bits' shifts, and all others are uniform. A mixture of the
two is fitted, starting from a width that covers any shift. The shift of a bit is linear in the position, because
colours differ in magnification and samples swell or shrink.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.spatial import cKDTree

from merfish.decoding._alignment_kernels import weigh_pairs

# lengths in sigmas of the PSF
REACH = 4.0  # two peaks of one molecule are closer than this
WIDTHS = (1.2, 0.8, 0.5, 0.3)  # scatter of the pairs about the shift, from one that covers any shift to the final one
ITERATIONS = 4  # at each width
FREE = 6  # iterations with the width fitted
CONSTANT = 2 * ITERATIONS  # iterations with constant shifts, which must be known before their linear terms are fitted
NARROWEST = 0.03
USUAL_SHIFT = 1.0  # prior sigma of the shifts; a bit without pairs is not shifted
MOST_PAIRS = 30_000  # pairs; enough to measure a shift to 0.01 px
BANDS = 6  # minimum number of bands of rows from which the pairs are taken if a part of the field is enough
# pairs per independent displacement: the six pairs of a molecule with four bits have the information of three
PAIRS_PER_STEP = 2.0
# standard errors by which the mean square of the linear terms must exceed that of noise; otherwise they are zero
CLEAR = 3.0
TERMS = 3  # 1, y, x


@dataclass(frozen=True, eq=False)
class BitShifts:
    """Shifts of the bits of a field.

    warp: (bit, 2, 3) float64, coefficients of 1, y and x (pixel) of the shifts along y and x (pixel) of a bit's image
    relative to the mean of all bits. spread: pixel, root mean square of the shifts along an axis, over bits and the
    corners of the field.
    """

    warp: np.ndarray
    spread: float


def bit_shifts(
    x: np.ndarray, y: np.ndarray, plane: np.ndarray, bit: np.ndarray, n_bits: int, sigma: float
) -> BitShifts:
    """Estimate the shifts of the bits of a field; x, y (pixel), plane, bit: (peak,); sigma: of the PSF, pixel."""
    i, j = _near_pairs(x, y, plane, bit, REACH * sigma)
    if not len(i):
        return BitShifts(np.zeros((n_bits, 2, TERMS)), 0.0)
    step = np.column_stack([y[j] - y[i], x[j] - x[i]])
    # terms of about equal magnitude: the position relative to the centre, in units of half the field
    (middle_y, half_y), (middle_x, half_x) = ((np.ptp(a) / 2 + a.min(), max(np.ptp(a) / 2, 1.0)) for a in (y, x))
    place = np.column_stack([np.ones(len(i)), (y[i] - middle_y) / half_y, (x[i] - middle_x) / half_x])
    a, b = bit[i].astype(np.int64), bit[j].astype(np.int64)
    links, pull = np.empty((n_bits, n_bits, TERMS, TERMS)), np.empty((n_bits, 2, TERMS))
    chance = 1 / (np.pi * (REACH * sigma) ** 2)
    warp, share, width = np.zeros((n_bits, 2, TERMS)), 0.2, WIDTHS[0] * sigma
    for iteration in range(len(WIDTHS) * ITERATIONS + FREE):
        total, scatter = weigh_pairs(step, place, a, b, warp, share, width, chance, links, pull)
        share = float(np.clip(total / len(i), 1e-3, 0.999))
        if iteration < len(WIDTHS) * ITERATIONS:
            width = WIDTHS[iteration // ITERATIONS] * sigma
        else:
            spread = np.sqrt(scatter / (2 * max(total, 1e-9)))
            width = float(np.clip(spread, NARROWEST * sigma, WIDTHS[0] * sigma))
        warp = _solve(links, pull, width, USUAL_SHIFT * sigma, vary=iteration >= CONSTANT)
    corners = np.array([[1.0, v, u] for v in (-1, 1) for u in (-1, 1)])
    rms = float(np.sqrt(np.mean((warp @ corners.T) ** 2)))
    constant, down, across = np.moveaxis(warp, 2, 0)
    down, across = down / half_y, across / half_x
    pixels = np.stack([constant - middle_y * down - middle_x * across, down, across], axis=2)
    return BitShifts(pixels, rms)


def shifts_at(warp: np.ndarray, bit: np.ndarray | int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifts along y and x (peak,), pixel, of the images of bits at y (within the plane), x; see `BitShifts.warp`."""
    down, across = np.moveaxis(warp[bit], (-2, -1), (0, 1))
    return down[0] + down[1] * y + down[2] * x, across[0] + across[1] * y + across[2] * x


def _near_pairs(
    x: np.ndarray, y: np.ndarray, plane: np.ndarray, bit: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of peaks i, j (pair,) of different bits, i of the lower bit, closer than ``reach`` in one plane."""
    # in a crowded field a part of the peaks is enough: the expected number of pairs is limited to `MOST_PAIRS`
    area = max(float(np.ptp(x)) * float(np.ptp(y)) * len(np.unique(plane)), 1.0) if len(x) else 1.0
    expected = 0.5 * len(x) ** 2 / area * np.pi * reach**2
    chosen = np.flatnonzero(_in_bands(y, plane, min(MOST_PAIRS / max(expected, 1.0), 1.0)))
    points = np.column_stack([x[chosen], y[chosen], plane[chosen] * (4.0 * reach)])
    pairs = cKDTree(points).query_pairs(reach, output_type="ndarray") if len(points) else np.empty((0, 2), int)
    i, j = chosen[pairs[:, 0]], chosen[pairs[:, 1]]
    i, j = np.where(bit[i] < bit[j], (i, j), (j, i))
    keep = bit[i] != bit[j]
    first = np.lexsort((j[keep], i[keep]))
    return i[keep][first], j[keep][first]


def _in_bands(y: np.ndarray, plane: np.ndarray, share: float) -> np.ndarray:
    """Mark the peaks (peak,) in bands of rows, evenly spaced over the field, that are ``share`` of its rows."""
    if share == 1:
        return np.ones(len(y), bool)
    planes, number = np.unique(plane, return_inverse=True)
    bands = BANDS
    while gcd(bands, len(planes)) > 1:  # the bands of different planes begin at different rows
        bands += 1
    row = (y - y.min()) / max(np.ptp(y), 1.0)
    return (number + row) * bands / len(planes) % 1 < share


def _solve(links: np.ndarray, pull: np.ndarray, width: float, usual: float, *, vary: bool) -> np.ndarray:
    """Coefficients (bit, 2, term) of shifts whose differences best fit the steps, by regularised least squares.

    links (bit, bit, term, term), pull (bit, 2, term): see `weigh_pairs`. width: sigma of a pair; usual: prior sigma of
    the constants; pixel. vary: whether shifts may vary over the field. The prior variance of all linear terms is the
    excess of their mean square over that of noise; they are zero if the excess is not significant. The mean over bits
    of each coefficient is 0.
    """
    n_bits = len(links)
    terms = TERMS if vary else 1
    both = (links + links.transpose(1, 0, 2, 3))[:, :, :terms, :terms]
    normal = -both.transpose(0, 2, 1, 3).copy()
    normal[np.arange(n_bits), :, np.arange(n_bits)] += both.sum(axis=1)
    for term in range(terms):  # the differences do not determine the mean over bits
        normal[:, term, :, term] += both[:, :, term, term].mean()
    normal = normal.reshape(n_bits * terms, n_bits * terms)
    right = pull[:, :, :terms].transpose(0, 2, 1).reshape(n_bits * terms, 2)
    linear = np.tile(np.arange(terms) > 0, n_bits)
    stiff = np.full(n_bits * terms, (width / usual) ** 2)
    out = np.zeros((n_bits, 2, TERMS))
    if vary:
        inverse = np.linalg.inv(normal + np.diag(stiff))
        found = (inverse @ right)[linear]
        noise = PAIRS_PER_STEP * width**2 * np.diag(inverse)[linear]
        # mean square of the coefficients relative to their variance by noise, 1 +- sqrt(2 / number) for noise alone
        excess = float(np.mean(found**2 / noise[:, None])) - 1
        if excess < CLEAR * np.sqrt(2 / found.size):
            terms, normal, right, stiff = 1, normal[~linear][:, ~linear], right[~linear], stiff[~linear]
        else:
            variance = max(float(np.mean(found**2 - noise[:, None])), 1e-12)
            stiff[linear] = PAIRS_PER_STEP * width**2 / variance
    solved = np.linalg.solve(normal + np.diag(stiff), right)
    out[:, :, :terms] = solved.reshape(n_bits, terms, 2).transpose(0, 2, 1)
    return out - out.mean(axis=0)
