"""Chromatic distortion: where each colour shows what the reference colour shows, learnt from the molecules.

A molecule has spots in several bits, so in several colours: where they lie apart, systematically over the field, the
optics bend colours differently. An affine map a colour describes that to a few hundredths of a pixel.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from merfish.errors import InputError
from merfish.imaging.registration import paraboloid_tops

# Pairs needed to fit a colour's affine map; below, it stays the identity.
_MIN_PAIRS = 50
_FIT_ROUNDS = 20


def locate_in_bits(bits: np.ndarray, places: np.ndarray, words: np.ndarray, reach: float = 2.5) -> np.ndarray:
    """Where each molecule's spot lies in each of its bits.

    bits: (bit, y, x) of one plane, filtered so that spots stand out; places: (molecule, 2) y, x in pixel; words:
    (molecule, bit), non-zero where a spot is expected. Returns (molecule, bit, 2) y, x: the top of the nearest local
    maximum within ``reach`` px, NaN where there is none or none is expected.
    """
    bits, places, words = np.asarray(bits), np.asarray(places, dtype=np.float64), np.asarray(words)
    if bits.ndim != 3 or places.shape != (len(words), 2) or words.shape != (len(places), len(bits)):
        raise InputError(
            f"expected bits (bit, y, x), places (molecule, 2) and words (molecule, bit), "
            f"got {bits.shape}, {places.shape} and {words.shape}"
        )
    from scipy.spatial import KDTree

    found = np.full((*words.shape, 2), np.nan)
    for k, image in enumerate(bits):
        rows = np.flatnonzero(words[:, k])
        y, x = np.nonzero((image == ndimage.maximum_filter(image, 3)) & (image > 0))
        inner = (y > 0) & (x > 0) & (y < image.shape[0] - 1) & (x < image.shape[1] - 1)
        tops = paraboloid_tops(image, y[inner], x[inner])
        if len(tops) and len(rows):
            distance, nearest = KDTree(tops).query(places[rows], distance_upper_bound=reach)
            near = np.isfinite(distance)
            found[rows[near], k] = tops[nearest[near]]
    return found


def fit_chromatic(spots: np.ndarray, color_of_bit: np.ndarray, reference: int = 0) -> np.ndarray:
    """Fit where each colour shows what the reference colour shows.

    spots: (molecule, bit, 2) y, x in pixel from `locate_in_bits` over any number of fields, of images without drift;
    color_of_bit: (bit,) int. Returns (color, 2, 3): places in the reference colour (y, x, 1) -> places in the colour;
    the identity for the reference and for colours with fewer than 50 pairs.

    Each pair is a spot in the colour and the mean of the same molecule's spots in the reference colour. The fit is
    by least squares with weights 1 / (1 + (r/s)^2), s twice the median residual: spots of neighbours count for little.
    """
    colors = np.asarray(color_of_bit)
    maps = np.tile(np.eye(2, 3), (int(colors.max()) + 1, 1, 1))
    for color in range(len(maps)):
        source, target = _pairs(spots, colors, color, reference)
        if color != reference and len(source) >= _MIN_PAIRS:
            maps[color] = _fit_affine(source, target)
    return maps


def chromatic_residuals(
    spots: np.ndarray, color_of_bit: np.ndarray, maps: np.ndarray, reference: int = 0
) -> np.ndarray:
    """Median distance (color,), pixel, of spots from where ``maps`` (color, 2, 3) put them; NaN without pairs.

    Compare with the identity's, on fields that the maps were not fitted to, to decide whether to apply them. For the
    noise of single spots alone it is about 1.2 sigma; the error of a good map is far smaller.
    """
    colors = np.asarray(color_of_bit)
    residuals = np.full(len(maps), np.nan)
    for color, at in enumerate(maps):
        source, target = _pairs(spots, colors, color, reference)
        if color != reference and len(source):
            residuals[color] = np.median(np.hypot(*(target - source @ at[:, :2].T - at[:, 2]).T))
    return residuals


def _pairs(spots: np.ndarray, colors: np.ndarray, color: int, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """(pair, 2) places in the reference colour and in ``color`` of the same molecule."""
    fixed = spots[:, colors == reference]
    seen = np.isfinite(fixed).all(axis=2)
    mean = np.where(seen[..., None], fixed, 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)[:, None]
    moved = spots[:, colors == color]
    paired = np.isfinite(moved).all(axis=2) & seen.any(axis=1)[:, None]
    return np.repeat(mean[:, None], moved.shape[1], axis=1)[paired], moved[paired]


def _fit_affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Robust affine map (2, 3) from points (pair, 2) to points (pair, 2)."""
    middle = source.mean(axis=0)
    terms = np.column_stack([source - middle, np.ones(len(source))])
    weight = np.ones(len(source))
    for _ in range(_FIT_ROUNDS):
        root = np.sqrt(weight)[:, None]
        fit, *_ = np.linalg.lstsq(terms * root, (target - source) * root, rcond=None)
        off = np.hypot(*(target - source - terms @ fit).T)
        weight = 1 / (1 + (off / max(2 * float(np.median(off)), 1e-9)) ** 2)
    at = np.eye(2, 3) + fit.T
    at[:, 2] -= fit[:2].T @ middle
    return at
