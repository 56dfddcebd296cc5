"""Chromatic maps against drawn molecules whose colours are bent by known maps."""

from __future__ import annotations

import numpy as np
import pytest

from merfish.errors import InputError
from merfish.imaging.chromatic import chromatic_residuals, fit_chromatic, locate_in_bits
from merfish.imaging.registration import align

SIZE = 400
COLORS = np.array([0, 0, 1, 1, 2, 2])
TRUE = np.tile(np.eye(2, 3), (3, 1, 1))
TRUE[1] += [[0.006, 0.001, -1.4], [-0.001, 0.005, -1.0]]
TRUE[2] += [[-0.004, 0.0, 0.9], [0.002, -0.003, 0.4]]


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
    return np.random.default_rng(seed).poisson(bits + 20) - 20.0


def test_fit_chromatic__from_molecules_in_images():
    places, words = molecules(0)
    spots = locate_in_bits(draw_bits(places, words, 1), places, words)
    maps = fit_chromatic(spots, COLORS)
    corners = np.array([[0, 0], [0, SIZE], [SIZE, 0], [SIZE, SIZE], [SIZE / 2, SIZE / 2]])
    for found, true in zip(maps, TRUE, strict=True):
        assert np.abs(apply(found, corners) - apply(true, corners)).max() < 0.1
    held_places, held_words = molecules(2)
    held = locate_in_bits(draw_bits(held_places, held_words, 3), held_places, held_words)
    before = chromatic_residuals(held, COLORS, np.tile(np.eye(2, 3), (3, 1, 1)))
    after = chromatic_residuals(held, COLORS, maps)
    assert np.isnan(after[0])
    assert (after[1:] < 0.5 * before[1:]).all()


def test_align__puts_colours_on_each_other():
    places, words = molecules(4, n=200)
    words[:] = True
    bits = draw_bits(places, words, 5)
    aligned, inside = align(bits, np.zeros((6, 2)), TRUE[COLORS])
    before = [np.corrcoef(bits[0][inside], image[inside])[0, 1] for image in bits[2:]]
    after = [np.corrcoef(aligned[0][inside], image[inside])[0, 1] for image in aligned[2:]]
    assert min(after) > 0.95 > 0.92 > max(before)


def test_fit_chromatic__outliers_count_for_little():
    rng = np.random.default_rng(6)
    places, _ = molecules(7)
    spots = np.stack([apply(TRUE[color], places) for color in COLORS], axis=1) + rng.normal(0, 0.1, (600, 6, 2))
    spots[rng.random((600, 6)) < 0.2] += [2.0, -1.5]
    corners = np.array([[0, 0], [SIZE, SIZE]])
    for found, true in zip(fit_chromatic(spots, COLORS), TRUE, strict=True):
        assert np.abs(apply(found, corners) - apply(true, corners)).max() < 0.3


def test_fit_chromatic__identity_without_enough_pairs():
    spots = np.full((100, 6, 2), np.nan)
    spots[:40, :4] = 5.0
    assert (fit_chromatic(spots, COLORS) == np.eye(2, 3)).all()
    assert np.isnan(chromatic_residuals(spots, COLORS, TRUE)[2])


def test_locate_in_bits__nothing_there():
    spots = locate_in_bits(np.zeros((2, 8, 8)), np.array([[4.0, 4.0]]), np.ones((1, 2)))
    assert np.isnan(spots).all()


def test_locate_in_bits__rejects_shapes():
    with pytest.raises(InputError, match="words"):
        locate_in_bits(np.zeros((2, 8, 8)), np.zeros((3, 2)), np.ones((3, 4)))
