"""Codebooks that do not belong to the images are reported."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from merfish import datasets, mhd4_codebook, simulate_stack
from merfish.calls.fit import FitCounts, codebook_fits, count_fit
from merfish.config import RunConfig
from merfish.decoding.methods import decode_filtered
from merfish.imaging.field import register_field
from merfish.imaging.normalize import find_spots, shared_normalization
from merfish.imaging.opening import open_experiment
from merfish.imaging.preprocess import bandpass

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


def verdicts(fields, book, seeds):
    scale = shared_normalization([find_spots(f) for f in fields], 16)
    out = []
    for seed in seeds:
        chosen = book if seed is None else book.permuted(np.random.default_rng(seed).permutation(16))
        calls = pd.concat([decode_filtered(f, chosen, scale) for f in fields])
        out.append(codebook_fits(count_fit(calls), chosen).fits)
    return out


@pytest.mark.parametrize("glow", [0.0, 300.0])
def test_simulated_images_fit_their_codebook_alone(glow):
    stack, _ = simulate_stack(BOOK, shape=(224, 224), density=0.015, seed=77, glow=glow)
    assert verdicts([bandpass(stack, smoothing=0.7, background=2.0)], BOOK, (None, 70, 71)) == [True] + 2 * [False]


def test_real_images_fit_their_codebook_alone():
    source = open_experiment(datasets.merfish_raw())
    fields = [register_field(source, fov, RunConfig()).bits for fov in source.fovs]
    assert verdicts(fields, source.codebook, (None, 70, 71)) == [True] + 2 * [False]


def test_few_calls_say_nothing_and_a_dead_bit_is_named():
    assert codebook_fits(FitCounts(50, 30, 10, 2), BOOK).fits
    verdict = codebook_fits(FitCounts(500, 300, 30, 20) + FitCounts(500, 300, 30, 20), BOOK, ("bit3",))
    assert not verdict.fits
    assert verdict.wrong == pytest.approx(0.1 * 14)
    assert 1 < verdict.wrong < 2
    assert "bit3" in verdict.cause
