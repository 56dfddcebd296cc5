from __future__ import annotations

import heapq

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

import reference
from merfish import decode, mhd4_codebook, simulate_stack
from merfish.calls.filtering import keep_calls
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._alignment_kernels import weigh_pairs
from merfish.decoding.alignment import bit_shifts
from merfish.decoding.candidates import CELL, RADIUS, look, make_scene
from merfish.decoding.evidence import shrunk_shares, start_classes, start_histograms, word_abundance
from merfish.decoding.overlap import halos
from merfish.decoding.peaks import Fit
from merfish.decoding.psf import psf_sigma
from merfish.imaging._kernels import median_of
from merfish.imaging.normalize import NoiseMap, locate_peaks, typical_height, weighted_median
from merfish.imaging.preprocess import Bandpassed
from merfish.simulate import Imaging, match_calls, score_calls
from merfish.stack import decode_all

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


@given(arrays(np.float32, (2, 8, 9), elements=st.floats(0, 9, width=16), unique=True))
def test_locate_peaks_equals_the_reference(stack):
    for image, threshold in zip(stack, (2.0, 5.0), strict=True):
        x, y, value = locate_peaks(image, 8, threshold)
        expected = reference.peaks(image, threshold)
        assert len(x) == len(expected)
        for (row, column), px, py, top in zip(expected, x, y, value, strict=True):
            assert abs(px - column) <= 1
            assert abs(py - row) <= 1
            assert top >= image[row, column]


def test_locate_peaks_finds_the_middle_of_a_spot_and_keeps_planes_apart():
    y, x = np.mgrid[:20, :20]
    spot = np.exp(-((x - 9.3) ** 2 + (y - 11.6) ** 2) / (2 * 1.3**2)).astype(np.float32)
    px, py, value = locate_peaks(np.concatenate([spot, 2 * spot]), 20, 0.5)
    assert px == pytest.approx([9.3, 9.3], abs=0.05)
    assert py == pytest.approx([11.6, 31.6], abs=0.05)
    assert value == pytest.approx([1, 2], rel=0.1)


def test_locate_peaks_finds_more_than_it_has_room_for_at_first():
    image = np.zeros((41, 41), np.float32)
    image[1:-1:2, 1:-1:2] = np.arange(1, 401).reshape(20, 20)
    assert len(locate_peaks(image, 41, 0.5)[0]) == 400


@given(st.data())
def test_best_class_equals_the_reference(data):
    seen = data.draw(arrays(np.int64, 16, elements=st.integers(0, kernels.N_BINS - 1)))
    ratio = data.draw(arrays(np.float64, (16, kernels.N_BINS), elements=st.floats(-5, 5, width=16), fill=st.just(0)))
    dim = np.linspace(2, -2, kernels.N_STEPS)
    classes = start_classes(BOOK, np.ones(16, bool))._replace(ratio=ratio, dim=dim)
    bright = data.draw(st.floats(0, 4))
    score = np.empty(BOOK.n_words + 2)
    best = kernels.best_class(seen, bright, classes, score)
    words = np.concatenate([BOOK.words, np.zeros((1, 16)), np.ones((1, 16))])
    expected = reference.word_scores(seen, ratio, classes.log_prior, words)
    expected[-2] += dim[kernels.step_of(bright)]
    assert score == pytest.approx(expected)
    assert best == int(np.argmax(score))


@given(st.lists(st.tuples(st.floats(0, 9.9), st.floats(0, 5.9)), max_size=20))
def test_fill_grid_lists_every_point_in_its_cell(points):
    x, y = np.array(points, float).reshape(-1, 2).T
    start, order = np.empty(5 * 3 + 1, np.int64), np.empty(len(x), np.int64)
    kernels.fill_grid(x, y, 2.0, 5, start, order)
    assert sorted(order.tolist()) == list(range(len(x)))
    for cell in range(15):
        for i in order[start[cell] : start[cell + 1]]:
            assert int(y[i] / 2) * 5 + int(x[i] / 2) == cell


@given(st.floats(0, 7), st.floats(0, 5))
def test_sample_is_linear_interpolation(x, y):
    image = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    expected = ndimage.map_coordinates(image.astype(float), [[y], [x]], order=1, mode="nearest")[0]
    assert kernels.sample(image, y, x, 0, 5) == pytest.approx(expected, abs=1e-5)


