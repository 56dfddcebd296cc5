"""Molecules put into a field's own images are found as often as those that were there."""

from __future__ import annotations

import numpy as np
import pytest

from merfish import mhd4_codebook, simulate_stack
from merfish.calls.filtering import call_features, fit_log_odds, log_odds_wrong, tally_calls, threshold_at_rate
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.imaging.normalize import peak_normalization
from merfish.imaging.preprocess import bandpass
from merfish.simulate import match_calls
from merfish.simulate.spikes import add_spikes, detected_share

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


@pytest.mark.parametrize("method", ["spots", "pixels"])
def test_spikes_are_found_as_often_as_molecules(method):
    stack, truth = simulate_stack(BOOK, shape=(320, 320), density=0.01, seed=8)
    filters = METHODS[method].smoothing, METHODS[method].background
    filtered = bandpass(stack, smoothing=filters[0], background=filters[1])[:, None]
    scale = peak_normalization(filtered)

    def found(images):
        return decode_filtered(images, BOOK, scale, method=method)

    calls = found(filtered)
    features, evidence = call_features(calls)
    tally = tally_calls(features, calls["is_blank"].to_numpy(), evidence)
    odds = fit_log_odds(tally, BOOK.is_blank.mean(), evidence)
    level = threshold_at_rate(tally, odds, 0.05)

    def decode(images):
        # as a run does: the odds are those of all its fields
        calls = found(images)
        return calls[log_odds_wrong(call_features(calls)[0], odds) <= level]

    kept = decode(filtered)
    rates = {"lost": np.full(16, 0.1), "gained": np.full(16, 0.04)}
    shares = []
    for seed in range(2):
        spiked, spikes = add_spikes(filtered, BOOK, scale, kept, **rates, sigma=1.35, filters=filters, seed=seed)
        assert len(spikes) >= 50
        shares.append(detected_share(spiked, spikes, decode, 1.35).mean())
    true = len(match_calls(kept, truth)[0]) / len(truth)
    assert np.mean(shares) == pytest.approx(true, abs=0.09)  # two sigmas of so few
    assert not detected_share(filtered, spikes, decode, 1.35).mean() > 0.1
