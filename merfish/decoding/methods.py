"""The decoders by name, each with its band-pass filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.config import DEFAULT_METHOD, FILTER_SIGMAS
from merfish.decoding.molecules import extract_molecules
from merfish.decoding.overlap import once, splinters
from merfish.decoding.pixels import DecodedPixels, decode_hard, decode_soft
from merfish.decoding.psf import psf_sigma
from merfish.decoding.spots import decode_spots
from merfish.errors import InputError
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed, in_rows
from merfish.transcripts import transcript_table

Rows = np.ndarray | Bandpassed  # (bit, plane * y, x)
Finder = Callable[[Rows, Codebook, Normalization, int], pd.DataFrame]


def find_by_pixels(stack: Rows, codebook: Codebook, normalization: Normalization, height: int) -> pd.DataFrame:
    """Find molecules as patches of pixels whose nearest word by angle is the same."""
    pixels = decode_soft(stack, codebook, normalization)
    return _patches(pixels, stack, codebook, normalization, height)


def find_by_hamming(stack: Rows, codebook: Codebook, normalization: Normalization, height: int) -> pd.DataFrame:
    """Find molecules as patches of pixels whose binarised bits match a word up to a correctable error."""
    pixels = decode_hard(stack, codebook, normalization)
    calls = _patches(pixels, stack, codebook, normalization, height)
    # the distance is in bits, not an angle
    return calls.assign(hamming_distance=calls["distance"].round().astype(np.int8), distance=np.float32(np.nan))


def _patches(
    pixels: DecodedPixels, stack: Rows, codebook: Codebook, normalization: Normalization, height: int
) -> pd.DataFrame:
    found = extract_molecules(pixels, stack, codebook, normalization, height=height)
    keep, z = once(found.word, found.x, found.y, found.plane, found.intensity * found.area)
    return transcript_table(
        codebook,
        found.word[keep],
        x=found.x[keep],
        y=found.y[keep],
        z=z,
        hamming_distance=np.bitwise_count(found.shown[keep] ^ codebook.codes[found.word[keep]]),
        shown=found.shown[keep],
        intensity=found.intensity[keep],
        area=found.area[keep],
        distance=found.distance[keep],
    )


def find_by_spots(stack: Rows, codebook: Codebook, normalization: Normalization, height: int) -> pd.DataFrame:
    """Find molecules as spots linked across bits; ``probability`` is the posterior of the word."""
    found = decode_spots(stack, codebook, normalization, height=height, sigma=psf_sigma(stack, height))
    whole = np.flatnonzero(~splinters(found.word, found.x, found.y, found.plane, found.intensity, found.tail_planes))
    places = (found.word[whole], found.x[whole], found.y[whole], found.plane[whole])
    keep = whole[once(*places, found.intensity[whole])[0]]
    return transcript_table(
        codebook,
        found.word[keep],
        x=found.x[keep],
        y=found.y[keep],
        z=found.z[keep],
        hamming_distance=np.bitwise_count(found.errors[keep]),
        shown=codebook.codes[found.word[keep]] ^ found.errors[keep],
        intensity=found.intensity[keep],
        probability=1 / (1 + np.exp(-found.log_odds[keep])),
    )


@dataclass(frozen=True)
class Method:
    """A decoder with the sigmas (pixel) of the band-pass filter before it (see `merfish.imaging.preprocess`)."""

    find: Finder
    smoothing: float
    background: float


METHODS = {
    name: Method(find, *FILTER_SIGMAS[name])
    for name, find in {"spots": find_by_spots, "pixels": find_by_pixels, "hamming": find_by_hamming}.items()
}


def method_named(name: str) -> Method:
    """The decoder of that name. Raises InputError listing all decoders."""
    if name not in METHODS:
        raise InputError(f"method {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def decode_filtered(
    stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization, *, method: str = DEFAULT_METHOD
) -> pd.DataFrame:
    """Find all molecules in a filtered stack (bit, y, x) or (bit, z, y, x); calls are neither calibrated nor filtered.

    Raises InputError for an unknown method.
    """
    rows, height = in_rows(stack)
    return method_named(method).find(rows, codebook, normalization, height)


def check_stack(stack: np.ndarray, codebook: Codebook) -> None:
    """Raise InputError unless ``stack`` is (bit, [z,] y, x), not empty, real, finite, and has the codebook's bits."""
    if stack.ndim not in (3, 4):
        raise InputError(f"the stack has shape {stack.shape}; expected (bit, y, x) or (bit, z, y, x)")
    if not (np.issubdtype(stack.dtype, np.floating) or np.issubdtype(stack.dtype, np.integer)):
        raise InputError(f"the stack has dtype {stack.dtype}; expected integers or floats")
    if stack.shape[0] != codebook.n_bits:
        raise InputError(f"the stack has {stack.shape[0]} bits, but the codebook has {codebook.n_bits}")
    if not all(stack.shape):
        raise InputError(f"the stack is empty: shape {stack.shape}")
    if np.issubdtype(stack.dtype, np.floating):
        for bit, name in enumerate(codebook.bit_names):
            if not np.isfinite(stack[bit].sum(dtype=np.float64)):
                raise InputError(f"bit {bit + 1} ({name}) of the stack contains NaN or infinite values")
