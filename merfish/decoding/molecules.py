"""Molecules from decoded pixels: one for each connected patch of pixels of one word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merfish._jit import map_bits
from merfish.codebook import Codebook
from merfish.decoding import _kernels
from merfish.decoding.pixels import HALF_HEIGHT, DecodedPixels
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

MIN_AREA = 3  # pixels; smaller patches are more often noise or the rim of another molecule


@dataclass(frozen=True, eq=False)
class Molecules:
    """Measurements of each molecule; all arrays (molecule,), spectrum (molecule, bit).

    word: int32, row of the codebook. x, y: float64 pixel, centroid weighted by magnitude. plane: int32.
    area: int32 pixels. distance, min_distance: float32, mean and minimum over the pixels.
    spectrum: float32, mean normalised value of each bit. intensity: float32, mean of the spectrum over the on-bits.
    shown: uint64, the bits that are on in the spectrum.
    """

    word: np.ndarray
    x: np.ndarray
    y: np.ndarray
    plane: np.ndarray
    area: np.ndarray
    distance: np.ndarray
    min_distance: np.ndarray
    spectrum: np.ndarray
    intensity: np.ndarray
    shown: np.ndarray


def extract_molecules(
    pixels: DecodedPixels,
    stack: np.ndarray | Bandpassed,
    codebook: Codebook,
    normalization: Normalization,
    *,
    height: int,
    min_area: int = MIN_AREA,
) -> Molecules:
    """Measure the 8-connected components of pixels with the same word within each plane.

    stack: (bit, plane * height, x), as decoded. Components of fewer than ``min_area`` pixels are dropped.
    """
    label = np.empty(pixels.word.shape, np.int32)
    count = _kernels.label_components(pixels.word, height, label)
    table = np.empty((count, 7))
    _kernels.measure_components(label, pixels.word, pixels.distance, pixels.magnitude, height, table)

    def mean(image: np.ndarray) -> np.ndarray:
        total = np.empty(count)
        _kernels.sum_components(label, image, total)
        return total / table[:, 4]

    spectrum = np.array(map_bits(mean, stack), np.float32).reshape(codebook.n_bits, count).T
    spectrum = (spectrum - normalization.background) * normalization.gain
    keep = table[:, 4] >= min_area
    table, spectrum = table[keep], spectrum[keep]
    word = table[:, 0].astype(np.int32)
    on = codebook.words[word].astype(bool)
    intensity = np.where(on, spectrum, 0).sum(axis=1) / np.maximum(codebook.weights[word], 1)
    shown = shown_bits(spectrum, on)
    return Molecules(
        word=word,
        x=table[:, 3],
        y=table[:, 2],
        plane=table[:, 1].astype(np.int32),
        area=table[:, 4].astype(np.int32),
        distance=table[:, 5].astype(np.float32),
        min_distance=table[:, 6].astype(np.float32),
        spectrum=spectrum,
        intensity=intensity.astype(np.float32),
        shown=shown.astype(np.uint64) @ (np.uint64(1) << np.arange(codebook.n_bits, dtype=np.uint64)),
    )


def shown_bits(spectrum: np.ndarray, on: np.ndarray) -> np.ndarray:
    """Bits that a molecule shows, (molecule, bit) bool: those above half the median of its word's on-bits.

    spectrum: (molecule, bit) float; on: (molecule, bit) bool, the word. The median is robust to one lost bit out of
    three or more.
    """
    height = np.nanmedian(np.where(on, spectrum, np.nan), axis=1, keepdims=True)
    return spectrum > HALF_HEIGHT * height
