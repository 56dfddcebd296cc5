"""Background and scale of each bit, so that one molecule's spot is 1 high in every bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merfish._jit import map_bits
from merfish.imaging._kernels import find_peaks
from merfish.imaging.preprocess import Bandpassed

NOISE_TO_SIGMA = 1.4826  # a Gaussian's sigma over its median absolute deviation
SAMPLE = 2**17  # pixels of an image; they tell its noise to 0.3 %
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


def peak_normalization(filtered: np.ndarray | Bandpassed) -> Normalization:
    """First estimate: the median of each bit, and the median of its light over clear local maxima.

    Half of all light in maxima comes from those brighter than the scale: the many dim rings of molecules out of focus
    hardly move it, where they would drag down a plain median.

    filtered (bit, ..., y, x), band-passed. A bit without clear maxima is dead: its scale is 0.
    """
    height = filtered.height if isinstance(filtered, Bandpassed) else filtered.shape[-2]
    background, scale = zip(*map_bits(lambda image: _level_and_height(image, height), filtered), strict=True)
    return Normalization(np.array(background, np.float32), np.array(scale, np.float32))


def _level_and_height(image: np.ndarray, height: int) -> tuple[float, float]:
    rows = image.reshape(-1, image.shape[-1])
    background = float(np.median(sample_of(rows)))
    noise = noise_of(rows, background)
    _, _, value = locate_peaks(rows, height, background + PEAK_SIGMAS * noise)
    return background, weighted_median(value - background) if len(value) else 0.0


def sample_of(image: np.ndarray) -> np.ndarray:
    """Some pixels of an image (row, x), evenly spread, at least `SAMPLE` if it has so many."""
    step = max(int(np.sqrt(image.size / SAMPLE)), 1)
    return image[::step, ::step]


def noise_of(image: np.ndarray, background: float = 0.0) -> float:
    """Sigma of what is not spots in a filtered image (row, x)."""
    return float(NOISE_TO_SIGMA * np.median(np.abs(sample_of(image) - np.float32(background))))


def locate_peaks(image: np.ndarray, height: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-pixel local maxima of one bit (plane * height, x) float32: x, y (rows) and value, float64 (peak,)."""
    capacity = max(image.size // 64, 1)
    while True:
        x, y, value = (np.empty(capacity) for _ in range(3))
        n = find_peaks(image, height, threshold, x, y, value)
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
