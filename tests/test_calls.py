"""Calls of many fields: odds, filter, error rates, and molecules seen in two fields."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from merfish import mhd4_codebook, simulate_stack
from merfish.calls.error_model import (
    WordTally,
    add_word_tallies,
    bit_error_rates,
    held_out_rate,
    misidentification_rate,
    tally_words,
    wilson,
    word_statistics,
)
from merfish.calls.filtering import (
    PATCHES,
    POSTERIOR,
    Evidence,
    add_tallies,
    blank_share,
    call_features,
    few_blanks,
    fit_log_odds,
    keep_at_rate,
    log_odds_wrong,
    probability_wrong,
    rate_calls,
    tally_calls,
    threshold_at_rate,
)
from merfish.calls.overlap import FIELD_RADIUS, Sightings, pair_up, seen_better_elsewhere
from merfish.codebook import Codebook
from merfish.simulate import Imaging, match_calls
from merfish.stack import decode_all

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


def words_of(found: pd.DataFrame, kept: np.ndarray | None = None) -> WordTally:
    columns = (found[name].to_numpy() for name in ("barcode_id", "shown", "probability"))
    return tally_words(*columns, np.ones(len(found), bool) if kept is None else kept, BOOK)


def drawn_calls(n: int, book: Codebook, seed: int = 3) -> tuple[pd.DataFrame, np.ndarray]:
    """Simulate calls with true odds, and which of them are wrong; wrong calls are spread evenly over the words."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(2.5, 3, n)
    wrong = rng.random(n) < 1 / (1 + np.exp(odds))
    word = np.where(wrong, rng.integers(book.n_words, size=n), rng.choice(np.flatnonzero(~book.is_blank), n))
    table = pd.DataFrame({"barcode_id": word, "is_blank": book.is_blank[word], "probability": 1 / (1 + np.exp(-odds))})
    return table.assign(intensity=1.0), wrong


# --- odds and filter ------------------------------------------------------------------------------------------


def test_odds_are_calibrated_and_the_rate_is_held():
    rng = np.random.default_rng(5)
    n, blank_fraction = 20_000, 0.2
    evidence = Evidence(steps=(0.02,), prior=(0.0, 0.0), weight=4.0, unchecked=(0.0, 0.0))
    quality = rng.normal(size=(n, 1))
    wrong = rng.random(n) < 1 / (1 + np.exp(2 + 2 * quality[:, 0]))
    tally = tally_calls(quality, wrong & (rng.random(n) < blank_fraction), evidence)
    odds = fit_log_odds(tally, blank_fraction, evidence)
    probability = probability_wrong(quality, odds)
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.7)):
        chosen = (probability >= low) & (probability < high)
        assert wrong[chosen].mean() == pytest.approx(probability[chosen].mean(), abs=0.05)
    keep = log_odds_wrong(quality, odds) <= threshold_at_rate(tally, odds, 0.05)
    assert wrong[keep].mean() == pytest.approx(0.05, abs=0.02)
    assert keep.mean() > 0.5
    assert keep.mean() == pytest.approx(keep_at_rate(probability, 0.05).mean(), abs=0.01)  # up to one bin


@given(st.lists(st.tuples(st.floats(-12, 12), st.booleans(), st.integers(0, 2)), max_size=40))
def test_tallies_of_fields_add_up_in_any_order(rows):
    value = np.array([(row[0], max(row[0], 0.0)) for row in rows]).reshape(-1, 2)
    blank, field = np.array([row[1] for row in rows], bool), np.array([row[2] for row in rows], int)
    parts = [tally_calls(value[field == k], blank[field == k], POSTERIOR) for k in range(3)]
    whole = tally_calls(value, blank, POSTERIOR)
    for order in ((0, 1, 2), (2, 0, 1)):
        added = add_tallies([parts[k] for k in order], POSTERIOR)
        for name in ("values", "calls", "blanks"):
            np.testing.assert_array_equal(getattr(added, name), getattr(whole, name))
    assert whole.calls.sum() == len(rows)
    assert whole.blanks.sum() == blank.sum()


