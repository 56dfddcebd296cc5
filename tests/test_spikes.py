"""Molecules added to a field's own images are found as often as its original molecules."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from merfish import mhd4_codebook, simulate_stack
from merfish.calls.filtering import call_features, fit_log_odds, log_odds_wrong, tally_calls, threshold_at_rate
from merfish.codebook import write_codebook
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.imaging.normalize import peak_normalization
from merfish.imaging.preprocess import bandpass
from merfish.pipeline.single import decode_file
from merfish.report.notices import efficiency_line
from merfish.simulate import match_calls
from merfish.simulate.spikes import spike_in

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


@pytest.mark.parametrize("method", ["spots", "pixels"])
def test_spikes_are_found_as_often_as_molecules(method):
    stack, truth = simulate_stack(BOOK, shape=(320, 320), density=0.01, seed=8)
    filters = METHODS[method].smoothing, METHODS[method].background
    filtered = bandpass(stack, smoothing=filters[0], background=filters[1])[:, None]
    scale = peak_normalization(filtered)

    def decode(images):
        return decode_filtered(images, BOOK, scale, method=method)

    calls = decode(filtered)
    features, evidence = call_features(calls)
    tally = tally_calls(features, calls["is_blank"].to_numpy(), evidence)
    odds = fit_log_odds(tally, BOOK.is_blank.mean(), evidence)
    level = threshold_at_rate(tally, odds, 0.05)

    def kept(rows):
        return rows[log_odds_wrong(call_features(rows)[0], odds) <= level]

    found = number = 0
    for seed in range(5):
        spikes = spike_in(filtered, BOOK, scale, calls, decode, sigma=1.35, seed=seed)
        right = spikes[spikes["x"].notna()]
        assert (right["barcode_id"] == right["spike"]).all()
        found += len(kept(right))
        number += len(spikes)
    assert number >= 250
    true = len(match_calls(kept(calls), truth)[0]) / len(truth)
    assert found / number == pytest.approx(true, abs=0.08)  # bias of up to 0.04, and two sigmas of this small number


def test_a_field_with_few_molecules_gets_no_spikes():
    stack, _ = simulate_stack(BOOK, shape=(64, 64), density=0.002, seed=8)
    filtered = bandpass(stack, smoothing=0.7, background=2.0)[:, None]
    scale = peak_normalization(filtered)
    calls = decode_filtered(filtered, BOOK, scale)
    none = spike_in(filtered, BOOK, scale, calls, lambda _: calls, sigma=1.35, seed=0)
    assert not len(none)
    assert np.issubdtype(none["spike"].dtype, np.integer)


def test_decode_file_states_the_share_detected(tmp_path):
    stack, truth = simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=8)
    np.save(tmp_path / "stack.npy", stack)
    write_codebook(BOOK, tmp_path / "codebook.csv")
    options = {"method": "spots", "preprocess": True, "misidentification_rate": 0.05}
    record = decode_file(tmp_path / "stack.npy", tmp_path / "codebook.csv", tmp_path / "out", **options)
    kept = pd.read_parquet(tmp_path / "out" / "transcripts.parquet")
    stated = record["figures"]["spike_in"]
    assert record["figures"]["n_spikes"] >= 50
    assert stated["low"] - 0.03 < len(match_calls(kept, truth)[0]) / len(truth) < stated["high"] + 0.03
    assert f"{stated['rate']:.0%} of molecules detected" in efficiency_line(record)[0]
