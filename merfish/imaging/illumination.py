"""Effects of camera and light source on all images of a colour: uneven illumination, dark level, hot pixels.

The illumination is estimated from the molecules: spots are dimmer where there is less light, independently of the
tissue's autofluorescence, the dark level and the filter. The autofluorescence then gives the dark level: it is
proportional to the illumination, whereas the dark level is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.polynomial import legendre

from merfish.errors import InputError
from merfish.imaging._kernels import remove_hot_pixels
from merfish.imaging.normalize import FieldSpots, weighted_median

DEGREES = (0, 2, 4)  # degrees of the polynomials tried for the logarithm of the illumination
MIN_SPOTS = 200  # spots of a colour for each coefficient
MOST_SPOTS = 50_000  # spots of a colour in a field
BLOCKS = 16  # number of blocks along y and x in which autofluorescence is measured
HOT_SIGMAS = 6.0  # relative to the noise of the darkest image, at least 1 count
_FIT_ROUNDS = 12


@dataclass(frozen=True, eq=False)
class KnownLight:
    """Illumination given by the user: flat, (y, x) float32, at most 1; dark, camera counts; or None."""

    flat: np.ndarray | None = None
    dark: float | None = None


@dataclass(frozen=True, eq=False)
class Light:
    """Illumination of one colour: image = dark + light * sample.

    coefficients: (degree + 1, degree + 1), of products of Legendre polynomials in y and x from -1 to 1, whose sum is
    the logarithm of the illumination; or flat: the illumination itself, (y, x) float32, at most 1. dark: camera counts.
    hot: (pixel, 2) int64, y, x of pixels that are too bright in every image.
    """

    coefficients: np.ndarray
    dark: float
    hot: np.ndarray
    flat: np.ndarray | None = None

    @property
    def even(self) -> bool:
        """Whether no correction is needed."""
        return self.flat is None and not self.coefficients.any() and not self.dark

    def share(self, shape: tuple[int, ...]) -> np.ndarray:
        """Relative illumination (y, x) float32 of each pixel. Raises InputError if ``flat`` has another shape."""
        if self.flat is not None:
            if self.flat.shape != tuple(shape):
                raise InputError(f"flat field of shape {self.flat.shape}: expected that of the images, {tuple(shape)}")
            return self.flat
        degree = len(self.coefficients) - 1
        y, x = (legendre.legvander(np.linspace(-1, 1, side), degree) for side in shape)
        log = (y @ self.coefficients @ x.T).astype(np.float32)
        return np.exp(log - log.max())

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON stores exactly; a flat field given by the user is omitted."""
        return {"coefficients": self.coefficients.tolist(), "dark": self.dark, "hot": self.hot.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Light:
        """Restore from `to_dict`."""
        hot = np.array(values["hot"], np.int64).reshape(-1, 2)
        return cls(np.array(values["coefficients"]), values["dark"], hot)


@dataclass(frozen=True, eq=False)
class Glow:
    """Measurements on the raw images of one colour in one field.

    hot: (pixel, 2) int64 y, x. level: (BLOCKS, BLOCKS) float64, intensity of blocks without spots, camera counts.
    """

    hot: np.ndarray
    level: np.ndarray


def measure_glow(images: np.ndarray) -> Glow:
    """Measure hot pixels and intensity of raw images (image, y, x) of one colour, before drift is corrected.

    The images are of different bits or planes. A pixel is hot if, in the minimum over all images, it exceeds its
    neighbours by more than a spot does (see `merfish.imaging._kernels.remove_hot_pixels`).
    """
    darkest = images.min(axis=0)
    cleaned = np.empty(darkest.shape, np.float32)
    remove_hot_pixels(darkest, cleaned)
    sample = darkest[:: max(1, len(darkest) // 256)].astype(np.float64)
    noise = 1.4826 * np.median(np.abs(np.diff(sample, axis=1))) / np.sqrt(2)
    hot = np.argwhere(darkest - cleaned > HOT_SIGMAS * max(noise, 1.0))
    step = max(1, min(darkest.shape) // 256)
    middle = np.median(images[:, ::step, ::step], axis=0)
    return Glow(hot, in_blocks(middle))


def in_blocks(image: np.ndarray) -> np.ndarray:
    """Medians (BLOCKS, BLOCKS) of blocks of an image (y, x); NaN for blocks without a pixel."""
    rows, columns = (np.array_split(np.arange(side), BLOCKS) for side in image.shape)
    return np.array([[np.median(image[np.ix_(r, c)]) if r.size * c.size else np.nan for c in columns] for r in rows])


def given_flat(image: np.ndarray, name: str) -> np.ndarray:
    """Divide a flat field (y, x) of any unit by its maximum; returns float32. Raises InputError if it is not valid."""
    flat = np.asarray(image, np.float64)
    if flat.ndim != 2 or not np.isfinite(flat).all() or flat.min() <= 0:
        raise InputError(f"{name}: expected one image (y, x) of positive numbers, the illumination of each pixel")
    return (flat / flat.max()).astype(np.float32)


def correct_light(images: np.ndarray, light: Light) -> np.ndarray:
    """Correct raw images (image, y, x) for hot pixels, dark level and illumination.

    Returns float32 of the same shape, with dark level 0 and uniform illumination.
    """
    seen = images.astype(np.float32)
    gain = None if light.even else 1 / light.share(images.shape[1:])
    for image in seen:
        fill_pixels(image, light.hot)
        image -= np.float32(light.dark)
        if gain is not None:
            image *= gain
    return seen


def fill_pixels(image: np.ndarray, pixels: np.ndarray) -> None:
    """Replace pixels (pixel, 2) y, x of an image (y, x) float32 by the median of their other neighbours."""
    if not len(pixels):
        return
    bad = np.zeros(image.shape, bool)
    bad[tuple(pixels.T)] = True
    around = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), axis=-1).reshape(9, 1, 2) + pixels
    inside = ((around >= 0) & (around < np.array(image.shape))).all(axis=2)
    y, x = np.where(inside[..., None], around, 0).transpose(2, 0, 1)
    values = np.where(inside & ~bad[y, x], image[y, x], np.nan)
    known = np.isfinite(values).any(axis=0)
    image[tuple(pixels[known].T)] = np.nanmedian(values[:, known], axis=0)


def always_hot(fields: Sequence[np.ndarray]) -> np.ndarray:
    """Pixels (pixel, 2) that are hot in more than half of the fields; fields: hot pixels of each, (pixel, 2)."""
    if not fields:
        return np.empty((0, 2), np.int64)
    pixels, count = np.unique(np.concatenate(fields), axis=0, return_counts=True)
    return pixels[2 * count > len(fields)]


def fit_light(
    fields: Sequence[FieldSpots],
    shifts: Sequence[np.ndarray],
    glows: Sequence[Glow],
    bits: np.ndarray,
    known: KnownLight | None = None,
) -> Light:
    """Estimate the illumination of one colour from the spots of some fields, corrected for drift.

    shifts: the drift of each field, (bit, 2) dy, dx in pixels; glows: of the same fields; bits: (bit,) bool, those of
    the colour. The degree of the polynomial (0, 2 or 4) is chosen by cross-validation between two halves of the fields,
    by how well it predicts the heights of spots. Known quantities are not estimated.
    """
    known = known or KnownLight()
    parts = [_heights(spots, shift, bits) for spots, shift in zip(fields, shifts, strict=True)]
    hot = always_hot([glow.hot for glow in glows])
    degree = 0 if known.flat is not None else _best_degree(parts)
    coefficients = _fit_heights(_join(parts), degree) if degree else np.zeros((1, 1))
    light = Light(coefficients, known.dark or 0.0, hot, known.flat)
    if light.even or known.dark is not None:
        return light
    return replace(light, dark=dark_level(light, glows))


@dataclass(frozen=True, eq=False)
class _Heights:
    """Spots, all (spot,): position y, x from -1 to 1, logarithm of the height, and group, i.e. their field and bit."""

    y: np.ndarray
    x: np.ndarray
    log: np.ndarray
    group: np.ndarray

    @cached_property
    def weight(self) -> np.ndarray:
        return np.exp(self.log - self.log.max(initial=0.0))


def _heights(spots: FieldSpots, shift: np.ndarray, bits: np.ndarray) -> _Heights:
    rows = np.flatnonzero(bits[spots.bit])
    rows = rows[:: len(rows) // MOST_SPOTS + 1]
    seen = np.stack([spots.y[rows], spots.x[rows]]) + shift[spots.bit[rows]].T  # position on the camera
    y, x = np.clip(2 * seen / (np.array(spots.shape)[:, None] - 1) - 1, -1, 1)
    return _Heights(y, x, np.log(spots.height[rows].astype(np.float64)), spots.bit[rows])


def _join(parts: Sequence[_Heights]) -> _Heights:
    return _Heights(
        y=np.concatenate([part.y for part in parts]),
        x=np.concatenate([part.x for part in parts]),
        log=np.concatenate([part.log for part in parts]),
        group=np.concatenate([part.group + 1000 * number for number, part in enumerate(parts)]),
    )


def _best_degree(parts: Sequence[_Heights]) -> int:
    halves = [_join(half) for half in (parts[::2], parts[1::2])] if len(parts) > 1 else []
    best, least = 0, [np.inf, np.inf]
    for degree in DEGREES if halves else ():
        if min(len(half.log) for half in halves) < MIN_SPOTS * (degree + 1) * (degree + 2) // 2:
            break
        fits = [_fit_heights(half, degree) for half in halves]
        losses = [_loss(halves[1 - k], fits[k]) for k in (0, 1)]
        if all(a < b for a, b in zip(losses, least, strict=True)):
            best, least = degree, losses
    return best


def _fit_heights(spots: _Heights, degree: int) -> np.ndarray:
    """Fit log heights by least absolute deviations, each bit of each field about its own level, weighted by height.

    The weights are those of the scale of a bit, so that dim rings of out-of-focus molecules have little influence.
    """
    terms = legendre.legvander2d(spots.y, spots.x, [degree, degree])
    chosen = np.array([0 < i + j <= degree for i in range(degree + 1) for j in range(degree + 1)], bool)
    used, solution = terms[:, chosen], np.zeros(int(chosen.sum()))
    for _ in range(_FIT_ROUNDS if degree else 0):
        off = _about_levels(spots, used @ solution)
        weight = spots.weight / np.maximum(np.abs(off), 0.02)
        _, inverse = np.unique(spots.group, return_inverse=True)
        total = np.bincount(inverse, weight)
        centred = used - np.column_stack([(np.bincount(inverse, weight * t) / total)[inverse] for t in used.T])
        heavy = centred * weight[:, None]
        solution = solution + np.linalg.solve(heavy.T @ centred + 1e-9 * np.eye(len(solution)), heavy.T @ off)
    coefficients = np.zeros((degree + 1) ** 2)
    coefficients[chosen] = solution
    return coefficients.reshape(degree + 1, degree + 1)


def _about_levels(spots: _Heights, predicted: np.ndarray) -> np.ndarray:
    """Log heights minus the prediction and minus the height-weighted median of their group."""
    off = spots.log - predicted
    for group in np.unique(spots.group):
        rows = spots.group == group
        off[rows] -= np.log(weighted_median(np.exp(off[rows])))
    return off


def _loss(spots: _Heights, coefficients: np.ndarray) -> float:
    off = _about_levels(spots, legendre.legval2d(spots.y, spots.x, coefficients))
    return float((spots.weight * np.abs(off)).sum() / spots.weight.sum())


def dark_level(light: Light, glows: Sequence[Glow]) -> float:
    """Dark level, camera counts: intercept of the intensity of blocks against illumination, median over fields."""
    share = light.share((BLOCKS, BLOCKS)) if light.flat is None else in_blocks(light.flat)
    share = share.ravel().astype(np.float64)
    found = []
    for glow in glows:
        level = glow.level.ravel()
        known = np.isfinite(level)
        weight = known.astype(np.float64)
        for _ in range(_FIT_ROUNDS):
            root = np.sqrt(weight[known])[:, None]
            terms = np.column_stack([np.ones(known.sum()), share[known]])
            (dark, slope), *_ = np.linalg.lstsq(terms * root, level[known] * root[:, 0], rcond=None)
            off = np.abs(level[known] - terms @ (dark, slope))
            weight[known] = 1 / np.maximum(off, 0.5)
        found.append(min(max(dark, 0.0), float(level[known].min())))
    return float(np.median(found)) if found else 0.0