def test_rate_calls__without_blanks_the_posterior_stands():
    names = tuple(f"g{k}" for k in range(140))
    genes = Codebook(names, ("",) * 140, mhd4_codebook(list(names)).words, BOOK.bit_names)
    calls, wrong = drawn_calls(20_000, genes)
    rated = rate_calls(calls, genes)
    odds = np.log(calls["probability"] / (1 - calls["probability"]))
    np.testing.assert_allclose(rated["probability"], 1 / (1 + np.exp(-0.9 * odds)), atol=1e-4)
    keep = keep_at_rate(1 - rated["probability"].to_numpy(float))
    assert wrong[keep].mean() == pytest.approx(0.05, abs=0.015)
    assert "no blanks" in str(few_blanks(0, blanks_in_book=False))


def test_call_features__of_patches_and_of_posteriors():
    columns = {"area": [9], "distance": [0.3], "intensity": [1.0], "hamming_distance": [4], "probability": [np.nan]}
    features, evidence = call_features(pd.DataFrame(columns))
    assert evidence is PATCHES
    np.testing.assert_allclose(features, [[np.log(9), 0.3, 0.0, 2.0]])
    features, evidence = call_features(pd.DataFrame(columns | {"probability": [0.5]}))
    assert evidence is POSTERIOR
    np.testing.assert_allclose(features, [[0.0, 0.0]])
    dim, _ = call_features(pd.DataFrame(columns | {"probability": [0.5], "intensity": [0.25]}))
    np.testing.assert_allclose(dim, [[0.0, np.log(2)]])


def test_threshold__of_nothing_and_of_what_is_always_wrong():
    none = tally_calls(np.empty((0, 2)), np.empty(0, bool), POSTERIOR)
    assert threshold_at_rate(none, np.array([0.0, 1.0, 3.0]), 0.05) == np.inf
    bad = tally_calls(np.full((5, 2), 3.0), np.zeros(5, bool), POSTERIOR)
    assert threshold_at_rate(bad, np.array([0.0, 1.0, 3.0]), 0.05) == -np.inf


def test_blank_share__follows_the_molecules_that_are_confused():
    rng = np.random.default_rng(1)
    abundance = np.where(BOOK.is_blank, 0.0, rng.lognormal(0, 1, BOOK.n_words))
    abundance[0] = abundance.sum()  # one gene makes up half of all molecules
    near = reference.nearest_words(BOOK)
    received = near @ abundance
    expected = received[BOOK.is_blank].sum() / received.sum()
    right = rng.multinomial(20_000, abundance / abundance.sum())
    found = right + rng.multinomial(2_000, received / received.sum())
    assert abs(expected - BOOK.is_blank.mean()) > 0.02
    assert blank_share(found, BOOK, PATCHES) == pytest.approx(expected, abs=0.003)
    assert blank_share(found, BOOK, POSTERIOR) == BOOK.is_blank.mean()
    assert blank_share(0 * found, BOOK, PATCHES) == pytest.approx(BOOK.is_blank.mean(), abs=0.005)


def test_few_blanks_are_reported():
    assert "too few blanks called (3)" in str(few_blanks(3))
    assert few_blanks(30) is None


# --- rates of errors ------------------------------------------------------------------------------------------


def test_bit_error_rates_are_those_put_in():
    imaging = Imaging(lost=0.15, gained=0.03)
    stack, _ = simulate_stack(BOOK, shape=(400, 400), density=0.004, seed=8, imaging=imaging)
    rates = bit_error_rates(words_of(decode_all(stack, BOOK)), BOOK)
    assert rates["lost"].mean() == pytest.approx(0.15, abs=0.02)
    assert rates["gained"].mean() == pytest.approx(0.03, abs=0.01)
    assert rates["lost"].between(rates["lost_low"], rates["lost_high"]).all()
    assert (rates["lost_low"] <= 0.15).sum() + (rates["lost_high"] >= 0.15).sum() >= 28


def test_detection_efficiency_is_the_share_found():
    stack, truth = simulate_stack(BOOK, shape=(512, 512), density=0.004, seed=9)
    found = decode_all(stack, BOOK)
    keep = keep_at_rate(1 - found["probability"].to_numpy(float))
    efficiency = word_statistics(words_of(found, keep), BOOK, BOOK.is_blank.mean())["detection_efficiency"]
    assert efficiency.mean() == pytest.approx(len(match_calls(found[keep], truth)[0]) / len(truth), abs=0.06)


