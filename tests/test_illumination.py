"""Illumination, dark level and hot pixels of simulated spots under a known illumination."""

from __future__ import annotations

import numpy as np
import pytest

from merfish.errors import InputError
from merfish.imaging.illumination import (
    BLOCKS,
    Glow,
    KnownLight,
    Light,
    always_hot,
    correct_light,
    fill_pixels,
    fit_light,
    given_flat,
    in_blocks,
    measure_glow,
)
from merfish.imaging.normalize import FieldSpots

SHAPE = (200, 240)
Y, X = (np.linspace(-1, 1, n) for n in SHAPE)
VIGNETTE = (1 - 0.25 * (Y[:, None] ** 2 + (X - 0.2) ** 2)).astype(np.float32)
EVEN = np.ones(SHAPE, np.float32)


def field(light: np.ndarray, seed: int, n: int = 4000) -> tuple[FieldSpots, np.ndarray, Glow]:
    """Return spots of two bits of different brightness, their drift (up to 15 px), and glow over a dark level 100."""
    rng = np.random.default_rng(seed)
    bit, shift = rng.integers(0, 2, n), rng.uniform(-15, 15, (2, 2))
    place = np.stack([rng.uniform(0, side - 1, n) for side in SHAPE], axis=1)
    seen = np.clip((place + shift[bit]).round().astype(int), 0, np.array(SHAPE) - 1)
    height = np.array([100, 300])[bit] * rng.lognormal(0, 0.3, n) * light[seen[:, 0], seen[:, 1]]
    # the tissue's autofluorescence is not the illumination's
    level = 100 + 80 * light * (1 + 0.1 * rng.normal(size=(BLOCKS, BLOCKS)).repeat(13, 0)[:200].repeat(15, 1))
    spots = FieldSpots(
        bit, np.zeros(n, int), *place.T, height.astype(np.float32), np.zeros(2, np.float32), SHAPE
    )  # fmt: skip
    return spots, shift, Glow(np.array([[3, 4]]), in_blocks(level))


def fitted(light: np.ndarray, known: KnownLight | None = None, fields: int = 4) -> Light:
    return fit_light(*zip(*[field(light, seed) for seed in range(fields)], strict=True), np.ones(2, bool), known)


def test_fit_light__finds_light_and_dark_level():
    light = fitted(VIGNETTE)
    off = light.share(SHAPE) / VIGNETTE
    off /= np.median(off)
    assert off.std() < 0.02
    assert np.abs(off - 1).max() < 0.1
    assert light.dark == pytest.approx(100, abs=15)
    assert light.hot.tolist() == [[3, 4]]


def test_fit_light__even_light_stays_even():
    light = fitted(EVEN)
    assert light.even or light.share(SHAPE).min() > 0.95
    assert fitted(VIGNETTE, fields=1).even  # no other field to check a fit on


def test_fit_light__what_is_known_is_not_measured():
    light = fitted(VIGNETTE, KnownLight(EVEN, 7.0))
    assert light.dark == 7
    assert (light.share(SHAPE) == 1).all()
    assert fitted(VIGNETTE, KnownLight(VIGNETTE)).dark == pytest.approx(100, abs=15)


def test_light__survives_json():
    light = fitted(VIGNETTE)
    again = Light.from_dict(light.to_dict())
    assert (again.share(SHAPE) == light.share(SHAPE)).all()
    assert (again.hot == light.hot).all()


def test_correct_light__inverts_what_was_done():
    rng = np.random.default_rng(0)
    sample = rng.uniform(100, 1000, SHAPE)
    image = 100 + sample * VIGNETTE
    image[50, 60] += 5000
    light = Light(np.zeros((1, 1)), 100.0, np.array([[50, 60]]), VIGNETTE)
    off = np.abs(correct_light(image[None], light)[0] / sample - 1)
    off[50, 60] = 0
    assert off.max() < 1e-5
    assert correct_light(image[None], light)[0][50, 60] < 1100
    with pytest.raises(InputError, match="flat field of shape"):
        correct_light(image[None, :-1], light)


def test_measure_glow__hot_pixels_and_no_spots():
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:128, 0:128]
    spot = 2000 * np.exp(-((y - 40) ** 2 + (x - 40) ** 2) / (2 * 0.7**2))  # in all images, and as sharp as possible
    hot = np.array([[5, 5], [0, 0], [100, 127]])
    images = rng.poisson(200 + spot, (8, 128, 128))
    images[:, hot[:, 0], hot[:, 1]] += 300
    images[3, 70, 70] += 3000  # in one image only
    found = measure_glow(images.astype(np.uint16))
    assert sorted(map(tuple, found.hot)) == sorted(map(tuple, hot))
    assert found.level == pytest.approx(np.full((BLOCKS, BLOCKS), 200), abs=20)


def test_fill_pixels__from_neighbours_that_are_known():
    image = np.arange(25, dtype=np.float32).reshape(5, 5)
    image[0, 0] = image[0, 1] = image[3, 3] = 9e9
    fill_pixels(image, np.array([[0, 0], [0, 1], [3, 3]]))
    assert image[0, 0] == pytest.approx(np.median([5, 6]))
    assert image[0, 1] == pytest.approx(np.median([2, 5, 6, 7]))
    assert image[3, 3] == pytest.approx(18)


def test_always_hot__in_most_fields():
    assert always_hot([np.array([[1, 2], [3, 4]]), np.array([[1, 2]]), np.array([[9, 9]])]).tolist() == [[1, 2]]
    assert len(always_hot([])) == 0


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.ones((2, 4, 4)), np.full((4, 4), np.nan)])
def test_given_flat__rejects(bad):
    with pytest.raises(InputError, match=r"flat\.tif: expected one image"):
        given_flat(bad, "flat.tif")