def test_the_start_favours_near_peaks_of_like_height_and_dark_places_least():
    off, on = start_histograms()
    ratio = np.log(on / off)
    near = ratio[kernels.bin_of(0.05, 1.0, 0.0)]
    assert near > ratio[kernels.bin_of(0.05, 0.3, 0.0)]
    assert near > ratio[kernels.bin_of(0.9, 1.0, 0.0)]
    assert near > ratio[kernels.bin_of(0.05, 1.0, 1.0)]
    assert near > 2
    assert ratio[kernels.bin_of(-1.0, 0.0, 0.0)] < -1


def test_blanks_are_spread_over_the_abundances_of_genes():
    is_blank = np.array([False, False, False, False, True, True])
    share = word_abundance(np.array([95.0, 15, 5, 35, 0, 0]), is_blank)
    assert share.sum() == pytest.approx(1)
    assert share[4] == pytest.approx((share[1] + share[2]) / 2)
    assert share[5] == pytest.approx((share[0] + share[3]) / 2)
    assert share[is_blank].mean() == pytest.approx(share[~is_blank].mean())


@pytest.fixture(scope="module")
def field():
    return simulate_stack(BOOK, shape=(384, 384), density=0.01, seed=4)


def test_spots_find_more_than_pixels_and_say_how_sure_they_are(field):
    stack, truth = field
    found = decode_all(stack, BOOK, method="spots")
    score = score_calls(keep_calls(found), truth, shape=(384, 384))
    assert score["recall"] > 0.8
    assert score["precision"] > 0.92
    assert score["median_error"] < 0.1
    assert score["recall"] > score_calls(decode(stack, BOOK, method="pixels"), truth, shape=(384, 384))["recall"]
    right = np.zeros(len(found), bool)
    right[match_calls(found, truth)[0]] = True
    for low, high in ((0.5, 0.9), (0.9, 1.01)):
        chosen = found["probability"].between(low, high, inclusive="left")
        assert right[chosen].mean() == pytest.approx(found.loc[chosen, "probability"].mean(), abs=0.06)


def test_spots_are_deterministic_and_do_not_care_about_the_order_of_bits(field):
    stack = field[0][:, :192, :192]
    first, again = (decode(stack, BOOK, method="spots") for _ in range(2))
    assert first.equals(again)
    order = np.random.default_rng(0).permutation(16)
    permuted = decode(stack[order], BOOK.permuted(order), method="spots")
    assert len(permuted) == pytest.approx(len(first), abs=2)
    assert len(match_calls(first, permuted, radius=0.1)[0]) > 0.97 * len(first)


def test_spots_of_planes_see_a_molecule_once(field):
    stack = field[0][:, :192, :192]
    planes = np.stack([stack, stack], axis=1)
    single, double = decode(stack, BOOK), decode(planes, BOOK)
    assert len(double) == pytest.approx(len(single), rel=0.1)
    assert double["z"].median() == pytest.approx(0.5, abs=0.1)


def test_a_molecule_is_called_once(field):
    calls = decode_all(field[0], BOOK, method="spots")
    for _, group in calls.groupby("barcode_id"):
        distance = np.hypot(*(np.subtract.outer(group[axis].to_numpy(), group[axis].to_numpy()) for axis in ("x", "y")))
        assert (distance[np.triu_indices(len(group), 1)] > 0.9 * RADIUS * 1.35).all()


def test_calls_do_not_depend_on_the_number_of_threads(field):
    stack, threads = field[0][:, :256, :256], numba.get_num_threads()
    try:
        several = decode_all(stack, BOOK)
        numba.set_num_threads(1)
        assert several.equals(decode_all(stack, BOOK))
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("n_planes", [1, 4])
def test_clusters_are_the_connected_peaks(n_planes):
    rng = np.random.default_rng(n_planes)
    n, height, sigma = 150 * n_planes, 50, 1.35
    x, y, bit = rng.uniform(0, 40, n), rng.uniform(0, height * n_planes - 1, n), rng.integers(0, 3, n)
    y = np.minimum(y, np.floor(y / height) * height + height - 1)
    fits = [Fit(x[bit == k], y[bit == k], np.ones((bit == k).sum()), None, None) for k in range(3)]
    scene = make_scene(fits, np.zeros((3, height * n_planes, 41), np.int8), height, sigma, np.zeros((3, 2, 3)))
    expected = reference.clusters(scene.px, scene.py, scene.pb, RADIUS * sigma, CELL * sigma, height)
    assert {frozenset(np.flatnonzero(scene.cluster == k).tolist()) for k in np.unique(scene.cluster)} == expected
    assert sorted(scene.seeds.tolist()) == list(range(n))
    assert (np.diff(scene.cluster[scene.seeds]) >= 0).all()


