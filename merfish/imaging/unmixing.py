"""Subtract the light of other bits that leaks into a bit; `merfish.imaging.leaks` finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEGLIGIBLE = 0.002  # weight of a bit's light in another; about the error of a measured share
BLOCK = 2**16  # pixels of each bit that are changed at once


class Leak(NamedTuple):
    """``share`` of the light (counts) of bit ``source`` also appears in bit ``target``; bits from 0."""

    source: int
    target: int
    share: float


def unmixing(leaks: Sequence[Leak], n_bits: int) -> np.ndarray:
    """Weights (bit, bit) float32: the light of a bit, row, is the weighted sum of what is seen in all bits, columns."""
    seen = np.eye(n_bits)
    for source, target, share in leaks:
        seen[target, source] = share
    weights = np.linalg.inv(seen)
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    return weights.astype(np.float32)


def subtract_leaks(stack: np.ndarray, leaks: Sequence[Leak]) -> None:
    """Subtract leaks from a filtered stack (bit, ...), C-contiguous float32, in place."""
    weights = unmixing(leaks, len(stack))
    changed = np.flatnonzero((weights != np.eye(len(stack))).any(axis=1))
    pixels = stack.reshape(len(stack), -1)
    for first in range(0, pixels.shape[1] if len(changed) else 0, BLOCK):
        part = pixels[:, first : first + BLOCK]
        part[changed] = np.stack([weighted_sum(part, weights[bit]) for bit in changed])


def weighted_sum(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over bits of images (bit, ...) with ``weights`` (bit,) float32; float32 (...), in a fixed order."""
    used = np.flatnonzero(weights)
    total = np.multiply(images[used[0]], weights[used[0]], dtype=np.float32)
    for bit in used[1:]:
        total += weights[bit] * images[bit].astype(np.float32, copy=False)
    return total
