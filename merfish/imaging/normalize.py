"""Background and scale of each bit, so that one molecule's spot is 1 high in every bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merfish.imaging._kernels import find_peaks, find_peaks_in

NOISE_TO_SIGMA = 1.4826  # a Gaussian's sigma over its median absolute deviation
EVERY = 4  # rows; a quarter of them tells the noise
PEAK_SIGMAS = 6.0  # a local maximum this far above the noise is a spot


@dataclass(frozen=True, eq=False)
class Normalization:
    """value = (intensity - background) / scale; background, scale (bit,) float32 in camera counts."""

    background: np.ndarray
    scale: np.ndarray

    @classmethod
    def identity(cls, n_bits: int) -> Normalization:
        """For a stack that is normalised already."""
        return cls(np.zeros(n_bits, np.float32), np.ones(n_bits, np.float32))

    def to_json(self) -> str:
        """As text, exactly."""
        return json.dumps({"background": self.background.tolist(), "scale": self.scale.tolist()}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Normalization:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(np.array(values["background"], np.float32), np.array(values["scale"], np.float32))

    @property
    def gain(self) -> np.ndarray:
        """(bit,) float32, 1 / scale; 0 for a dead bit, which then adds nothing to any word."""
        with np.errstate(divide="ignore"):
            return np.where(self.scale > 0, 1 / self.scale, 0).astype(np.float32)


def peak_normalization(filtered: np.ndarray) -> Normalization:
    """First estimate: the median of each bit, and the median of its light over clear local maxima.

    Half of all light in maxima comes from those brighter than the scale: the many dim rings of molecules out of focus
    hardly move it, where they would drag down a plain median.

    filtered (bit, ..., y, x) float, band-passed. A bit without clear maxima is dead: its scale is 0.
    """
    rows = filtered.reshape(filtered.shape[0], -1, filtered.shape[-1])
    background = np.array([np.median(bit[::EVERY]) for bit in rows], np.float32)
    noise = np.array([np.median(np.abs(bit[::EVERY] - low)) for bit, low in zip(rows, background, strict=True)])
    peaks = locate_peaks(rows, filtered.shape[-2], background + PEAK_SIGMAS * NOISE_TO_SIGMA * noise)
    tops = [value - low for (_, _, value), low in zip(peaks, background, strict=True)]
    scale = [weighted_median(top) if len(top) else 0.0 for top in tops]
    return Normalization(background, np.array(scale, np.float32))


def locate_peaks(
    rows: np.ndarray, height: int, threshold: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sub-pixel local maxima of each bit above its threshold (bit,): x, y (rows) and value, float32 (peak,).

    rows: (bit, plane * height, x) float32.
    """
    count = np.zeros(len(rows), np.int64)
    capacity = max(rows[0].size // 64, 1)
    while True:
        x, y, value = (np.empty((len(rows), capacity), np.float32) for _ in range(3))
        find_peaks(rows, height, threshold.astype(np.float32), count, x, y, value)
        if count.max(initial=0) <= capacity:
            return [(x[bit, :n], y[bit, :n], value[bit, :n]) for bit, n in enumerate(count)]
        capacity = int(count.max())


def locate_peaks_in(image: np.ndarray, height: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-pixel local maxima of one bit (plane * height, x) float32: x, y (rows) and value, float64 (peak,)."""
    capacity = max(image.size // 64, 1)
    while True:
        x, y, value = (np.empty(capacity) for _ in range(3))
        n = find_peaks_in(image, height, threshold, x, y, value)
        if n <= capacity:
            return x[:n], y[:n], value[:n]
        capacity = n


def weighted_median(heights: np.ndarray) -> float:
    """The height that those above it and those below it sum to alike; heights (n,), positive, n >= 1."""
    ordered = np.sort(heights)
    total = np.cumsum(ordered, dtype=np.float64)
    return float(ordered[np.searchsorted(total, total[-1] / 2)])


def median_normalization(estimates: Sequence[Normalization], n_bits: int) -> Normalization:
    """Median over fields, bit by bit; fields in which a bit shows no spot do not count for it."""
    if not estimates:
        return Normalization(np.zeros(n_bits, np.float32), np.zeros(n_bits, np.float32))
    background = np.median([estimate.background for estimate in estimates], axis=0)
    scales = np.array([estimate.scale for estimate in estimates])
    scale = [np.median(bit[bit > 0]) if (bit > 0).any() else 0.0 for bit in scales.T]
    return Normalization(background.astype(np.float32), np.array(scale, np.float32))
