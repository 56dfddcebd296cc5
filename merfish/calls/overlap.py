"""Duplicates: a molecule detected in two overlapping fields is counted once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from merfish.calls._kernels import settle_pairs

FIELD_RADIUS = 0.3  # micrometre; registration and stage error, below the distance between molecules of one gene


@dataclass(frozen=True, eq=False)
class Sightings:
    """Kept calls of a field, (molecule,): word int, global x, y (micrometre), distance to the edge of the field."""

    fov: int
    word: np.ndarray
    x: np.ndarray
    y: np.ndarray
    edge: np.ndarray


def seen_better_elsewhere(own: Sightings, others: Iterable[Sightings]) -> np.ndarray:
    """Mark the molecules of a field that are duplicates of molecules kept in another field; (molecule,) bool.

    Molecules with the same word in two fields within 0.3 micrometres are one molecule. The one farther from the edge of
    its field is kept; at equal distance, the one of the field with the lower number. Pairs of fields are compared
    separately and symmetrically, so that a molecule dropped from one field is kept in the other.
    """
    worse = np.zeros(len(own.word), bool)
    for other in others:
        first, second = (own, other) if own.fov < other.fov else (other, own)
        i, j = pair_up(first, second)
        first_stays = first.edge[i] >= second.edge[j]
        if first is own:
            worse[i[~first_stays]] = True
        else:
            worse[j[first_stays]] = True
    return worse


def pair_up(a: Sightings, b: Sightings) -> tuple[np.ndarray, np.ndarray]:
    """Match rows of a and b that are the same molecule; return the rows of each, (pair,) int64.

    The closest pairs are matched first, and each molecule is matched at most once, so that two real neighbours are not
    both dropped.
    """
    near_a, near_b = _common(a, b)
    trees = [
        # a third axis on which different words are farther apart than the radius
        cKDTree(np.column_stack([part.x[rows], part.y[rows], part.word[rows] * (4 * FIELD_RADIUS)]))
        for part, rows in ((a, near_a), (b, near_b))
    ]
    near = trees[0].sparse_distance_matrix(trees[1], FIELD_RADIUS, output_type="ndarray")
    near = near[np.lexsort((near["j"], near["i"], near["v"]))]
    settled = np.empty(len(near), bool)
    i, j = (np.ascontiguousarray(near[name], np.int64) for name in ("i", "j"))
    settle_pairs(i, j, np.zeros(len(near_a), bool), np.zeros(len(near_b), bool), settled)
    return near_a[i[settled]], near_b[j[settled]]


def _common(a: Sightings, b: Sightings) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and b in the region where both fields have molecules."""
    if not (len(a.word) and len(b.word)):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    low = [max(getattr(a, axis).min(), getattr(b, axis).min()) - FIELD_RADIUS for axis in ("x", "y")]
    high = [min(getattr(a, axis).max(), getattr(b, axis).max()) + FIELD_RADIUS for axis in ("x", "y")]
    inside = [(s.x >= low[0]) & (s.x <= high[0]) & (s.y >= low[1]) & (s.y <= high[1]) for s in (a, b)]
    return np.flatnonzero(inside[0]), np.flatnonzero(inside[1])