def test_peaks_are_ranked_by_their_score_then_by_their_number():
    rng = np.random.default_rng(0)
    fits = [Fit(*rng.uniform(0, 60, (2, 40)), rng.uniform(0.5, 1.5, 40), None, None) for _ in range(16)]
    scene = make_scene(fits, np.zeros((16, 61, 61), np.int8), 61, 1.35, np.zeros((16, 2, 3)))
    views, classes = look(scene), start_classes(BOOK, np.ones(16, bool))
    score = np.empty(BOOK.n_words + 2)
    expected = []
    for seed in range(len(scene.px)):
        best = kernels.best_class(views.seen[seed], views.centre[seed, 2], classes, score)
        expected.append((np.inf if best == BOOK.n_words else -score[best], scene.order[seed], seed))
    heap = kernels.ranked(scene, 0, views, classes, score)
    found = [heapq.heappop(heap) for _ in range(len(heap))]
    assert len(scene.part) == 2
    assert found == [*sorted(row for row in expected if row[0] < np.inf), (np.inf, -1, -1)]
    assert len(found) < len(expected)
    assert (np.diff([row[0] for row in found[:-1]]) == 0).any()


def test_halos_are_weak_near_a_strong_molecule_of_their_word():
    word, plane = np.array([1, 1, 1, 2, 1]), np.array([0, 0, 0, 0, 2])
    x = np.array([10.0, 13.0, 14.0, 12.0, 11.0])
    halo = halos(word, x, np.zeros(5), plane, np.array([10.0, 1.0, 9.0, 1.0, 1.0]))
    assert halo.tolist() == [False, True, False, False, False]


def test_noise_map_is_that_of_each_tile_in_each_plane():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (2 * 96, 96)).astype(np.float32)
    image[96:, 48:] *= 5
    image[96:, 48:] += 2
    noise = NoiseMap.of(image, 96)
    x, y = np.array([16.0, 80, 16, 80]), np.array([48.0, 48, 144, 144])
    assert noise.sigma(x, y) == pytest.approx([1, 1, 1, 5], rel=0.15)
    assert noise.level(x, y) == pytest.approx([0, 0, 0, 2], abs=0.7)


@given(arrays(np.float32, st.integers(1, 12), elements=st.floats(-9, 9, width=16)))
def test_median_of_equals_numpy(values):
    assert median_of(values) == np.median(values)


@pytest.mark.parametrize("size", [(20, 30), (96, 70)])
def test_noise_map_equals_the_reference(size):
    image = np.random.default_rng(0).normal(0, 1, (2 * size[0], size[1])).astype(np.float32)
    noise = NoiseMap.of(image, size[0])
    medians, sigmas = reference.tile_noise(image.reshape(2, *size), noise.tile, 3)
    assert noise.medians == pytest.approx(medians)
    assert noise.sigmas == pytest.approx(1.4826 * sigmas, rel=1e-6)


