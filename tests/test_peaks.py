from __future__ import annotations

import numpy as np
import pytest

import reference
from merfish.decoding import _peak_kernels as kernels
from merfish.decoding._peak_kernels import ROUND, Metric
from merfish.decoding.peaks import BIN, REACH, Fit, Profile, fit_peaks, measure_profile, shape_of, share_peaks
from merfish.imaging.normalize import NoiseMap, locate_peaks

SIGMA = 1.35
BINS = 1 / (BIN * SIGMA)
N_BINS = round(REACH / BIN)
PROFILE = Profile(np.append(np.exp(-((np.arange(N_BINS) / BINS) ** 2) / (2 * SIGMA**2)), 0.0))
SHAPE = shape_of(PROFILE, SIGMA)
RATIO, TILT = 1.4, np.radians(30)  # axes of an elliptical spot, and direction of the long one
LONG, SHORT = np.cos(TILT) ** 2, np.sin(TILT) ** 2
ELLIPSE = Metric(
    LONG / RATIO + SHORT * RATIO,
    np.cos(TILT) * np.sin(TILT) * (1 / RATIO - RATIO),
    SHORT / RATIO + LONG * RATIO,
)


def render(x, y, top, shape, metric=ROUND):
    row, column = np.mgrid[: shape[0], : shape[1]]
    out = np.zeros(shape)
    for a, b, c in zip(x, y, top, strict=True):
        dx, dy = column - a, row - b
        out += c * np.exp(-(metric[0] * dx**2 + 2 * metric[1] * dx * dy + metric[2] * dy**2) / (2 * SIGMA**2))
    return out


@pytest.fixture(scope="module", params=[ROUND, ELLIPSE], ids=["round", "elliptical"])
def crowd(request):
    """Simulate 300 x 300 px with single spots on a lattice, and pairs 2.6 px apart by the metric of the spots."""
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(np.arange(15, 290, 20.0), np.arange(15, 290, 20.0)), -1).reshape(-1, 2)
    x, y = (lattice + rng.uniform(-2, 2, lattice.shape)).T
    top = rng.uniform(0.6, 1.5, len(x))
    pair = np.arange(0, len(x), 3)
    angle = rng.uniform(0, 2 * np.pi, len(pair))
    dx, dy = np.cos(angle), np.sin(angle)
    xx, xy, yy = request.param
    away = 2.6 / np.sqrt(xx * dx**2 + 2 * xy * dx * dy + yy * dy**2)
    x, y = np.append(x, x[pair] + away * dx), np.append(y, y[pair] + away * dy)
    top = np.append(top, 0.8 * top[pair])
    image = render(x, y, top, (300, 300), request.param) + rng.normal(0, 0.01, (300, 300))
    return image.astype(np.float32), x, y, top, request.param


def test_pairs_that_show_one_peak_are_told_apart(crowd):
    image, x, y, top, _ = crowd
    assert len(locate_peaks(image, 300, 0.15)[0]) < 0.95 * len(x)
    found_x, found_y, found_top, *_ = fit_peaks(image.copy(), 300, SIGMA)
    assert len(x) <= len(found_x) <= 1.1 * len(x)
    distance = np.hypot(found_x[:, None] - x, found_y[:, None] - y)
    nearest = distance.argmin(axis=0)
    assert len(set(nearest)) == len(x)
    assert np.median(distance.min(axis=0)) < 0.05
    assert distance.min(axis=0).max() < 0.7
    assert np.median(found_top[nearest] / top) == pytest.approx(1, abs=0.06)


def test_the_light_of_the_peaks_is_taken_out(crowd):
    image = crowd[0].copy()
    fit_peaks(image, 300, SIGMA)
    assert image.std() < 0.1 * crowd[0].std()


def test_the_profile_is_measured_in_spite_of_neighbours(crowd):
    image, metric = crowd[0], crowd[-1]
    profile = measure_profile(image, 300, *locate_peaks(image, 300, 0.15), SIGMA)
    assert profile.height == pytest.approx(PROFILE.height, abs=0.06)
    assert profile.metric == pytest.approx(metric, abs=0.05)


def test_spots_are_round_if_only_some_of_the_bright_ones_are_elongated():
    rng, lattice = np.random.default_rng(0), np.mgrid[15:290:15, 15:290:15].reshape(2, -1).T
    x, y = (lattice + rng.uniform(-2, 2, lattice.shape)).T
    long = rng.random(len(x)) < 0.45
    image = render(x[~long], y[~long], 1 + 0 * x[~long], (300, 300))
    image += render(x[long], y[long], 1 + 0 * x[long], (300, 300), (0.2, 0.0, 5.0))
    image = (image + rng.normal(0, 0.01, image.shape)).astype(np.float32)
    assert measure_profile(image, 300, *locate_peaks(image, 300, 0.15), SIGMA).metric == ROUND


