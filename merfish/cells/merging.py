"""Merge the outlines of overlapping fields into one table of cells.

Each step needs only the outlines of a field and of the fields that overlap it, so that an experiment of any size is
merged field by field: `same_cells` finds the outlines of one cell in two fields, `number_cells` numbers the cells,
`merge_outlines` gives each its geometry, and `trim_overlaps` removes overlaps between cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from merfish.cells.counts import ranges
from merfish.cells.segmentation import CELL_AREA
from merfish.cells.stacks import footprints, largest_polygons, planes, stack

SAME_CELL = 0.4  # intersection over union above which outlines of two fields are the same cell
MOSTLY_WITHIN = 0.6  # fraction of an outline within another that makes it a fragment of that cell
NEARLY_WHOLE = 0.8  # fraction of a cell above which an outline is taken for the whole cell
DEPTH = 1.0  # micrometres; depth of cells imaged in a single plane
_MERGED = ["cell", "fov", "geometry"]
NO_LINKS = np.empty((0, 4), np.int64)


def in_stage_frame(outlines: np.ndarray, position: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Transform outlines (outline,) from pixels to micrometres; position: x, y of the centre of the first pixel."""
    return np.asarray(shapely.transform(outlines, lambda xy: xy * microns_per_pixel + position), dtype=object)


def field_frame(position: np.ndarray, shape: tuple[int, int], microns_per_pixel: float) -> shapely.Polygon:
    """Return the area that a field of shape (y, x) covers, in micrometres."""
    low = np.asarray(position) - 0.5 * microns_per_pixel
    high = low + np.array(shape)[::-1] * microns_per_pixel
    return shapely.box(*low, *high)


