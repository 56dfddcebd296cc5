"""Chromatic maps of simulated molecules whose colours are distorted by known maps."""

from __future__ import annotations

import numpy as np
import pytest

from merfish.imaging.chromatic import fit_chromatic
from merfish.imaging.normalize import FieldSpots, find_spots
from merfish.imaging.registration import align

SIZE = 400
COLORS = np.array([0, 0, 1, 1, 2, 2])
TRUE = np.tile(np.eye(2, 3), (3, 1, 1))
TRUE[1] += [[0.006, 0.001, -1.4], [-0.001, 0.005, -1.0]]
TRUE[2] += [[-0.004, 0.0, 0.9], [0.002, -0.003, 3.4]]
CORNERS = np.array([[0, 0], [0, SIZE], [SIZE, 0], [SIZE, SIZE], [SIZE / 2, SIZE / 2]])


def apply(at: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ at[:, :2].T + at[:, 2]


def molecules(seed: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    words = np.zeros((n, 6), bool)
    for row in words:
        row[rng.choice(6, 4, replace=False)] = True
    return rng.uniform(5, SIZE - 5, (n, 2)), words


def draw_bits(points: np.ndarray, words: np.ndarray, seed: int) -> np.ndarray:
    bits = np.zeros((6, SIZE, SIZE))
    axis = np.arange(SIZE)
    for k, image in enumerate(bits):
        y, x = (np.exp(-0.5 * ((axis - p[:, None]) / 1.3) ** 2) for p in apply(TRUE[COLORS[k]], points[words[:, k]]).T)
        image += 300 * y.T @ x
    return (np.random.default_rng(seed).poisson(bits + 20) - 20.0).astype(np.float32)


def spots_of(places: list[np.ndarray], plane: int = 0) -> FieldSpots:
    """Return spots at the positions (spot, 2) y, x of each bit."""
    bit = np.repeat(np.arange(len(places)), [len(p) for p in places])
    y, x = np.concatenate(places).T
    ones = np.ones(len(bit), np.float32)
    return FieldSpots(bit, np.full(len(bit), plane), y, x, ones, np.zeros(len(places), np.float32), (SIZE, SIZE))


def drifted_field(seed: int, maps: np.ndarray = TRUE, spread: float = 0.1) -> tuple[FieldSpots, np.ndarray]:
    """Return spots of molecules corrected for their drift of up to 20 px, and that drift; the first bits have none."""
    places, words = molecules(seed)
    rng = np.random.default_rng([seed, 1])
    drift = rng.uniform(-20, 20, (6, 2)) * (COLORS > 0)[:, None]
    seen = [apply(maps[COLORS[k]], places[words[:, k]] + drift[k]) - drift[k] for k in range(6)]
    return spots_of([p + rng.normal(0, spread, p.shape) for p in seen]), drift


def is_applied(fit) -> bool:
    return not np.array_equal(fit.map, np.eye(2, 3))


def test_fit_chromatic__from_molecules_in_images():
    fields = [find_spots(draw_bits(*molecules(seed), seed)) for seed in (0, 2)]
    fits = fit_chromatic(fields, [np.zeros((6, 2))] * 2, COLORS, (SIZE, SIZE))
    assert [is_applied(fit) for fit in fits] == [False, True, True]
    for fit, true in zip(fits, TRUE, strict=True):
        off = np.hypot(*(apply(fit.map, CORNERS) - apply(true, CORNERS)).T)
        assert off.max() < 0.1
        assert fit.error < 0.05


def test_fit_chromatic__places_are_those_that_the_camera_saw():
    fields, shifts = zip(*[drifted_field(seed) for seed in range(3)], strict=True)
    for fit, true in zip(fit_chromatic(fields, shifts, COLORS, (SIZE, SIZE)), TRUE, strict=True):
        assert np.abs(apply(fit.map, CORNERS) - apply(true, CORNERS)).max() < 0.05


def test_fit_chromatic__no_map_where_none_helps():
    none = np.tile(np.eye(2, 3), (3, 1, 1))
    fields, shifts = zip(*[drifted_field(seed, none) for seed in range(2)], strict=True)
    fits = fit_chromatic(fields, shifts, COLORS, (SIZE, SIZE))
    assert not any(map(is_applied, fits))
    assert all(fit.pairs > 1000 for fit in fits[1:])


def test_fit_chromatic__no_map_from_spots_that_do_not_belong_together():
    rng = np.random.default_rng(0)
    strangers = [spots_of(list(rng.uniform(0, SIZE, (6, 400, 2)))) for _ in range(2)]
    far = [spots_of([p] * 6) for p in (np.empty((0, 2)), rng.uniform(0, SIZE, (20, 2)))]
    for fields in (strangers, far):
        fits = fit_chromatic(fields, [np.zeros((6, 2))] * 2, COLORS, (SIZE, SIZE))
        assert not any(map(is_applied, fits))


def test_fit_chromatic__of_one_field():
    field, shift = drifted_field(5)
    fits = fit_chromatic([field], [shift], COLORS, (SIZE, SIZE))
    assert all(map(is_applied, fits[1:]))


def test_align__puts_colours_on_each_other():
    places, words = molecules(4, n=200)
    words[:] = True
    bits = draw_bits(places, words, 5)
    aligned, inside = align(bits, np.zeros((6, 2)), TRUE[COLORS])
    before = [np.corrcoef(bits[0][inside], image[inside])[0, 1] for image in bits[2:]]
    after = [np.corrcoef(aligned[0][inside], image[inside])[0, 1] for image in aligned[2:]]
    assert min(after) > 0.95 > 0.92 > max(before)


@pytest.mark.parametrize("planes", [1, 2])
def test_find_spots__places_within_their_plane(planes):
    bits = np.zeros((2, planes, 30, 40), np.float32)
    bits[1, planes - 1, 5, 7] = 10
    bits += np.random.default_rng(0).normal(0, 0.1, bits.shape).astype(np.float32)
    spots = find_spots(bits)
    assert spots.bit.tolist() == [1]
    assert spots.plane.tolist() == [planes - 1]
    assert spots.y == pytest.approx(5, abs=0.2)
    assert spots.x == pytest.approx(7, abs=0.2)
    assert spots.height == pytest.approx(10, rel=0.1)
