"""Drift of simulated beads compared with the truth; resampling compared with SciPy and with itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, optimize

import reference
from merfish import datasets
from merfish.errors import InputError
from merfish.imaging._kernels import remove_hot_pixels
from merfish.imaging.frames import read_fiducials
from merfish.imaging.opening import open_experiment
from merfish.imaging.registration import (
    align,
    filter_planes,
    measure_drift,
    measure_field_drift,
    patch_steps,
    seen_by_all,
    spline_taps,
)

BEAD_SIGMA = 1.4


def draw(points: np.ndarray, light: np.ndarray, shape: tuple[int, int], sigma: float = BEAD_SIGMA) -> np.ndarray:
    """Return the expected light (y, x) of Gaussian beads at (bead, 2) y, x."""
    y, x = (np.exp(-0.5 * ((np.arange(n) - p[:, None]) / sigma) ** 2) for n, p in zip(shape, points.T, strict=True))
    return np.einsum("b,by,bx->yx", light, y, x)


def bead_images(drift: np.ndarray, *, size: int = 256, beads: int = 60, seed: int = 0, sigma: float = BEAD_SIGMA):
    """Return camera images (round, y, x) uint16 of the same beads, drifted by (round, 2)."""
    rng = np.random.default_rng(seed)
    points, light = rng.uniform(-20, size + 20, (beads, 2)), 1000 * rng.lognormal(0, 0.5, beads)
    expected = [100 + draw(points + step, light, (size, size), sigma) for step in drift]
    return rng.poisson(expected).astype(np.uint16)


def drift_of(table):
    return table[["dy", "dx"]].to_numpy(float)


def test_measure_drift__sub_pixel_up_to_20_px():
    drift = np.vstack([[0, 0], np.random.default_rng(1).uniform(-20, 20, (7, 2))])
    table = measure_drift(bead_images(drift))
    assert table["ok"].all()
    assert np.abs(drift_of(table) - drift).max() < 0.02
    assert (table["quality"] > 0.9).all()
    assert (np.abs(drift_of(table) - drift).max(axis=1)[1:] < 6 * table["error"][1:]).all()


@pytest.mark.parametrize(("size", "beads", "sigma"), [(128, 16, 1.4), (512, 100, 1.0), (256, 50, 3.0), (384, 30, 5.0)])
def test_measure_drift__few_many_sharp_and_blurred(size, beads, sigma):
    drift = np.array([[0, 0], [12.3, -7.6], [-0.4, 18.9]])
    table = measure_drift(bead_images(drift, size=size, beads=beads, sigma=sigma))
    assert table["ok"].all()
    assert np.abs(drift_of(table) - drift).max() < 0.1


def test_measure_drift__reference_may_be_any_round():
    drift = np.array([[0, 0], [3.25, -2.5], [-6.1, 4.2]])
    images = bead_images(drift)
    for reference_round in range(3):
        table = measure_drift(images, reference=reference_round)
        np.testing.assert_allclose(drift_of(table), drift - drift[reference_round], atol=0.03)
        assert drift_of(table)[reference_round].tolist() == [0, 0]


def test_measure_drift__scaling_and_offset_change_nothing():
    images = bead_images(np.array([[0, 0], [5.4, 2.2]]))
    plain = drift_of(measure_drift(images))
    np.testing.assert_allclose(drift_of(measure_drift(images * 3.0 + 500)), plain, atol=0.01)


def test_measure_drift__beads_that_move_vanish_and_saturate():
    rng = np.random.default_rng(5)
    size, beads, step = 384, 80, np.array([-8.7, 13.1])
    points, light = rng.uniform(0, size, (beads, 2)), 2000 * rng.lognormal(0, 1, beads)
    moved = points + step
    moved[:20] += rng.normal(0, 4, (20, 2))  # a quarter of the beads is loose
    later = light * (rng.random(beads) > 0.25)  # a quarter of the beads is lost
    slope = np.linspace(0.5, 1, size)[:, None]  # illumination decreases to one side
    glow = ndimage.gaussian_filter(rng.normal(size=(size, size)).astype(np.float32), 8, mode="mirror")
    glow = 400 * np.clip(glow / glow.max(), 0, 1)  # cells
    first = rng.poisson(slope * (100 + glow + draw(points, light, (size, size))))
    second = rng.poisson(slope[::-1] * (100 + ndimage.shift(glow, step) + draw(moved, later, (size, size))))
    table = measure_drift(np.minimum(np.stack([first, second]), 1500))
    assert table["ok"].all()
    assert np.abs(drift_of(table)[1] - step).max() < 0.05


def test_measure_drift__hot_pixels_stay_behind():
    drift = np.array([[0, 0], [9.2, -4.6]])
    images = bead_images(drift, beads=40)[:, :128, :128]  # about ten beads, and as many pairs of hot pixels
    y, x = np.random.default_rng(2).integers(0, 128, (2, 200))
    images[:, y, x] += 3000
    table = measure_drift(images)
    assert table["ok"].all()
    assert np.abs(drift_of(table) - drift).max() < 0.05


@pytest.mark.parametrize(
    "name", ["black", "constant", "noise", "saturated", "other beads", "too far", "too few", "single line"]
)
def test_measure_drift__says_that_a_round_is_unusable(name):
    rng = np.random.default_rng(3)
    images = bead_images(np.array([[0, 0], [2, 3.5], [0, 0]]))
    images[2] = {
        "black": lambda: 0 * images[0],
        "constant": lambda: 0 * images[0] + 1234,
        "noise": lambda: rng.poisson(100, images[0].shape),
        "saturated": lambda: 0 * images[0] + 65535,
        "other beads": lambda: bead_images(np.zeros((1, 2)), seed=99)[0],
        "too far": lambda: bead_images(np.array([[0, 90]]))[0],
        "too few": lambda: bead_images(np.zeros((1, 2)), beads=2)[0],
        "single line": lambda: 100 + 900 * np.eye(256, dtype=int),
    }[name]()
    table = measure_drift(images)
    assert table["ok"].tolist() == [True, True, False]
    assert np.isnan(drift_of(table)[2]).all()
    assert np.abs(drift_of(table)[1] - [2, 3.5]).max() < 0.05


def test_measure_drift__reference_without_beads_fails_all():
    images = bead_images(np.zeros((3, 2)))
    images[0] = 100
    assert not measure_drift(images)["ok"].any()


def test_measure_drift__one_round_needs_no_beads():
    assert measure_drift(np.zeros((1, 32, 32), np.uint16))["ok"].tolist() == [True]


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 1, 300), (2, 17, 3)])
def test_measure_drift__tiny_images_fail_without_error(shape):
    assert measure_drift(np.ones(shape, np.uint16))["ok"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((4, 4)), {}, r"expected \(round, y, x\)"),
        (np.zeros((0, 4, 4)), {}, r"expected \(round, y, x\)"),
        (np.zeros((2, 8, 8)), {"reference": 2}, "from 0 to 1, got 2"),
        (np.full((2, 8, 8), np.nan), {}, "NaN"),
    ],
)
def test_measure_drift__rejects(images, options, message):
    with pytest.raises(InputError, match=message):
        measure_drift(images, **options)


@pytest.mark.parametrize("fov", [0, 1])
def test_measure_drift__real_beads_agree_with_correlation_of_each(fov):
    """The beads of these fields are rings, a handful in 128 x 128 px.

    Independent estimate: for each bead away from the border, the shift with the highest correlation of its
    surroundings, found by simplex search; then the median over the beads.
    """
    beads, _ = read_fiducials(open_experiment(datasets.merfish_raw()), fov)
    table = measure_drift(beads)
    assert table["ok"].all()
    smooth = [ndimage.gaussian_filter(image.astype(float), 1) for image in beads]
    centers = [(61, 107), (103, 79), (95, 24), (61, 53)] if fov == 0 else [(109, 48), (44, 20), (22, 22)]
    for number in range(1, 8):
        spline = ndimage.spline_filter(smooth[number])
        found = []
        for y, x in centers:
            rows, columns = np.mgrid[max(0, y - 12) : min(128, y + 13), max(0, x - 12) : min(128, x + 13)]
            patch = smooth[0][rows, columns].ravel()

            def miss(step, rows=rows, columns=columns, patch=patch, spline=spline):
                seen = ndimage.map_coordinates(spline, [rows + step[0], columns + step[1]], prefilter=False)
                return -np.corrcoef(seen.ravel(), patch)[0, 1]

            found.append(optimize.minimize(miss, drift_of(table)[number].round(), method="Nelder-Mead").x)
        assert np.abs(np.median(found, axis=0) - drift_of(table)[number]).max() < 0.3


def test_measure_field_drift__molecules_stand_in_for_beads():
    rng = np.random.default_rng(7)
    drift = np.array([[0, 0], [4.3, -6.2], [-9.8, 0.7]])
    points = rng.uniform(0, 192, (400, 2))
    bits = []
    for number in (0, 0, 1, 1, 2, 2):
        shown = rng.random(400) < 0.3
        bits.append(rng.poisson(100 + draw(points + drift[number], 500.0 * shown, (192, 192))))
    bits = np.array(bits)[:, None]
    rounds = np.array([0, 0, 1, 1, 2, 2])
    noise = rng.poisson(100, (3, 192, 192))
    for beads in (noise[:0], noise):
        table = measure_field_drift(beads, bits, rounds)
        assert table["ok"].all()
        assert table["source"].tolist() == ["bits"] * 3
        assert np.abs(drift_of(table) - drift).max() < 0.1
    beads = bead_images(drift, size=192)
    beads[2] = noise[2]
    table = measure_field_drift(beads, bits, rounds)
    assert table["source"].tolist() == ["beads", "beads", "bits"]
    assert table["ok"].all()
    assert np.abs(drift_of(table) - drift).max() < 0.1


@pytest.mark.parametrize("level", [0, 100, 65535])
def test_measure_field_drift__field_without_anything(level):
    images = np.random.default_rng(0).poisson(level, (4, 64, 64)) if level == 100 else np.full((4, 64, 64), level)
    table = measure_field_drift(images[:2], images[:, None], np.array([0, 0, 1, 1]))
    assert table["source"].tolist() == ["nothing"] * 2
    assert table["ok"].all()
    assert (drift_of(table) == 0).all()


def test_measure_field_drift__one_dark_round_is_said():
    rng = np.random.default_rng(8)
    points = rng.uniform(0, 128, (100, 2))
    bits = rng.poisson(100 + np.stack([draw(points, np.full(100, 500.0 * k), (128, 128)) for k in (1, 1, 0)]))
    table = measure_field_drift(bits[:0], bits[:, None], np.arange(3))
    assert table["ok"].tolist() == [True, True, False]
    assert np.isnan(drift_of(table)[2]).all()


@given(st.integers(-12, 12), st.integers(-12, 12))
def test_align__whole_pixels_copy_exactly(dy, dx):
    image = np.random.default_rng(0).normal(size=(20, 15)).astype(np.float32)
    aligned, inside = align(image[None], np.array([[dy, dx]]))
    rows, columns = np.nonzero(inside)
    assert len(rows) == max(0, 20 - abs(dy)) * max(0, 15 - abs(dx))
    np.testing.assert_array_equal(aligned[0, rows, columns], image[rows + dy, columns + dx])


def test_align__is_the_cubic_spline():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(4, 3, 40, 50))
    shifts = np.array([[0.3, -2.7], [5.5, -3.2], [-0.51, 0.01], [-7.9, 6.0]])
    aligned, _ = align(images, shifts)
    for image, step, out in zip(images, shifts, aligned, strict=True):
        for plane, result in zip(image, out, strict=True):
            np.testing.assert_allclose(result, ndimage.shift(plane, -step, order=3, mode="mirror"), atol=2e-4)


def test_align__undoes_drift():
    drift = np.array([[0, 0], [3.4, -5.7], [-11.6, 2.5]])
    rng = np.random.default_rng(2)
    points, light = rng.uniform(20, 108, (30, 2)), rng.uniform(100, 1000, 30)
    images = np.stack([draw(points + step, light, (128, 128)) for step in drift])
    aligned, inside = align(images, drift)
    assert np.abs(aligned - images[0])[:, inside].max() < 0.01 * images.max()


@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=4))
def test_seen_by_all__exactly_where_no_image_is_left(shifts):
    steps = np.array(shifts)
    maps = np.concatenate([np.tile(np.eye(2), (len(steps), 1, 1)), steps[:, :, None]], axis=2)
    inside = seen_by_all(maps, (12, 17))
    y, x = np.mgrid[:12, :17]
    places = np.stack([y, x], axis=-1)[None] + steps[:, None, None]
    expected = ((places >= 0) & (places <= [11, 16])).all(axis=(0, -1))
    np.testing.assert_array_equal(inside, expected)


@pytest.mark.parametrize(
    ("images", "shifts", "message"),
    [
        (np.zeros((2, 4, 4)), np.zeros((3, 2)), "shifts"),
        (np.zeros((4, 4)), np.zeros((4, 2)), "expected images"),
        (np.zeros((1, 4, 4)), np.array([[np.nan, 0]]), "finite"),
    ],
)
def test_align__rejects(images, shifts, message):
    with pytest.raises(InputError, match=message):
        align(images, shifts)


@given(st.floats(0, 1))
def test_spline_taps__keep_constants_and_straight_lines(fraction):
    taps = spline_taps(np.array(fraction)).astype(float)
    assert taps.sum() == pytest.approx(1, abs=1e-6)
    assert taps @ np.arange(-7, 9) == pytest.approx(fraction, abs=2e-3)


def test_filter_planes__as_reference():
    rng = np.random.default_rng(0)
    for shape in ((7, 9), (40, 5), (1, 6)):
        planes = rng.integers(0, 1000, (2, *shape)).astype(np.uint16)
        starts = rng.integers(-20, 20, (2, 2))
        taps_y, taps_x = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(2, 8)).astype(np.float32)
        out = np.empty(planes.shape, np.float32)
        filter_planes(planes, starts, taps_y, taps_x, out)
        for k in range(2):
            expected = reference.filter_plane(planes[k], starts[k], taps_y[k], taps_x[k])
            np.testing.assert_allclose(out[k], expected, rtol=1e-4, atol=0.05)


def test_remove_hot_pixels__as_reference():
    image = np.random.default_rng(0).poisson(100, (12, 15)).astype(np.uint16)
    image[3, 4] = image[0, 0] = image[11, 8] = image[11, 9] = 5000
    out = np.empty(image.shape, np.float32)
    remove_hot_pixels(image, out)
    np.testing.assert_array_equal(out, reference.remove_hot_pixels(image))
    assert out.max() < 200


@pytest.mark.parametrize("sigma", [0.8, 1.4, 3.0])
def test_remove_hot_pixels__leaves_beads(sigma):
    image = draw(np.array([[8.0, 8.0], [8.3, 20.4]]), np.array([1000.0, 500.0]), (17, 30), sigma).astype(np.float32)
    out = np.empty(image.shape, np.float32)
    remove_hot_pixels(image, out)
    np.testing.assert_array_equal(out, image)


def test_patch_steps__as_reference():
    rng = np.random.default_rng(0)
    fixed = draw(np.array([[15.2, 14.1]]), np.array([900.0]), (31, 31)) + rng.normal(0, 5, (31, 31))
    moving = draw(np.array([[15.5, 13.9]]), np.array([600.0]), (31, 31)) + rng.normal(50, 5, (31, 31))
    fixed, moving = fixed.astype(np.float32), moving.astype(np.float32)
    centers = np.array([[15, 14], [3, 3]])
    steps, variances = patch_steps(fixed, moving, np.array([1, 30, 1, 30]), centers, 6)
    np.testing.assert_allclose(steps[0], reference.patch_step(fixed, moving, (15, 14), 6), rtol=1e-3)
    assert np.abs(steps[0] - [0.3, -0.2]).max() < 0.1
    assert 0 < variances[0] < 0.001
    assert np.isnan(steps[1]).all() or variances[1] > 100 * variances[0]


def test_align__affine_is_the_cubic_spline():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, 2, 60, 50)).astype(np.float32)
    maps = np.array([[[1.01, -0.004, 0.7], [0.006, 0.98, -1.2]], [[0.99, 0.01, -2.1], [0.0, 1.02, 0.3]]])
    shifts = np.array([[1.25, -0.5], [0.0, 3.4]])
    aligned, inside = align(images, shifts, maps)
    for image, at, step, out in zip(images, maps, shifts, aligned, strict=True):
        offset = at[:, :2] @ step + at[:, 2]
        for plane, result in zip(image, out, strict=True):
            expected = ndimage.affine_transform(plane, at[:, :2], offset, order=3, mode="mirror")
            np.testing.assert_allclose(result, expected, atol=2e-4)
    y, x = np.mgrid[:60, :50]
    places = np.einsum("ijk,kyx->ijyx", maps[:, :, :2], np.stack([y, x])) + (
        np.einsum("ijk,ik->ij", maps[:, :, :2], shifts) + maps[:, :, 2]
    ).reshape(2, 2, 1, 1)
    seen = (places >= 0) & (places <= np.array([59, 49]).reshape(1, 2, 1, 1))
    np.testing.assert_array_equal(inside, seen.all(axis=(0, 1)))


def test_align__identity_transform_is_plain_drift():
    images = np.random.default_rng(4).normal(size=(2, 20, 20))
    shifts = np.array([[0.2, 1.7], [-3.1, 0.9]])
    plain, _ = align(images, shifts)
    np.testing.assert_array_equal(align(images, shifts, np.tile(np.eye(2, 3), (2, 1, 1)))[0], plain)
    nearly = np.tile(np.eye(2, 3), (2, 1, 1)) * (1 + 1e-12)
    np.testing.assert_allclose(align(images, shifts, nearly)[0], plain, atol=2e-4)
