"""Chromatic distortion: affine maps from the reference colour to each other colour, estimated from the molecules.

A molecule has spots in several bits, and therefore in several colours. Systematic displacements between them over the
field are chromatic distortion, which one affine map for each colour describes to a few hundredths of a pixel. It need
not be known which spots belong to the same molecule: among all pairs of nearby spots of two colours, pairs of one
molecule scatter about the map and all others are uniform; a mixture of the two is fitted (as in coherent point drift,
Myronenko & Song 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from merfish.imaging.normalize import FieldSpots

REACH = 6.0  # pixel; two spots of one molecule are closer than this
MIN_PAIRS = 100.0  # pairs of one molecule; with fewer, the map of a colour is the identity
MOST_SPOTS = 8_000  # of the reference colour, for each field; the error of the map is then below 0.01 px
LEAST_SHIFT = 0.05  # pixel; smaller shifts are far below the localisation error of a spot and are not corrected
# Widths of the mixture, pixel, from one that covers any map to that of the scatter of the spots; then the width is
# fitted.
_WIDTHS = (2.5, 2.0, 1.5, 1.0, 0.7, 0.5)
_ITERATIONS = 4  # at each width
_FREE = 15  # iterations with the width fitted


@dataclass(frozen=True, eq=False)
class Pairs:
    """Nearby spots of two colours: positions in the reference colour and in the other, (pair, 2) y, x in pixels."""

    source: np.ndarray
    target: np.ndarray


@dataclass(frozen=True, eq=False)
class ColorFit:
    """Chromatic map of a colour and its quality.

    map: (2, 3) float64, positions in the reference colour (y, x, 1) -> positions (y, x) in the colour, pixel; the
    identity if a map does not help. pairs: estimated number of pairs of one molecule. gain: increase of the
    log-likelihood per pair by a map that is fitted to one half of the fields and tested on the other, the smaller of
    both directions; NaN with too few pairs. error: pixel, root mean square error of the map over the field, from the
    difference between the halves. shift: pixel, largest displacement by the fitted map over the field.
    """

    map: np.ndarray
    pairs: float
    gain: float
    error: float
    shift: float

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON stores exactly; unknown ones are None."""
        known = {name: value if np.isfinite(value) else None for name, value in vars(self).items() if name != "map"}
        return {"map": self.map.tolist(), **known}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ColorFit:
        """Restore from `to_dict`."""
        known = {name: np.nan if value is None else value for name, value in values.items() if name != "map"}
        return cls(np.array(values["map"]), **known)


def fit_chromatic(
    fields: Sequence[FieldSpots],
    shifts: Sequence[np.ndarray],
    color_of_bit: np.ndarray,
    shape: tuple[int, int],
    reference: int = 0,
) -> list[ColorFit]:
    """Fit a map from the reference colour to each other colour.

    fields: spots of some fields, corrected for drift; shifts: the drift of each field, (bit, 2) dy, dx in pixels;
    color_of_bit: (bit,) int; shape: (y, x) of a field. Returns one fit for each colour.

    A map is applied only if a map fitted to one half of the fields increases the likelihood of the other half, in both
    directions. Of a single field, halves of its pairs of spots are used.
    """
    colors = np.asarray(color_of_bit)
    fits = []
    for color in range(int(colors.max()) + 1):
        if color == reference:
            fits.append(ColorFit(np.eye(2, 3), 0.0, np.nan, 0.0, 0.0))
            continue
        parts = [
            near_pairs(spots, shift, colors == reference, colors == color)
            for spots, shift in zip(fields, shifts, strict=True)
        ]
        fits.append(_judge(parts, shape))
    return fits


