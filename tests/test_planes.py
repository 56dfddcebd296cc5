"""A molecule between planes is counted once, and its z is more accurate than the distance of the planes."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from merfish import decode, mhd4_codebook, simulate_stack
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.candidates import make_scene
from merfish.decoding.overlap import same_molecule_pairs, splinters
from merfish.decoding.peaks import Fit
from merfish.decoding.planes import LONGEST_RANGE, USUAL_RANGE, depth, focal_range, focus_of
from merfish.simulate import Imaging, match_calls, score_calls

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


N_BITS, N_PLANES, HEIGHT, WIDTH = 3, 3, 6, 7


def some_scene(rng):
    """Return a scene of 60 peaks in three planes, and the peaks as (x, y, height, bit)."""
    left = rng.integers(-20, 20, (N_BITS, N_PLANES * HEIGHT, WIDTH)).astype(np.int8)
    n = 60
    plane = rng.integers(0, N_PLANES, n) * HEIGHT
    bit = np.sort(rng.integers(0, N_BITS, n))
    px, py, top = rng.uniform(0, WIDTH - 1, n), plane + rng.uniform(0, HEIGHT - 1, n), rng.uniform(0, 2, n)
    fits = [Fit(px[bit == b], py[bit == b], top[bit == b], None, None) for b in range(N_BITS)]
    scene = make_scene(fits, left, HEIGHT, 1.0, np.zeros((N_BITS, 2, 3)))._replace(step=0.1)
    return scene, list(zip(scene.px, scene.py, scene.pa, scene.pb, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_light_by_plane_equals_the_reference(seed):
    rng = np.random.default_rng(seed)
    scene, peaks = some_scene(rng)
    x, y = rng.uniform(0, WIDTH - 1, 20), rng.integers(0, N_PLANES, 20) * HEIGHT + rng.uniform(0, HEIGHT - 1, 20)
    bits = rng.integers(1, 1 << N_BITS, 20).astype(np.uint64)
    out = np.empty((20, 3))
    light_by_plane(0, 20, x, y, bits, scene, out)
    radius = kernels.SAME_SPOT * scene.radius
    for m in range(20):
        on = [bit for bit in range(N_BITS) if int(bits[m]) >> bit & 1]
        expected = reference.light_by_plane(x[m], y[m], on, peaks, radius, 0.1 * scene.light, HEIGHT)
        assert out[m] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("seed", range(5))
def test_tails_equal_the_reference(seed):
    scene, peaks = some_scene(np.random.default_rng(seed))
    near = kernels.SAME_SPOT * scene.radius
    for peak in range(len(peaks)):
        taken = np.zeros(len(peaks), bool)
        kernels.take_tails(peak, scene, taken)
        assert taken.tolist() == reference.tails(peak, peaks, HEIGHT, near, scene.cell, scene.tail)


@pytest.mark.parametrize("focal_range", [0.7, 1.0])
def test_depth_of_a_gaussian_beam_is_exact(focal_range):
    z = np.linspace(-0.5, 0.5, 11)
    light = 2 / (1 + ((np.arange(-1, 2) - z[:, None]) / focal_range) ** 2) ** 2
    bright = light.min(axis=1) > 0.03
    assert bright.sum() >= 5
    assert depth(light, np.full(11, 4))[bright] == pytest.approx(4 + z[bright], abs=1e-5)


@pytest.mark.parametrize("focus", [0.7, 1.0, 3.0])
def test_focal_range_of_a_gaussian_beam_is_found(focus):
    z = np.linspace(-0.5, 0.5, 41)
    light = 1 / (1 + ((np.arange(-1, 2) - z[:, None]) / focus) ** 2) ** 2
    assert focal_range(light) == pytest.approx(focus, rel=0.05)
    assert focus_of(light).tail == pytest.approx(0.7 ** min(0.9 / focus, 1), rel=0.05)
    assert focal_range(np.ones((41, 3))) == LONGEST_RANGE  # light that does not change
    assert focal_range(light[:5]) == USUAL_RANGE


def test_depth_stays_within_the_stack():
    light = np.array(
        [[np.nan, 1.0, 0.0], [0.0, 1.0, np.nan], [np.nan, 0.5, 2.0], [0.0, 0.0, 0.0], [np.nan, np.nan, np.nan]]
    )
    z = depth(light, np.array([0, 4, 0, 2, 0]))
    assert z[[3, 4]].tolist() == [2, 0]
    assert 0 <= z[0] < 0.1
    assert 3.9 < z[1] <= 4
    assert 0.5 < z[2] <= 1


def test_splinters_are_dim_beside_a_spot_of_their_word_and_only_between_planes():
    word, x, light = (
        np.array([1, 1, 1, 2, 1]),
        np.array([10.0, 12.0, 14.0, 11.0, 30.0]),
        np.array([1.0, 0.5, 0.9, 0.1, 0.1]),
    )
    plane = np.array([1, 2, 2, 1, 0])
    assert splinters(word, x, np.zeros(5), plane, light, 2).tolist() == [False, True, False, False, False]
    assert not splinters(word, x, np.zeros(5), np.zeros(5, int), light, 2).any()


def test_spots_place_molecules_between_planes_and_count_them_once():
    stack, truth = simulate_stack(BOOK, shape=(192, 192), density=0.004, seed=6, n_planes=4)
    calls = decode(stack, BOOK, method="spots")
    score = score_calls(calls, truth, shape=(192, 192))
    assert score["recall"] > 0.75
    assert score["precision"] > 0.85
    i, j = match_calls(calls, truth)
    error = np.abs(calls["z"].to_numpy()[i] - truth["z"].to_numpy()[j])
    inner = truth["z"].between(0, 3).to_numpy()[j]
    assert np.median(error[inner]) < 0.09
    assert (error[inner] < 0.25).mean() > 0.9
    a, b = same_molecule_pairs(*(calls[name].to_numpy() for name in ("barcode_id", "x", "y")), 1.5)
    assert (np.abs(calls["z"].to_numpy()[a] - calls["z"].to_numpy()[b]) > 1).all()


def test_planes_closer_than_the_focal_range_do_not_repeat_molecules():
    imaging = Imaging(plane_step=0.3)
    stack, truth = simulate_stack(BOOK, shape=(128, 128), density=0.003, n_planes=5, seed=8, imaging=imaging)
    score = score_calls(decode(stack, BOOK), truth, shape=(128, 128))
    assert score["precision"] > 0.88  # 0.76 with the reach of light as in planes 1.5 µm apart
    assert score["recall"] > 0.75
