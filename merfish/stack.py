"""Decode one registered stack in memory."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from merfish.calls.filtering import keep_calls, rate_calls
from merfish.codebook import Codebook
from merfish.config import DEFAULT_METHOD, MISIDENTIFICATION_RATE
from merfish.decoding.methods import check_stack, decode_filtered, method_named
from merfish.decoding.psf import USUAL_SIGMA, psf_sigma
from merfish.errors import InputError
from merfish.imaging.leaks import find_leaks, peak_light
from merfish.imaging.normalize import Normalization, peak_normalization, shared_normalization, some_spots
from merfish.imaging.preprocess import Bandpassed

MATCHED = 1.15  # the widths of the filter are kept if they match the PSF within this factor


def decode(
    stack: np.ndarray,
    codebook: Codebook,
    *,
    method: str = DEFAULT_METHOD,
    preprocess: bool = True,
    misidentification_rate: float = MISIDENTIFICATION_RATE,
) -> pd.DataFrame:
    """Decode one registered stack, and keep molecules at a misidentification rate.

    stack: (bit, y, x) or (bit, z, y, x), any real dtype, raw camera counts; with ``preprocess=False`` it must already
    be filtered and normalised (background 0, spot of one molecule of height 1). method: "spots", "pixels" or "hamming".
    misidentification_rate: expected fraction of wrong molecules among those kept.
    Returns a transcript table (`merfish.transcripts.COLUMNS`); x, y in pixels, the centre of the first pixel at 0.
    Raises InputError if the stack does not match the codebook or contains NaN, for an unknown method, and for a rate
    that is not from 0 to 1.
    """
    if not 0 <= misidentification_rate <= 1:
        raise InputError(f"misidentification_rate: expected a share from 0 to 1, got {misidentification_rate}")
    return keep_calls(decode_all(stack, codebook, method=method, preprocess=preprocess), misidentification_rate)


def decode_all(
    stack: np.ndarray, codebook: Codebook, *, method: str = DEFAULT_METHOD, preprocess: bool = True
) -> pd.DataFrame:
    """As `decode`, but return every molecule found, each with its probability of being right."""
    return rate_calls(find_all(stack, codebook, method=method, preprocess=preprocess), codebook)


def find_all(
    stack: np.ndarray, codebook: Codebook, *, method: str = DEFAULT_METHOD, preprocess: bool = True
) -> pd.DataFrame:
    """As `decode_all`, but with the decoder's own posterior, if it has one, instead of the calibrated probability."""
    filtered, normalization = prepare(stack, codebook, method=method, preprocess=preprocess)
    return decode_filtered(filtered, codebook, normalization, method=method)


def prepare(
    stack: np.ndarray, codebook: Codebook, *, method: str = DEFAULT_METHOD, preprocess: bool = True
) -> tuple[np.ndarray | Bandpassed, Normalization]:
    """Return a stack that is filtered when it is indexed, as decoders take it, and its normalization; see `decode`."""
    if isinstance(stack, str | os.PathLike) or not isinstance(codebook, Codebook):
        raise InputError(
            f"expected an array and a Codebook, got {type(stack).__name__} and {type(codebook).__name__}; read files "
            "with tifffile.imread or numpy.load, and with merfish.read_codebook"
        )
    stack = np.asarray(stack)
    check_stack(stack, codebook)
    if not preprocess:
        return stack, Normalization.identity(codebook.n_bits)
    chosen = method_named(method)
    filtered = Bandpassed(stack, smoothing=chosen.smoothing, background=chosen.background)
    scale = psf_sigma(filtered, filtered.height) / USUAL_SIGMA
    if not 1 / MATCHED < scale < MATCHED:
        filtered = Bandpassed(stack, smoothing=scale * chosen.smoothing, background=scale * chosen.background)
    part, spots = some_spots(filtered)
    normalization = shared_normalization([spots], len(stack))
    leaks = find_leaks([peak_light(part, spots)], normalization.scale)
    if not leaks:
        return filtered, normalization
    own = Bandpassed(stack, smoothing=filtered.smoothing, background=filtered.background, leaks=leaks)
    own.sigma = filtered.sigma
    return own, peak_normalization(own)