@given(st.integers(0, 2**32 - 1))
def test_tally_words__equals_counting_one_by_one_and_adds_up(seed):
    rng = np.random.default_rng(seed)
    n = 60
    word, kept = rng.integers(BOOK.n_words, size=n), rng.random(n) < 0.7
    flips = rng.choice([0, 1, 2, 8, 256, 3, 5], n).astype(np.uint64)
    shown, probability = BOOK.codes[word] ^ flips, rng.random(n)
    whole = tally_words(word, shown, probability, kept, BOOK)
    expected = reference.word_tally(word, shown, probability, kept, BOOK)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(whole, name), value, err_msg=name)
    parts = [tally_words(word[s], shown[s], probability[s], kept[s], BOOK) for s in (slice(0, 25), slice(25, None))]
    for name in expected:
        np.testing.assert_allclose(getattr(add_word_tallies(parts, BOOK), name), getattr(whole, name))


def test_held_out_rate_is_that_of_calls_rated_by_others():
    calls, wrong = drawn_calls(60_000, BOOK)
    features, evidence = call_features(calls)
    blank = calls["is_blank"].to_numpy()
    half = np.arange(len(calls)) % 2 == 1
    halves = tuple(tally_calls(features[side], blank[side], evidence) for side in (half, ~half))
    rate, low, high = held_out_rate(halves, evidence, BOOK.is_blank.mean(), 0.05)
    assert low < 0.05 < high
    assert rate == pytest.approx(0.05, abs=0.01)
    keep = keep_at_rate(1 - rate_calls(calls, BOOK)["probability"].to_numpy())
    assert wrong[keep].mean() == pytest.approx(0.05, abs=0.01)
    assert misidentification_rate(blank[keep].sum(), keep.sum(), BOOK.is_blank.mean())[0] == pytest.approx(
        0.05, abs=0.01
    )


def test_wilson_holds_its_extremes():
    assert wilson(0, 0) == pytest.approx((np.nan,) * 3, nan_ok=True)
    assert wilson(0, 10)[1] == 0
    assert wilson(10, 0)[2] == 1
    share, low, high = wilson(10, 90)
    assert (share, low, high) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-3)


# --- molecules that two fields show ---------------------------------------------------------------------------


def sightings(fov: int, word, x, edge) -> Sightings:
    x = np.array(x, float)
    return Sightings(fov, np.array(word), x, np.zeros(len(x)), np.array(edge, float))


def test_seen_better_elsewhere__keeps_the_one_farther_from_the_edge():
    one = sightings(0, [1, 1, 2], [10.0, 10.15, 10.0], [3.0, 3.0, 9.0])
    other = sightings(1, [1, 2], [10.1, 30.0], [5.0, 1.0])
    assert seen_better_elsewhere(one, [other]).tolist() == [False, True, False]  # 10.15 is nearer to 10.1 than 10.0
    assert seen_better_elsewhere(other, [one]).tolist() == [False, False]
    nearer = sightings(1, [1, 2], [10.1, 30.0], [2.0, 1.0])
    assert seen_better_elsewhere(one, [nearer]).tolist() == [False, False, False]
    assert seen_better_elsewhere(nearer, [one]).tolist() == [True, False]


def test_seen_better_elsewhere__at_equal_distance_the_lower_field_stays():
    one, other = sightings(0, [1], [10.0], [5.0]), sightings(1, [1], [10.0], [5.0])
    assert not seen_better_elsewhere(one, [other]).any()
    assert seen_better_elsewhere(other, [one]).all()


@given(st.integers(0, 2**32 - 1))
def test_pair_up__equals_the_reference_from_both_sides(seed):
    rng = np.random.default_rng(seed)
    fields = []
    for fov in (0, 1):
        n = rng.integers(0, 15)
        x, y = rng.uniform(0, 1.5, (2, n))
        fields.append(Sightings(fov, rng.integers(0, 2, n), x, y, rng.integers(0, 3, n).astype(float)))
    pairs = sorted(zip(*(rows.tolist() for rows in pair_up(*fields)), strict=True))
    assert pairs == reference.pairs_of_fields(*fields, FIELD_RADIUS)
    worse = [seen_better_elsewhere(fields[k], [fields[1 - k]]) for k in (0, 1)]
    # one of each pair is kept, and nothing else is dropped
    assert all(worse[0][i] != worse[1][j] for i, j in pairs)
    assert sum(part.sum() for part in worse) == len(pairs)
