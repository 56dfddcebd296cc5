"""The way of the data, on one screen: one stack, one field, the whole experiment."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.decoding.filtering import MISIDENTIFICATION_RATE, keep_calls, rate_calls
from merfish.decoding.molecules import extract_molecules
from merfish.decoding.overlap import merge_planes
from merfish.decoding.pixels import decode_hard, decode_soft
from merfish.errors import InputError
from merfish.imaging.normalize import Normalization, peak_normalization
from merfish.imaging.preprocess import bandpass
from merfish.transcripts import transcript_table

METHODS = {"pixels": decode_soft, "hamming": decode_hard}
DEFAULT_METHOD = "pixels"


def decode(
    stack: np.ndarray,
    codebook: Codebook,
    *,
    method: str = DEFAULT_METHOD,
    preprocess: bool = True,
    misidentification_rate: float = MISIDENTIFICATION_RATE,
) -> pd.DataFrame:
    """Molecules of one registered stack, those that may be kept at a misidentification rate.

    stack: (bit, y, x) or (bit, z, y, x), any real dtype, raw camera counts unless ``preprocess`` is False: then it
    is filtered and normalised already (no spot = 0, one molecule's spot = 1 high).
    Returns a transcript table (`merfish.transcripts.COLUMNS`), pixels with the centre of the first pixel at 0.
    Raises InputError if stack and codebook do not fit, or the stack holds NaN.
    """
    check_stack(stack, codebook)
    if preprocess:
        stack = bandpass(stack)
        normalization = peak_normalization(stack)
    else:
        normalization = Normalization.identity(codebook.n_bits)
    calls = decode_filtered(stack, codebook, normalization, method=method)
    return keep_calls(rate_calls(calls, codebook), misidentification_rate)


def decode_filtered(
    stack: np.ndarray, codebook: Codebook, normalization: Normalization, *, method: str = DEFAULT_METHOD
) -> pd.DataFrame:
    """Every molecule found in a filtered stack (bit, y, x) or (bit, z, y, x), not yet rated nor filtered."""
    if method not in METHODS:
        raise InputError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    height = stack.shape[-2]
    rows = stack.reshape(stack.shape[0], -1, stack.shape[-1])
    pixels = METHODS[method](rows, codebook, normalization)
    found = extract_molecules(pixels, rows, codebook, normalization, height=height)
    keep, z = merge_planes(found.word, found.x, found.y, found.plane, found.intensity * found.area)
    return transcript_table(
        codebook,
        found.word[keep],
        x=found.x[keep],
        y=found.y[keep],
        z=z,
        hamming_distance=found.hamming_distance[keep],
        intensity=found.intensity[keep],
        area=found.area[keep],
        distance=found.distance[keep],
    )


def check_stack(stack: np.ndarray, codebook: Codebook) -> None:
    """Raise InputError unless ``stack`` is (bit, [z,] y, x), real, finite, and has the codebook's bits."""
    if stack.ndim not in (3, 4):
        raise InputError(f"the stack has shape {stack.shape}, expected (bit, y, x) or (bit, z, y, x)")
    if not (np.issubdtype(stack.dtype, np.floating) or np.issubdtype(stack.dtype, np.integer)):
        raise InputError(f"the stack is of {stack.dtype}, expected integers or floats")
    if stack.shape[0] != codebook.n_bits:
        raise InputError(f"the stack has {stack.shape[0]} bits, the codebook has {codebook.n_bits}")
    if not all(stack.shape):
        raise InputError(f"the stack is empty: shape {stack.shape}")
    if np.issubdtype(stack.dtype, np.floating):
        for bit, name in enumerate(codebook.bit_names):
            if not np.isfinite(stack[bit].sum(dtype=np.float64)):
                raise InputError(f"bit {bit + 1} ({name}) of the stack holds NaN or infinity")