def near_pairs(spots: FieldSpots, shift: np.ndarray, fixed: np.ndarray, moved: np.ndarray) -> Pairs:
    """Pair spots of the bits ``fixed`` and ``moved``, (bit,) bool, within `REACH` of each other in the same plane.

    Positions are those on the camera, before the correction of the drift of the moved bit, shift (bit, 2).
    """
    where = np.column_stack([spots.y, spots.x, spots.plane * (4 * REACH + spots.shape[0] + spots.shape[1])])
    a, b = np.flatnonzero(fixed[spots.bit]), np.flatnonzero(moved[spots.bit])
    a = a[:: len(a) // MOST_SPOTS + 1]
    if not (len(a) and len(b)):
        return Pairs(np.empty((0, 2)), np.empty((0, 2)))
    near = KDTree(where[a]).sparse_distance_matrix(KDTree(where[b]), REACH, output_type="ndarray")
    near = np.sort(near, order=["i", "j"])
    i, j = a[near["i"]], b[near["j"]]
    drift = shift[spots.bit[j]]
    return Pairs(where[i, :2] + drift, where[j, :2] + drift)


def _judge(parts: Sequence[Pairs], shape: tuple[int, int]) -> ColorFit:
    """Fit a map to all pairs, and to each half, to test it on the other half."""
    halves = [_joined(parts[::2]), _joined(parts[1::2])]
    if len(parts) == 1:
        halves = [Pairs(parts[0].source[k::2], parts[0].target[k::2]) for k in (0, 1)]
    everything = _joined(parts)
    if len(everything.source) < MIN_PAIRS or min(len(half.source) for half in halves) < MIN_PAIRS / 2:
        return ColorFit(np.eye(2, 3), 0.0, np.nan, np.nan, 0.0)
    fit = fit_mixture(everything)
    if fit.count < MIN_PAIRS:
        return ColorFit(np.eye(2, 3), fit.count, np.nan, np.nan, 0.0)
    tries = [fit_mixture(half) for half in halves]
    none = [fit_mixture(half, still=True) for half in halves]
    gain = min(_log_likelihood(halves[1 - k], tries[k]) - _log_likelihood(halves[1 - k], none[k]) for k in (0, 1))
    # each half has half of the pairs, so the difference of their maps is twice the error of the map of all pairs
    error = np.sqrt((_over_field(tries[0].map - tries[1].map, shape) ** 2).mean()) / 2
    shift = float(_over_field(fit.map - np.eye(2, 3), shape).max())
    helps = gain > 0 and shift > LEAST_SHIFT
    return ColorFit(fit.map if helps else np.eye(2, 3), fit.count, float(gain), float(error), shift)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Map (2, 3), scatter (pixel) of the pairs of one molecule about it, their fraction of all pairs, and number."""

    map: np.ndarray
    width: float
    share: float
    count: float


def fit_mixture(pairs: Pairs, *, still: bool = False) -> Mixture:
    """Fit an affine map to pairs, many of which are chance pairs; with ``still`` the map is fixed at the identity.

    The width is large at first, to include the pairs at any distance, and is then reduced to their scatter.
    """
    middle = pairs.source.mean(axis=0)
    size = max(float(pairs.source.std()), 1.0)
    terms = np.column_stack([(pairs.source - middle) / size, np.ones(len(pairs.source))])
    step = pairs.target - pairs.source
    chance = 1 / (np.pi * REACH**2)
    solution, share, width = np.zeros((3, 2)), 0.2, _WIDTHS[0]
    for iteration in range(len(_WIDTHS) * _ITERATIONS + _FREE):
        off = ((step - terms @ solution) ** 2).sum(axis=1)
        near = share * np.exp(-off / (2 * width**2)) / (2 * np.pi * width**2)
        weight = near / (near + (1 - share) * chance)
        share = float(np.clip(weight.mean(), 1e-3, 0.999))
        if not still:
            heavy = terms * weight[:, None]
            # a weak prior at the identity, so that spots in one corner do not distort the others
            normal = heavy.T @ terms + np.diag([1.0, 1.0, 1e-9])
            solution = np.linalg.solve(normal, heavy.T @ step)
        if iteration < len(_WIDTHS) * _ITERATIONS:
            width = _WIDTHS[iteration // _ITERATIONS]
        else:
            width = float(np.clip(np.sqrt((weight @ off) / (2 * max(weight.sum(), 1e-9))), 0.05, _WIDTHS[0]))
    at = np.eye(2, 3)
    at[:, :2] += solution[:2].T / size
    at[:, 2] = solution[2] - solution[:2].T @ middle / size
    return Mixture(at, width, share, float(weight.sum()))


def _log_likelihood(pairs: Pairs, fit: Mixture) -> float:
    """Mean log-likelihood of pairs."""
    off = ((pairs.target - pairs.source @ fit.map[:, :2].T - fit.map[:, 2]) ** 2).sum(axis=1)
    near = fit.share * np.exp(-off / (2 * fit.width**2)) / (2 * np.pi * fit.width**2)
    return float(np.log(near + (1 - fit.share) / (np.pi * REACH**2)).mean())


def _joined(parts: Sequence[Pairs]) -> Pairs:
    if not parts:
        return Pairs(np.empty((0, 2)), np.empty((0, 2)))
    return Pairs(np.concatenate([p.source for p in parts]), np.concatenate([p.target for p in parts]))


def _over_field(change: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Displacement, pixel, by a difference of maps (2, 3) at 11 x 11 positions from corner to corner of a field."""
    y, x = np.meshgrid(*(np.linspace(0, side - 1, 11) for side in shape), indexing="ij")
    moved = np.stack([y.ravel(), x.ravel(), np.ones(y.size)], axis=1) @ change.T
    return np.asarray(np.hypot(moved[:, 0], moved[:, 1]))
