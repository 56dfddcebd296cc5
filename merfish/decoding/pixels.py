"""Words of pixel vectors: soft (nearest word by angle) and hard (Hamming error correction)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from merfish._jit import in_parts
from merfish.codebook import Codebook, min_distance
from merfish.decoding import _kernels
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

# a pixel belongs to a molecule down to half the molecule's height
HALF_HEIGHT = 0.5
STRIP = 128  # rows filtered at once if the filtered stack is not kept
TABLE_BITS = 16  # bits up to which a table of all observable words is smaller and faster than a search


@dataclass(frozen=True, eq=False)
class DecodedPixels:
    """The word of each pixel; all arrays (plane * y, x).

    word: int32, row of the codebook, -1 = none.
    distance: float32, between unit vectors (soft) or in bits (hard).
    magnitude: float32, norm of the normalised pixel vector.
    """

    word: np.ndarray
    distance: np.ndarray
    magnitude: np.ndarray

    def part(self, rows: slice) -> DecodedPixels:
        """View of some rows, to be filled."""
        return DecodedPixels(self.word[rows], self.distance[rows], self.magnitude[rows])


def distance_threshold(weight: int) -> float:
    """Largest distance between the unit vectors of a pixel and its word, for words of ``weight`` on-bits.

    A word that lost one of w bits is at an angle with cosine sqrt((w - 1) / w), one that lost two at sqrt((w - 2) / w).
    The threshold is half-way between the two angles: 0.643 for w = 4, where a clean 1->0 error is at
    sqrt(2 - sqrt 3) = 0.518 and a clean 0->1 error at 0.460.

    >>> round(distance_threshold(4), 3)
    0.643
    """
    lost_one = np.arccos(np.sqrt((weight - 1) / weight))
    lost_two = np.arccos(np.sqrt(max(weight - 2, 0) / weight))
    return float(2 * np.sin((lost_one + lost_two) / 4))


def magnitude_threshold(weight: int) -> float:
    """Smallest norm of a normalised pixel vector: half the height of a molecule that lost one of ``weight`` bits."""
    return HALF_HEIGHT * float(np.sqrt(max(weight - 1, 1)))


def decode_soft(
    stack: np.ndarray | Bandpassed,
    codebook: Codebook,
    normalization: Normalization,
    *,
    max_distance: float | None = None,
    min_magnitude: float | None = None,
) -> DecodedPixels:
    """Find the nearest word of each pixel by the Euclidean distance between unit vectors.

    stack: (bit, row, x) real; normalised by ``normalization`` on the fly.
    max_distance, min_magnitude: by default `distance_threshold` and `magnitude_threshold` of the codebook's smallest
    weight. A pixel farther from every word, or of smaller norm, gets no word.
    """
    weight = int(codebook.weights.min())
    max_distance = distance_threshold(weight) if max_distance is None else max_distance
    min_magnitude = magnitude_threshold(weight) if min_magnitude is None else min_magnitude
    model = search_model(codebook, normalization, max_distance, min_magnitude)
    pixels = _empty(stack.shape[1:])
    for rows, strip in strips(stack):
        part = pixels.part(rows)
        _decode_rows(strip, model, part)
    return pixels


def _decode_rows(stack: np.ndarray, model: _kernels.Model, out: DecodedPixels) -> None:
    in_parts(
        lambda first, last: _kernels.decode_rows(first, last, stack, model, out.word, out.distance, out.magnitude),
        stack.shape[1],
    )


def search_model(
    codebook: Codebook, normalization: Normalization, max_distance: float, min_magnitude: float
) -> _kernels.Model:
    """The codebook in the form that the kernels of `decode_soft` search."""
    on, weights = on_bits(codebook)
    bits = np.full((len(on), -(-on.shape[1] // 4) * 4), codebook.n_bits)
    bits[:, : on.shape[1]] = np.where(np.arange(on.shape[1]) < weights[:, None], on, codebook.n_bits)
    return _kernels.Model(
        normalization.background.astype(np.float32),
        normalization.gain,
        bits,
        1 / np.sqrt(weights.astype(np.float32)),
        np.float32(min_magnitude),
        np.float32(1 - max_distance**2 / 2),
    )


def strips(stack: np.ndarray | Bandpassed) -> Iterator[tuple[slice, np.ndarray]]:
    """Iterate over blocks of rows of all bits; an array, which is in memory, is a single block."""
    n_rows = stack.shape[1]
    step = n_rows if isinstance(stack, np.ndarray) else STRIP
    for first in range(0, n_rows, step):
        rows = slice(first, min(first + step, n_rows))
        yield rows, stack[:, rows]


def decode_hard(stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization) -> DecodedPixels:
    """Binarise each bit at half the height of a molecule and correct errors by Hamming distance.

    stack: (bit, row, x) real, not normalised. With minimum distance d of the codebook, up to (d - 1) // 2 wrong bits
    are corrected; pixels farther from every word, or equally far from two words, are rejected. For d = 4, distance 0 is
    exact, 1 is corrected and 2 is detected.
    """
    threshold = np.where(
        normalization.scale > 0, normalization.background + HALF_HEIGHT * normalization.scale, np.inf
    ).astype(np.float32)
    pixels, lookup = _empty(stack.shape[1:]), CodeLookup(codebook)
    for rows, strip in strips(stack):
        lookup.rows(strip, threshold, pixels.part(rows))
    return pixels


class CodeLookup:
    """Nearest word of observed bits; -1 if the code cannot correct them."""

    def __init__(self, codebook: Codebook) -> None:
        self.codes = codebook.codes
        self.corrects = (min_distance(self.codes) - 1) // 2
        self.table: tuple[np.ndarray, np.ndarray] | None = None
        if codebook.n_bits <= TABLE_BITS:
            self.table = self._search(np.arange(1 << codebook.n_bits, dtype=np.uint64))
            bits = np.bitwise_count(np.arange(1 << codebook.n_bits))
            self.table_magnitude = np.sqrt(bits.astype(np.float32))

    def __call__(self, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up uint64 bits of any shape; return word int32 (-1 = rejected) and distance float32 in bits."""
        if self.table is not None:
            word, distance = self.table
            return word[observed], distance[observed]
        unique, inverse = np.unique(observed, return_inverse=True)
        word, distance = self._search(unique)
        return word[inverse].reshape(observed.shape), distance[inverse].reshape(observed.shape)

    def rows(self, stack: np.ndarray, threshold: np.ndarray, out: DecodedPixels) -> None:
        """Decode a stack (bit, row, x) into ``out``; bits above ``threshold`` (bit,) float32 are on."""
        if self.table is not None:
            level = _level(threshold, stack.dtype)
            tables = *self.table, self.table_magnitude
            pixels = out.word, out.distance, out.magnitude
            in_parts(lambda a, b: _kernels.look_up_rows(a, b, stack, level, *tables, *pixels), stack.shape[1])
            return
        codes = np.empty(stack.shape[1:], np.uint64)
        in_parts(lambda a, b: _kernels.binarise_rows(a, b, stack, threshold, codes), stack.shape[1])
        out.word[:], out.distance[:] = self(codes)
        out.magnitude[:] = np.sqrt(np.bitwise_count(codes).astype(np.float32))

    def _search(self, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        word = np.empty(len(observed), np.int32)
        distance = np.empty(len(observed), np.int16)
        ambiguous = np.empty(len(observed), np.bool_)
        found = word, distance, ambiguous
        in_parts(lambda a, b: _kernels.nearest_words(a, b, observed, self.codes, *found), len(observed))
        word[(distance > self.corrects) | ambiguous] = -1
        return word, distance.astype(np.float32)


def _level(threshold: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Equivalent thresholds in the dtype of the images; integers are compared faster."""
    if not np.issubdtype(dtype, np.integer):
        return threshold.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.floor(threshold.astype(np.float64)), limits.min, limits.max).astype(dtype)


def on_bits(codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """On-bits of each word as (word, largest weight) int64, padded with 0, and the weights (word,) int64."""
    weights = codebook.weights
    first = np.argsort(codebook.words == 0, axis=1, kind="stable")[:, : int(weights.max())]
    return np.where(np.arange(first.shape[1]) < weights[:, None], first, 0), weights


def _empty(shape: tuple[int, ...]) -> DecodedPixels:
    return DecodedPixels(np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty(shape, np.float32))
