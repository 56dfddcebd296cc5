"""Crowded molecules: peaks that several molecules share are fitted at the positions given by the other bits."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from merfish._jit import map_bits
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding.alignment import shifts_at
from merfish.decoding.candidates import LIGHT_STEP, Called
from merfish.decoding.peaks import Fit, share_peaks

CROWDED = 2.5  # sigmas of the PSF; molecules closer than this overlap and are fitted together


def crowded_pairs(table: np.ndarray, height: int, sigma: float) -> np.ndarray:
    """Pairs (pair, 2) int64 of calls, ``table`` (call, 5), in one plane so close that their spots overlap."""
    x, y = table[:, 0], table[:, 1]
    apart = y // height * (2 * CROWDED * sigma)
    pairs = cKDTree(np.column_stack([x, y, apart])).query_pairs(CROWDED * sigma, output_type="ndarray")
    return np.asarray(pairs, np.int64)


def crowded_share(called: Called, height: int, sigma: float) -> float:
    """Fraction of calls that are more likely right than wrong and overlap with another such call."""
    likely = called.table[called.table[:, 4] > 0]
    return len(np.unique(crowded_pairs(likely, height, sigma))) / max(len(called.table), 1)


def refit(fits: list[Fit], called: Called, warp: np.ndarray, left: np.ndarray, height: int, sigma: float) -> list[Fit]:
    """Refit the peaks of crowded molecules in every bit, starting from the molecules' positions.

    Two molecules closer than the width of a spot have a single peak in the bits that they share. Their positions are
    known from the bits that they do not share. warp: see `BitShifts`. left (bit, row, x) int8, the residual in units of
    `LIGHT_STEP`, is updated. sigma: of the PSF, pixel.
    """
    pairs = crowded_pairs(called.table, height, sigma)
    ends = np.cumsum([0, *(len(fit.x) for fit in fits)])
    x, y = called.table[:, 0], called.table[:, 1]
    first = (y / height).astype(np.int64) * height

    def one_bit(bit: int) -> Fit:
        fit, owner = fits[bit], called.owner[ends[bit] : ends[bit + 1]]
        has = np.zeros(len(x), bool)
        has[owner[owner >= 0]] = True
        chosen = np.zeros(len(x), bool)
        chosen[pairs[has[pairs].any(axis=1)]] = True  # the bit is on in one of the two, or in both
        near = np.flatnonzero(chosen)
        if fit.profile is None or not len(near):
            return fit
        down, across = shifts_at(warp, bit, y[near] - first[near], x[near])
        mx = np.clip(x[near] + across, 0, left.shape[2] - 1)
        my = np.clip(y[near] + down, first[near], first[near] + height - 1)
        image = left[bit] * np.float32(LIGHT_STEP)
        fit = share_peaks(image, height, fit, chosen[owner] & (owner >= 0), mx, my, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(fits)))