def same_cells(
    a: np.ndarray, b: np.ndarray, frame_a: shapely.Polygon, frame_b: shapely.Polygon
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of outlines of two fields (in micrometres) that show the same cell.

    Two outlines show the same cell if they are mutual best matches in the area that both fields cover, with an
    intersection over union above 0.4 (over all planes of stacks), or if one lies mostly within the other.
    """
    i, j = shapely.STRtree(b).query(a)
    common = shapely.intersection(frame_a, frame_b)
    one, other = shapely.intersection(planes(a)[i], common), shapely.intersection(planes(b)[j], common)
    shared = shapely.area(shapely.intersection(one, other)).sum(axis=1)
    agreement = shared / np.maximum(shapely.area(shapely.union(one, other)).sum(axis=1), 1e-12)
    within = shared / np.maximum(np.minimum(shapely.area(a[i]), shapely.area(b[j])), 1e-12)
    best = (agreement == _best(i, agreement)) & (agreement == _best(j, agreement))
    same = (best & (agreement > SAME_CELL)) | (within > MOSTLY_WITHIN)
    return i[same], j[same]


def _best(row: np.ndarray, value: np.ndarray) -> np.ndarray:
    best = np.zeros(row.max() + 1 if len(row) else 0)
    np.maximum.at(best, row, value)
    return best[row]


@dataclass(frozen=True, eq=False)
class CellNumbers:
    """The cell of each outline, with the outlines of all fields in order.

    fovs: (fov,) sorted. first: (fov + 1,) row of the first outline of each field. cell: (outline,) int64, cells
    numbered from 0 in the order of their first outlines. home: (cell,) int64, index in ``fovs`` of the field of that
    first outline, non-decreasing. order: (outline,) rows sorted by cell; start: (cell + 1,) where each cell begins.
    """

    fovs: np.ndarray
    first: np.ndarray
    cell: np.ndarray
    home: np.ndarray
    order: np.ndarray
    start: np.ndarray

    def at_home(self, fov: int) -> np.ndarray:
        """Return the cells whose home is the given field, sorted."""
        k = np.searchsorted(self.fovs, fov)
        return np.arange(*np.searchsorted(self.home, [k, k + 1]))

    def homes(self, fovs: Sequence[int]) -> list[int]:
        """Return the home fields of all cells that have outlines in the given fields."""
        k = np.searchsorted(self.fovs, fovs)
        cells = [self.cell[self.first[i] : self.first[i + 1]] for i in k]
        return self.fovs[np.unique(self.home[np.concatenate(cells)])].tolist() if cells else []

    def members(self, cells: np.ndarray) -> pd.DataFrame:
        """Return the outlines of some cells (sorted) by cell, field and outline: columns cell, fov, outline."""
        rows = self.order[ranges(self.start[cells], self.start[cells + 1])[1]]
        k = np.searchsorted(self.first, rows, side="right") - 1
        return pd.DataFrame({"cell": self.cell[rows], "fov": self.fovs[k], "outline": rows - self.first[k]})


def number_cells(n_outlines: Mapping[int, int], links: np.ndarray) -> CellNumbers:
    """Number the cells of all fields.

    n_outlines: of each field. links: (link, 4) int64, each field, outline, field, outline of the same cell.
    """
    fovs = np.array(sorted(n_outlines), np.int64)
    first = np.concatenate([[0], np.cumsum([n_outlines[int(fov)] for fov in fovs])]).astype(np.int64)
    a, b = (first[np.searchsorted(fovs, links[:, k])] + links[:, k + 1] for k in (0, 2))
    n = int(first[-1])
    label = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1]
    _, begin, place = np.unique(label, return_index=True, return_inverse=True)
    rank = np.empty(len(begin), np.int64)
    rank[np.argsort(begin)] = np.arange(len(begin))
    cell = rank[place.ravel()]
    order = np.argsort(cell, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(begin)))]).astype(np.int64)
    home = np.searchsorted(first, np.sort(begin), side="right") - 1
    return CellNumbers(fovs, first, cell, home, order, start)


def merge_outlines(members: pd.DataFrame, geometry: np.ndarray, measured: pd.DataFrame) -> pd.DataFrame:
    """Merge the outlines of each cell (in micrometres) into one geometry, in the order of cells.

    members: cell, fov, outline, sorted by cell. geometry: (outline,) of each row. measured: means over its area. If the
    largest outline covers nearly all of a cell, the cell keeps its shape and means; a cell that is cut by the border of
    every field is the union of its outlines, with area-weighted means. Returns columns cell, fov (of the largest
    outline), geometry, and those of ``measured``.
    """
    area = shapely.area(geometry)
    cell, fov = members["cell"].to_numpy(), members["fov"].to_numpy()
    bounds = np.append(np.flatnonzero(np.diff(cell, prepend=-1)), len(cell))
    weight = np.zeros(len(area))
    rows = []
    for start, stop in pairwise(bounds):
        largest = start + int(np.argmax(area[start:stop]))
        shape = geometry[largest]
        weight[largest] = 1.0
        if stop - start > 1:
            pieces = np.asarray(shapely.union_all(planes(geometry[start:stop]), axis=0))
            union = stack(largest_polygons(pieces)[None])[0]
            if area[largest] < NEARLY_WHOLE * union.area:
                shape = union
                weight[start:stop] = area[start:stop] / area[start:stop].sum()
        rows.append((cell[start], fov[largest], shape))
    table = pd.DataFrame(rows, columns=["cell", "fov", "geometry"])
    weighted = np.add.reduceat(measured.to_numpy(float) * weight[:, None], bounds[:-1]) if len(rows) else measured
    means = pd.DataFrame(weighted, columns=measured.columns, dtype=float)
    return pd.concat([table.astype({"cell": "int64", "fov": "int32", "geometry": object}), means], axis=1)


def trim_overlaps(cells: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Remove the area that larger cells cover from cells, and drop those that become too small.

    Cells that are stacks of outlines are compared plane by plane, and may lie above each other.

    cells: as returned by `merge_outlines`. others: all cells that may touch them, including themselves. The overlap of
    two cells goes to the larger one, or to the one with the lower number if their areas are equal. Returns cell_id
    int64 (number + 1), fov, center_x, center_y (micrometres), area (square micrometres), geometry, and the other
    columns of ``cells``.
    """
    geometry, rival = cells["geometry"].to_numpy(object).copy(), others["geometry"].to_numpy(object)
    number, rival_number = cells["cell"].to_numpy(), others["cell"].to_numpy()
    area, rival_area = shapely.area(geometry), shapely.area(rival)
    i, j = shapely.STRtree(rival).query(geometry)
    larger = (rival_area[j] > area[i]) | ((rival_area[j] == area[i]) & (rival_number[j] < number[i]))
    i, j = i[larger], j[larger]
    overlapping = shapely.area(shapely.intersection(planes(geometry)[i], planes(rival)[j])).sum(axis=1) > 1e-6
    i, j = i[overlapping], j[overlapping]
    order = np.lexsort((rival_number[j], i))
    for row, other in zip(i[order], j[order], strict=True):
        left = shapely.difference(planes(geometry[[row]])[0], planes(rival[[other]])[0])
        geometry[row] = stack(largest_polygons(left)[None])[0]
    final = shapely.area(footprints(geometry))
    kept = final >= 0.25 * CELL_AREA[0]
    center = shapely.get_coordinates(shapely.centroid(geometry[kept])).reshape(-1, 2)
    return pd.DataFrame(
        {
            "cell_id": number[kept] + 1,
            "fov": cells["fov"].to_numpy(np.int32)[kept],
            "center_x": center[:, 0],
            "center_y": center[:, 1],
            "area": final[kept],
            "geometry": geometry[kept],
            **{name: cells[name].to_numpy()[kept] for name in cells.columns.difference(_MERGED, sort=False)},
        }
    )
