"""Stacks: outlines of a cell in several planes as one geometry, a collection with one polygon per plane.

A cell that has one outline for all planes remains a polygon.
"""

from __future__ import annotations

import numpy as np
import shapely

from merfish.cells.segmentation import largest_polygon


def stack(outlines: np.ndarray) -> np.ndarray:
    """Build geometries (cell,) from outlines (cell, plane), polygons that may be empty."""
    if outlines.shape[1] == 1:
        return outlines[:, 0]
    return np.asarray(shapely.geometrycollections(outlines), dtype=object).reshape(len(outlines))


def planes(geometry: np.ndarray) -> np.ndarray:
    """Return outlines (cell, plane) of geometries (cell,): all must be stacks of equally many planes, or none."""
    if not is_stack(geometry).any():
        return geometry[:, None]
    return np.asarray(shapely.get_geometry(geometry[:, None], np.arange(shapely.get_num_geometries(geometry[0]))))


def is_stack(geometry: np.ndarray) -> np.ndarray:
    """Return which geometries are stacks of several planes, bool."""
    return np.asarray(shapely.get_type_id(geometry) == shapely.GeometryType.GEOMETRYCOLLECTION)


def footprints(geometry: np.ndarray) -> np.ndarray:
    """Return the projection of each cell (cell,) along z, a polygon."""
    if not is_stack(geometry).any():
        return geometry
    return largest_polygons(np.asarray(shapely.union_all(planes(geometry), axis=1)))


def largest_polygons(geometry: np.ndarray) -> np.ndarray:
    """Return the largest polygon of each geometry (cell,), empty if there is none."""
    found = np.empty(len(geometry), dtype=object)
    found[:] = [largest_polygon(shape) for shape in geometry.tolist()]
    return found


def thickness(heights: np.ndarray) -> np.ndarray:
    """Return the thickness of planes in micrometres: each extends half-way to its neighbours.

    The first and the last plane extend equally in both directions. heights: (plane,) in micrometres, ascending.

    >>> thickness(np.array([0.0, 1.0, 3.0]))
    array([1. , 1.5, 2. ])
    """
    return np.gradient(np.asarray(heights, float))


def nearest_plane(height: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return the index of the plane nearest to each height (position,), the lower of two. heights: (plane,), sorted."""
    heights = np.asarray(heights, float)
    return np.searchsorted((heights[1:] + heights[:-1]) / 2, height)
