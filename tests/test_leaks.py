"""Light of bits that leaks into others: simulated, measured, subtracted, reported."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from merfish import mhd4_codebook, simulate_stack
from merfish.imaging._leak_kernels import locate_group
from merfish.imaging.leaks import PeakLight, find_leaks
from merfish.imaging.organization import NO_ROUND, Channel, Movie
from merfish.imaging.preprocess import Bandpassed, bandpass
from merfish.imaging.unmixing import Leak, subtract_leaks, unmixing
from merfish.pipeline.record import leak_rows
from merfish.report.notices import leak_lines
from merfish.simulate.disturbances import leak_light, leak_shares
from merfish.stack import prepare

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


def test_simulated_light_leaks_within_a_round_and_into_the_next():
    bit = np.arange(6)
    shares = leak_shares(bit // 2, bit % 2, 0.1, 0.2)
    assert shares[2].tolist() == [0, 0, 0, 0.1, 0.2, 0]
    # a spot of 1 in a bit with 300 photons, in bits with 300, 100 and none
    seen = leak_light(np.eye(6)[[2]], np.array([1, 1, 300, 100, 600, 0.0]), shares)
    assert seen[0] == pytest.approx([0, 0, 1, 0.3, 0.1, 0])


@pytest.mark.parametrize(("dark", "on", "least"), [(300, 80, 20), (60, 200, 20), (30, 200, 100), (8, 8, 20)])
def test_locate_group__is_that_of_the_reference(dark, on, least):
    rng = np.random.default_rng(dark)
    values = np.sort(np.append(rng.normal(0.15, 0.02, dark), np.exp(rng.normal(0, 0.25, on))))
    found, expected = locate_group(values, least), reference.locate_group(values, least)
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert np.isnan(found[0]) == (dark < least)
    if dark >= least:
        assert found[0] == pytest.approx(0.15, abs=0.01)


def peaks(words: np.ndarray, leaks: list[Leak], scale: np.ndarray, seed: int) -> PeakLight:
    """Light of 4,000 molecules at their peaks, with noise of 0.02 molecules."""
    rng = np.random.default_rng(seed)
    on = words[rng.integers(0, len(words), 4000)] * (rng.random((4000, words.shape[1])) > 0.1)
    light = on * np.exp(rng.normal(0, 0.3, (4000, 1))) * np.exp(rng.normal(0, 0.15, on.shape)) * scale
    light = light + sum(share * np.outer(light[:, a], np.arange(len(scale)) == b) for a, b, share in leaks)
    light = light + 0.02 * scale * rng.standard_normal(light.shape)
    molecule, bit = np.nonzero(on)
    return PeakLight(bit, light[molecule].astype(np.float32))


@pytest.mark.parametrize(
    "words",
    [
        BOOK.words,
        np.eye(4, dtype=np.uint8)[[[0, 1, 2, 3], [1, 2, 3, 0], [2, 0, 1, 3]]].transpose(1, 0, 2).reshape(4, 12),
    ],
)
def test_find_leaks__finds_those_there_are_and_no_others(words):
    scale = np.linspace(200, 400, words.shape[1])
    scale[5] = 0  # a dead bit
    leaks = [Leak(0, 1, 0.1), Leak(1, 0, 0.2), Leak(2, 4, 0.1), Leak(3, 4, 0.15), Leak(10, 8, 0.1)]
    assert find_leaks([peaks(words, [], scale, 1)], scale) == ()
    found = find_leaks([peaks(words, leaks, scale, 2), peaks(words, leaks, scale, 3)], scale)
    assert [leak[:2] for leak in found] == [leak[:2] for leak in leaks]
    assert [leak.share for leak in found] == pytest.approx([leak.share for leak in leaks], abs=0.01)


def test_find_leaks__bits_of_every_molecule_do_not_leak():
    scale = np.full(4, 100.0)
    assert find_leaks([peaks(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]), [], scale, 4)], scale) == ()
    assert find_leaks([], scale) == ()
    assert find_leaks([PeakLight(np.empty(0, int), np.empty((0, 4), np.float32))], scale) == ()


def test_unmixing__restores_light_that_leaked_twice():
    leaks = [Leak(0, 1, 0.3), Leak(1, 2, 0.3)]
    own = np.array([[100.0, 0, 0, 0], [0, 100, 0, 0], [7, 8, 9, 10]], np.float32).T.copy()
    seen = own + np.stack([0 * own[0], 0.3 * own[0], 0.3 * own[1], 0 * own[0]])
    subtract_leaks(seen, leaks)
    np.testing.assert_allclose(seen, own, atol=1e-4)
    assert (unmixing([], 3) == np.eye(3)).all()


def test_decoding_starts_from_images_without_leaks():
    stack, _ = simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=31, bleed_through=0.2)
    clean, normalization = prepare(stack, BOOK)
    assert isinstance(clean, Bandpassed)
    assert sorted(leak[:2] for leak in clean.leaks) == [(bit, bit ^ 1) for bit in range(16)]
    assert np.median([leak.share for leak in clean.leaks]) == pytest.approx(0.2, abs=0.02)
    expected = bandpass(stack, smoothing=clean.smoothing, background=clean.background)
    subtract_leaks(expected, clean.leaks)
    height = normalization.scale[:, None, None]
    np.testing.assert_allclose(clean[:, :] / height, expected / height, atol=1e-3)
    np.testing.assert_allclose(clean[3] / height[3], expected[3] / height[3], atol=1e-3)
    assert prepare(simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=31)[0], BOOK)[0].leaks == ()


def test_leaks_are_told_with_their_kind():
    def channel(imaging_round: int, color: str) -> Channel:
        return Channel("", "", 1, 0, color, Movie("m", "r", imaging_round), (0,), (0.0,), None)

    channels = [channel(0, "650"), channel(0, "750"), channel(1, "750"), channel(NO_ROUND, "750")]
    leaks = [Leak(0, 1, 0.1), Leak(1, 2, 0.2), Leak(2, 0, 0.05), Leak(2, 3, 0.04)]
    rows = leak_rows(leaks, ["a", "b", "c", "d"], channels)
    assert [row["kind"] for row in rows] == ["carry-over", "bleed-through", "", ""]
    (line,) = leak_lines({"leaks": rows})
    assert "b into c 20% (carry-over), a into b 10% (bleed-through), c into a 5%," in line
    assert leak_lines({}) == []
