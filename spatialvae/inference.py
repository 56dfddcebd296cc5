"""Statistical inference from dependent cells: spatial blocks, and false discovery rates."""

from __future__ import annotations

import numpy as np


def spatial_blocks(coordinates: np.ndarray, number: int, samples: np.ndarray | None = None) -> np.ndarray:
    """Divide cells into compact blocks of nearly equal size, within samples: int64 (cell,), from 0.

    Samples are bisected along their longest axis until there are about ``number`` blocks in total. Sums over blocks
    are nearly independent if blocks are wide compared with the distance over which cells are correlated.

    Parameters
    ----------
    coordinates : float (cell, axis)
    number : total number of blocks, about; each sample has at least one
    samples : (cell,); one sample if None
    """
    code = np.zeros(len(coordinates), int) if samples is None else np.unique(samples, return_inverse=True)[1]
    out = np.empty(len(coordinates), np.int64)
    first = 0
    for sample in range(code.max() + 1):
        rows = np.flatnonzero(code == sample)
        parts = min(max(round(number * len(rows) / len(code)), 1), len(rows))
        waiting = [(rows, parts)]
        while waiting:
            rows, parts = waiting.pop()
            if parts == 1:
                out[rows] = first
                first += 1
                continue
            along = int(np.ptp(coordinates[rows], 0).argmax())
            order = rows[np.argsort(coordinates[rows, along], kind="stable")]
            half = parts // 2
            cut = len(rows) * half // parts
            waiting += [(order[:cut], half), (order[cut:], parts - half)]
    return out


def adjusted(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values, float64 (test,), of the p-values ``p`` (test,): the lowest false discovery rate at which each
    is significant (Benjamini & Hochberg 1995)."""
    order = np.argsort(p)[::-1]
    out = np.empty(len(p))
    out[order] = np.minimum.accumulate(np.asarray(p, float)[order] * len(p) / np.arange(len(p), 0, -1))
    return np.minimum(out, 1)