@pytest.mark.parametrize("metric", [ROUND, ELLIPSE])
def test_refit_spot_equals_least_squares(metric):
    x, y, top, shape = 10.2, 9.7, 1.1, shape_of(Profile(PROFILE.height, metric), SIGMA)
    image = render([10.35], [9.6], [1.3], (20, 20), metric).astype(np.float32)
    kernels.add_spot(image, 0, 19, x, y, -top, shape)
    got = kernels.refit_spot(image, 0, 19, x, y, top, shape)
    expected = reference.refit_spot(image, x, y, top, shape)
    assert got == pytest.approx(expected, abs=1e-5)
    assert got == pytest.approx((10.35, 9.6, 1.3), abs=0.03)


def test_planes_do_not_touch():
    spot = render([15.0], [3.0], [1.0], (30, 30)).astype(np.float32)
    rows = np.concatenate([spot, np.zeros((30, 30), np.float32)])
    kernels.add_spot(rows, 0, 29, 15.0, 29.0, 1.0, SHAPE)
    assert not rows[30:].any()


def test_fit_peaks__few_peaks_or_none():
    assert not len(fit_peaks(np.zeros((40, 40), np.float32), 40, SIGMA).x)
    (x,), (y,), *_ = fit_peaks(render([20.3], [19.8], [1.0], (40, 40)).astype(np.float32), 40, SIGMA)
    assert (x, y) == pytest.approx((20.3, 19.8), abs=0.05)


def test_the_light_of_one_peak_is_shared_by_the_molecules_that_make_it():
    x, y = np.array([20.0, 20.9, 40.0, 41.0]), np.array([20.0, 20.2, 40.0, 40.0])
    image = render(x, y, [1.0, 0.8, 1.0, 0.0], (60, 60)).astype(np.float32)
    merged = Fit(np.array([20.4, 40.0]), np.array([20.1, 40.0]), np.array([1.7, 1.0]), PROFILE, NoiseMap.of(image, 60))
    for a, b, top in zip(*merged[:3], strict=True):
        kernels.add_spot(image, 0, 59, a, b, -top, SHAPE)
    got = share_peaks(image, 60, merged, np.ones(2, bool), x, y, SIGMA)
    assert got.height == pytest.approx([1.0, 0.8, 1.0], abs=0.15)
    assert got.x == pytest.approx([20, 20.9, 40], abs=0.15)


@pytest.mark.parametrize("metric", [ROUND, ELLIPSE])
def test_share_light_equals_the_reference(metric):
    rng, shape = np.random.default_rng(0), shape_of(Profile(PROFILE.height, metric), SIGMA)
    x, y, top = rng.uniform(5, 25, 6), rng.uniform(5, 25, 6), rng.uniform(0, 1, 6)
    image = rng.normal(0, 0.2, (30, 30)).astype(np.float32)
    left, heights = reference.share_light(image, x, y, top, shape)
    kernels.share_light(image, 30, kernels.Spots(x, y, top), np.arange(6), shape, 1, 0.0)
    assert top == pytest.approx(heights, abs=1e-5)
    assert image == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize("n", [1, 40])
def test_find_near_equals_the_reference(n):
    rng = np.random.default_rng(n)
    (x, y), (px, py) = rng.uniform(0, 30, (2, n)), rng.uniform(0, 40, (2, 300))
    near = np.empty(300, bool)
    kernels.find_near(x, y, px, py, 2.0, near)
    assert near.any()
    assert near.tolist() == [bool((np.hypot(x - a, y - b) < 2.0).any()) for a, b in zip(px, py, strict=True)]


@pytest.mark.parametrize("metric", [ROUND, ELLIPSE])
def test_the_tables_of_a_spot_reach_to_the_corners_of_its_rectangle(metric):
    shape = shape_of(Profile(PROFILE.height, metric), SIGMA)
    corners = [(a * shape.across * shape.reach, b * shape.down * shape.reach) for a in (-1, 1) for b in (-1, 1)]
    assert max(kernels.squared_distance(*at, shape.metric) for at in corners) * shape.bins + 1 < len(shape.profile)
    assert not shape.profile[round(shape.reach**2 * shape.bins) :].any()
