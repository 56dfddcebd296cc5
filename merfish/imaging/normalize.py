"""Background and scale of each bit, so that one molecule's spot is 1 high in every bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

NOISE_TO_SIGMA = 1.4826  # a Gaussian's sigma over its median absolute deviation
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
    """First estimate: the median of each bit, and the median height of its clear local maxima.

    filtered (bit, ..., y, x) float, band-passed. A bit without clear maxima is dead: its scale is 0.
    """
    planes = filtered.reshape(filtered.shape[0], -1, *filtered.shape[-2:])
    background = np.array([np.median(bit) for bit in planes], np.float32)
    scale = np.zeros(len(planes), np.float32)
    for index, bit in enumerate(planes):
        noise = NOISE_TO_SIGMA * np.median(np.abs(bit - background[index]))
        maxima = ndimage.maximum_filter(bit, size=(1, 3, 3)) == bit
        heights = bit[maxima & (bit > background[index] + PEAK_SIGMAS * noise)] - background[index]
        if heights.size:
            scale[index] = np.median(heights)
    return Normalization(background, scale)


def median_normalization(estimates: Sequence[Normalization], n_bits: int) -> Normalization:
    """Median over fields, bit by bit; fields in which a bit shows no spot do not count for it."""
    if not estimates:
        return Normalization(np.zeros(n_bits, np.float32), np.zeros(n_bits, np.float32))
    background = np.median([estimate.background for estimate in estimates], axis=0)
    scales = np.array([estimate.scale for estimate in estimates])
    scale = [np.median(bit[bit > 0]) if (bit > 0).any() else 0.0 for bit in scales.T]
    return Normalization(background.astype(np.float32), np.array(scale, np.float32))
