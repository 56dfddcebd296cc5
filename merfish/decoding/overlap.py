"""Duplicates within a field: molecules detected in adjacent planes, and rims or fragments of a molecule."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

PLANE_RADIUS = 1.5  # pixel; a molecule's position changes little from plane to plane
HALO_RADIUS = 5.0  # pixel; radius of the rings and rims of a bright molecule
HALO_SHARE = 1 / 3  # relative to the molecule's mass; other molecules are rarely that much weaker
# pixel; a molecule between planes is out of focus and may be fitted as several spots, at most this far apart
SPLINTER_RADIUS = 3.0
# relative to the brightest fragment. Of simulated calls in five planes this removes a third to a half of the wrong ones
# and up to 1 % of the right ones; half this value, or twice the radius, is worse
SPLINTER_SHARE = 0.7
HALO_PLANES = 1


def same_molecule_pairs(word: np.ndarray, x: np.ndarray, y: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs (i < j) with the same word (molecule,) within ``radius`` of each other, in the unit of x and y."""
    # a third axis on which different words are farther apart than the radius
    points = np.column_stack([x, y, np.asarray(word, dtype=float) * 4 * radius])
    pairs = cKDTree(points).query_pairs(radius, output_type="ndarray") if len(points) else np.empty((0, 2), int)
    return pairs[:, 0], pairs[:, 1]


def merge_planes(
    word: np.ndarray, x: np.ndarray, y: np.ndarray, plane: np.ndarray, brightness: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge molecules with the same word in adjacent planes, within 1.5 px.

    All arrays (molecule,); x, y pixel. Returns keep, indices of the brightest member of each molecule in increasing
    order, and z (kept,) float32, the plane index averaged by brightness.
    """
    if not plane.any():
        return np.arange(len(word)), plane.astype(np.float32)
    i, j = same_molecule_pairs(word, x, y, PLANE_RADIUS)
    neighbours = np.abs(plane[i] - plane[j]) == 1
    group = _groups(len(word), i[neighbours], j[neighbours])
    order = np.lexsort((np.arange(len(word)), -brightness, group))
    keep = order[np.unique(group[order], return_index=True)[1]]
    weight = np.bincount(group, brightness)
    z = np.bincount(group, brightness * plane) / np.where(weight > 0, weight, 1)
    sequence = np.argsort(keep)
    return keep[sequence], z[group[keep[sequence]]].astype(np.float32)


def halos(word: np.ndarray, x: np.ndarray, y: np.ndarray, plane: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Mark the patches that are rims or rings of a brighter molecule of the same word; (molecule,) bool.

    These have another patch of their word within 5 px, in the same or an adjacent plane, with more than three times
    their mass (brightness times area). All arrays (molecule,); x, y pixel.
    """
    return _outshone(word, x, y, plane, mass, HALO_RADIUS, HALO_SHARE, HALO_PLANES)


def splinters(
    word: np.ndarray, x: np.ndarray, y: np.ndarray, plane: np.ndarray, light: np.ndarray, planes: int
) -> np.ndarray:
    """Mark the spots that are fragments of a molecule out of focus between planes; (molecule,) bool.

    These have another spot of their word within 3 px, at most ``planes`` away, and less than 0.7 of its brightness. In
    a single plane there are none. All arrays (molecule,); x, y pixel.
    """
    if not plane.any():
        return np.zeros(len(word), bool)
    return _outshone(word, x, y, plane, light, SPLINTER_RADIUS, SPLINTER_SHARE, planes)


def _outshone(
    word: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    plane: np.ndarray,
    mass: np.ndarray,
    radius: float,
    share: float,
    reach: int,
) -> np.ndarray:
    """Mark those with less than ``share`` of the mass of one of their word, within ``radius`` and ``reach`` planes."""
    i, j = same_molecule_pairs(word, x, y, radius)
    near = np.abs(plane[i] - plane[j]) <= reach
    weak, strong = np.where(mass[i] < mass[j], (i, j), (j, i))[:, near]
    outshone = np.zeros(len(word), bool)
    outshone[weak[mass[weak] < share * mass[strong]]] = True
    return outshone


def once(
    word: np.ndarray, x: np.ndarray, y: np.ndarray, plane: np.ndarray, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each molecule of a field once: drop `halos`, and merge its detections in several planes.

    All arrays (molecule,); x, y pixel. Returns keep and z as `merge_planes` does.
    """
    whole = np.flatnonzero(~halos(word, x, y, plane, mass))
    keep, z = merge_planes(word[whole], x[whole], y[whole], plane[whole], mass[whole])
    return whole[keep], z


def _groups(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