def test_noise_is_interpolated_between_tiles():
    rng = np.random.default_rng(0)
    noise = NoiseMap(*rng.random((2, 3, 4, 5), np.float32), 40, (10, 12))
    x, y = rng.uniform(0, 59, 100), rng.integers(0, 3, 100) * 40 + rng.uniform(0, 39, 100)
    places = [y // 40, (y % 40 + 0.5) / 10 - 0.5, (x + 0.5) / 12 - 0.5]
    assert noise.level(x, y) == pytest.approx(ndimage.map_coordinates(noise.medians, places, order=1, mode="nearest"))
    assert noise.sigma(x, y) == pytest.approx(ndimage.map_coordinates(noise.sigmas, places, order=1, mode="nearest"))


def test_weigh_pairs_equals_the_reference():
    rng = np.random.default_rng(0)
    a, b = np.sort(np.argsort(rng.random((50, 4)), axis=1)[:, :2], axis=1).T.copy()
    step, warp = rng.normal(0, 1, (50, 2)), rng.normal(0, 1, (4, 2, 3))
    place = np.column_stack([np.ones(50), rng.uniform(-1, 1, (50, 2))])
    links, pull = np.empty((4, 4, 3, 3)), np.empty((4, 2, 3))
    totals = weigh_pairs(step, place, a, b, warp, 0.3, 0.8, 0.02, links, pull)
    expected = reference.weigh_pairs(step, place, a, b, warp, 0.3, 0.8, 0.02)
    for got, want in zip((links, pull, *totals), expected, strict=True):
        assert got == pytest.approx(want)


def test_weighted_median_is_not_moved_by_many_small_values():
    heights = np.concatenate([np.full(50, 10.0), np.full(200, 0.5)])
    assert weighted_median(heights) == 10.0
    assert np.median(heights) == 0.5


def test_typical_height_is_not_set_by_a_few_bright_pixels():
    heights = np.concatenate([np.random.default_rng(0).lognormal(0, 0.3, 600), np.full(50, 40.0)])
    assert weighted_median(heights) == 40.0
    assert typical_height(heights) == pytest.approx(weighted_median(heights[:600]), rel=0.2)
    assert typical_height(heights[:600]) == weighted_median(heights[:600])
    dim = np.concatenate([heights[:150], np.full(400, 0.05)])  # rings of molecules out of focus
    assert typical_height(dim) == weighted_median(dim)


def test_radius_fits_the_grid():
    assert RADIUS <= CELL  # only neighbouring cells are searched


def test_shifted_bits_are_found_and_moved_back():
    stack, truth = simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=12, bit_shift=0.8)
    straight, _ = simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=12)
    moved, still = (score_calls(decode(s, BOOK), truth, shape=(256, 256))["recall"] for s in (stack, straight))
    assert moved > still - 0.03


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_bit_shifts_are_those_put_in(density):
    rng = np.random.default_rng(int(1000 * density))
    n, true = round(density * 200**2), rng.normal(0, 0.8, (16, 2))
    true -= true.mean(axis=0)
    place = rng.uniform(0, 200, (n, 2))
    molecule, bit = np.nonzero(BOOK.words[rng.integers(BOOK.n_words, size=n)] & (rng.random((n, 16)) > 0.1))
    y, x = (place[molecule] + true[bit] + rng.normal(0, 0.08, (len(bit), 2))).T
    found = bit_shifts(x, y, np.zeros(len(x), int), bit, 16, 1.35)
    assert found.warp[:, :, 0] == pytest.approx(true, abs=0.06)
    assert not found.warp[:, :, 1:].any()  # noise is not taken for a stretch
    none = bit_shifts(x[:0], y[:0], bit[:0], bit[:0], 16, 1.35)
    assert not none.warp.any()


def test_bit_shifts_follow_a_stretch():
    rng = np.random.default_rng(3)
    n, true = 1500, np.concatenate([rng.normal(0, 0.4, (16, 2, 1)), rng.normal(0, 0.003, (16, 2, 2))], axis=2)
    true -= true.mean(axis=0)
    place = rng.uniform(0, 400, (n, 2))
    molecule, bit = np.nonzero(BOOK.words[rng.integers(BOOK.n_words, size=n)] & (rng.random((n, 16)) > 0.1))
    terms = np.column_stack([np.ones(len(bit)), place[molecule]])
    moved = place[molecule] + np.einsum("pat,pt->pa", true[bit], terms) + rng.normal(0, 0.08, (len(bit), 2))
    found = bit_shifts(moved[:, 1], moved[:, 0], np.zeros(len(bit), int), bit, 16, 1.35)
    corners = np.array([[1, y, x] for y in (0, 400) for x in (0, 400)])
    assert found.warp @ corners.T == pytest.approx(true @ corners.T, abs=0.1)


def test_shares_are_drawn_to_the_mean_as_far_as_bits_are_alike():
    total = np.full(16, 400.0)
    rng = np.random.default_rng(0)
    alike = shrunk_shares(rng.binomial(400, 0.1, 16).astype(float), total, 0.1)
    assert alike == pytest.approx(0.1, abs=0.015)
    true = np.linspace(0.02, 0.4, 16)
    assert shrunk_shares(true * total, total, float(true.mean())) == pytest.approx(true, abs=0.02)


@pytest.mark.parametrize("sigma", [0.9, 1.35, 2.2])
def test_psf_sigma_is_that_of_the_spots(sigma):
    stack, _ = simulate_stack(BOOK, shape=(256, 256), seed=3, imaging=Imaging(psf_sigma=(sigma, sigma)))
    filtered = Bandpassed(stack, smoothing=0.7, background=2.0)
    assert psf_sigma(filtered, 256) == pytest.approx(sigma, rel=0.06)
    assert psf_sigma(filtered[:, :], 256) == pytest.approx(sigma, rel=0.06)
