"""One molecule seen in the overlap of neighbouring fields is counted once."""

from __future__ import annotations

import numpy as np

from merfish.decoding.overlap import same_molecule_pairs

FIELD_RADIUS = 0.3  # micrometre; registration and stage error, below the distance between molecules of one gene


def duplicates_between_fields(
    word: np.ndarray, global_x: np.ndarray, global_y: np.ndarray, fov: np.ndarray, edge_distance: np.ndarray
) -> np.ndarray:
    """Which molecules another field shows as well, and better; (molecule,) bool.

    Molecules of equal word in different fields within 0.3 micrometre are one; the one farthest from the edge of its
    field (edge_distance, any unit) stays, at equal distance the one of the lower row. Pairs are settled from the
    closest on, and each molecule takes part in one, so that two real neighbours are not both dropped.
    """
    i, j = same_molecule_pairs(word, global_x, global_y, FIELD_RADIUS)
    between = fov[i] != fov[j]
    i, j = i[between], j[between]
    separation = np.hypot(global_x[i] - global_x[j], global_y[i] - global_y[j])
    duplicate = np.zeros(len(word), bool)
    partners: list[set[int]] = [set() for _ in range(len(word))] if len(i) else []
    for k in np.lexsort((j, i, separation)):
        a, b = int(min(i[k], j[k])), int(max(i[k], j[k]))
        if duplicate[a] or duplicate[b] or fov[b] in partners[a] or fov[a] in partners[b]:
            continue
        partners[a].add(int(fov[b]))
        partners[b].add(int(fov[a]))
        duplicate[b if edge_distance[a] >= edge_distance[b] else a] = True
    return duplicate
