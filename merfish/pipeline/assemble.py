"""Map over fields and their neighbours: final outlines of cells, and their molecules without duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish._parquet import read_table
from merfish.calls.overlap import FIELD_RADIUS, Sightings, seen_better_elsewhere
from merfish.cells.counts import OUTSIDE, assign_cells
from merfish.cells.measure import column_name
from merfish.cells.merging import CellNumbers, merge_outlines, trim_overlaps
from merfish.cells.stacks import footprints, nearest_plane, planes, thickness
from merfish.exchange.run import PLANE_OUTLINES
from merfish.imaging.experiment import Experiment
from merfish.pipeline.cluster import RunMap
from merfish.pipeline.fields import read_measured, read_spots
from merfish.pipeline.progress import Display
from merfish.pipeline.reconcile import KEPT_DTYPE, Fields, Reconciled, map_all, stage_outlines

# count: molecules; expected: sum of their probabilities of being correct; nuclear: those in a nucleus
COUNT_DTYPE = np.dtype([("cell", "i8"), ("word", "i4"), ("count", "i4"), ("expected", "f4"), ("nuclear", "i4")])
PLACED_DTYPE = np.dtype([("row", "i8"), ("cell", "i8")])


def assemble(fields: Fields, found: Reconciled, run_map: RunMap, display: Display) -> None:
    """Outline the cells and assign the molecules of every field; results are written to files of the work folder."""
    near = fields.near(found.stitching.positions, FIELD_RADIUS)
    for name, work in (
        ("merge cells", MergeWork(fields, found.cells, found.stitching.positions)),
        ("trim overlaps", TrimWork(fields, found.cells, near)),
        ("assign molecules", AssignWork(fields, found.cells, found.stitching.positions, near)),
    ):
        map_all(name, work, fields.fovs, run_map, display)


@dataclass(frozen=True, eq=False)
class MergeWork:
    """Merges the outlines of each cell whose home is the given field."""

    fields: Fields
    cells: CellNumbers
    positions: np.ndarray

    def __call__(self, fov: int) -> int:
        """Write the cells to the file ``merged`` and return their number."""
        members = self.cells.members(self.cells.at_home(fov))
        geometry = np.empty(len(members), dtype=object)
        measured = [read_measured(self.fields.out, fov).iloc[:0]]
        place = [np.empty(0, np.int64)]
        for other in members["fov"].unique().tolist():
            rows = members["fov"].to_numpy() == other
            outlines = stage_outlines(self.fields, self.positions, other)
            chosen = members["outline"].to_numpy()[rows]
            geometry[rows] = outlines[chosen]
            measured.append(read_measured(self.fields.out, other).iloc[chosen])
            place.append(np.flatnonzero(rows))
        means = pd.concat(measured).iloc[np.argsort(np.concatenate(place))]
        write_cell_part(self.fields, "merged", fov, merge_outlines(members, geometry, means))
        return len(members)


@dataclass(frozen=True, eq=False)
class TrimWork:
    """Removes the area that larger cells cover from the cells whose home is the given field."""

    fields: Fields
    cells: CellNumbers
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> int:
        """Write the remaining cells to the file ``cells`` and return their number."""
        own = read_cell_part(self.fields, "merged", fov)
        # a cell may extend into every field that has an outline of it, and touch the cells found there
        seen = set(self.cells.members(own["cell"].to_numpy())["fov"].tolist()) | {fov}
        seen |= {other for field in seen for other in self.near[field]}
        homes = {fov, *self.cells.homes(sorted(seen))}
        others = [read_cell_part(self.fields, "merged", home) for home in sorted(homes)]
        cells = trim_overlaps(own, pd.concat(others, ignore_index=True))
        write_cell_part(self.fields, "cells", fov, described(cells, self.fields.experiment, self.fields.planes))
        return len(cells)


@dataclass(frozen=True, eq=False)
class AssignWork:
    """Drops the molecules of a field that are kept in an overlapping field, and assigns the others to cells."""

    fields: Fields
    cells: CellNumbers
    positions: np.ndarray
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> tuple[int, int]:
        """Write files ``placed``, ``single`` and ``counts``; return the numbers of molecules and of those in cells."""
        kept = self.fields.read_rows("kept", fov, KEPT_DTYPE)
        own = self._sightings(fov, kept)
        worse, n = seen_better_elsewhere(own, (self._sightings(other) for other in self.near[fov])), len(kept)
        homes = {fov, *self.cells.homes([fov, *self.near[fov]])}
        known = pd.concat([read_cell_part(self.fields, "cells", home) for home in sorted(homes)], ignore_index=True)
        height = self._heights(fov, kept)[~worse]
        cell = place_in_cells(own.x[~worse], own.y[~worse], height, known, self.fields.planes)
        row = kept["row"][~worse[:n]]
        placed = np.empty(len(row), PLACED_DTYPE)
        placed["row"], placed["cell"] = row, cell[: len(row)]
        self.fields.write_rows("placed", fov, placed)
        single = np.empty(len(cell) - len(row), PLACED_DTYPE)
        single["row"], single["cell"] = np.flatnonzero(~worse[n:]), cell[len(row) :]
        self.fields.write_rows("single", fov, single)
        # spots of a gene that is imaged alone need no decoding
        probability = np.append(kept["probability"], np.ones(len(worse) - n, np.float32))[~worse]
        nuclear = np.append(kept["nuclear"], np.zeros(len(worse) - n, bool))[~worse]
        self.fields.write_rows("counts", fov, count_pairs(cell, own.word[~worse], probability, nuclear))
        return len(placed), int((placed["cell"] >= 0).sum())

    def _heights(self, fov: int, kept: np.ndarray) -> np.ndarray:
        """Return the heights of the molecules that `_sightings` returns, in micrometres."""
        plane = np.append(kept["z"], read_spots(self.fields.out, fov)["z"]).astype(float)
        return np.interp(plane, np.arange(len(self.fields.experiment.z)), self.fields.experiment.z)

    def _sightings(self, fov: int, kept: np.ndarray | None = None) -> Sightings:
        """Return the kept molecules, then those of genes imaged one by one, whose words follow the codebook's."""
        kept = self.fields.read_rows("kept", fov, KEPT_DTYPE) if kept is None else kept
        spots = read_spots(self.fields.out, fov)
        word = np.append(kept["word"], spots["gene"] + self.fields.experiment.codebook.n_words)
        height, width = self.fields.shape
        x, y = (np.append(kept[name], spots[name]).astype(float) for name in ("x", "y"))
        edge = np.minimum.reduce([x, y, width - 1 - x, height - 1 - y])
        scale = self.fields.experiment.microns_per_pixel
        left, top = self.positions[fov]
        return Sightings(fov, word, left + x * scale, top + y * scale, edge)


def place_in_cells(
    x: np.ndarray, y: np.ndarray, height: np.ndarray, cells: pd.DataFrame, heights: np.ndarray | None
) -> np.ndarray:
    """Return the cell_id of each molecule (molecule,), -1 outside all cells.

    x, y, height: (molecule,) in micrometres. cells: as `described` returns them. heights: of the planes in which cells
    have separate outlines, in micrometres; each molecule is assigned in the nearest plane.
    """
    ids = cells["cell_id"].to_numpy()
    if heights is None:
        return assign_cells(x, y, cells["geometry"].to_numpy(), ids)
    outlines = planes(shapely.from_wkb(cells[PLANE_OUTLINES].to_numpy(object)))
    plane, cell = nearest_plane(height, heights), np.full(len(x), OUTSIDE)
    for k in range(outlines.shape[1]):
        here = plane == k
        cell[here] = assign_cells(x[here], y[here], outlines[:, k], ids)
    return cell


def described(cells: pd.DataFrame, experiment: Experiment, heights: np.ndarray | None = None) -> pd.DataFrame:
    """Return the columns of the results for cells: volume [µm³], nucleus_area [µm²] and stains.

    ``cells`` needs depth and, if measured, nucleus (fraction of the area) and ``<stain>_mean`` (camera counts per
    pixel). ``<stain>_total`` is the sum over the pixels of the cell in all planes of the stain. If cells have an
    outline in each plane, at ``heights``, ``geometry`` is their footprint, and `PLANE_OUTLINES` holds the outlines as
    WKB.
    """
    area, geometry = cells["area"].to_numpy(), cells["geometry"].to_numpy(object)
    of_planes = area[:, None] if heights is None else shapely.area(planes(geometry))
    thick = cells[["depth"]].to_numpy() if heights is None else thickness(heights)
    columns = {"volume": (of_planes * thick).sum(axis=1) if len(cells) else np.empty(0)}
    if "nucleus" in cells:
        columns["nucleus_area"] = area * cells["nucleus"].to_numpy()
    for channel in experiment.stains:
        stain = column_name(channel.name)
        if f"{stain}_mean" in cells:
            mean = cells[f"{stain}_mean"].to_numpy()
            pixels = of_planes.mean(axis=1) / experiment.microns_per_pixel**2 * len(channel.z)
            columns |= {f"{stain}_mean": mean, f"{stain}_total": mean * pixels}
    placed = cells[["cell_id", "fov", "center_x", "center_y", "area"]]
    if heights is None:
        return placed.assign(**columns, geometry=geometry)
    return placed.assign(**columns, **{PLANE_OUTLINES: shapely.to_wkb(geometry)}, geometry=footprints(geometry))


def count_pairs(
    cell: np.ndarray, word: np.ndarray, probability: np.ndarray, nuclear: np.ndarray | None = None
) -> np.ndarray:
    """Count the molecules of each word in each cell; returns `COUNT_DTYPE` sorted by cell and word.

    cell, word: (molecule,) int, molecules of cell -1 are ignored. probability: (molecule,) of being correct. nuclear:
    (molecule,) bool, whether the molecule lies in a nucleus; none do by default.
    """
    inside = cell >= 0
    nuclear = np.zeros(len(cell), bool) if nuclear is None else nuclear
    n_words = int(word.max(initial=0)) + 1
    cells, row = np.unique(cell[inside], return_inverse=True)
    pairs, row = np.unique(row.ravel() * n_words + word[inside], return_inverse=True)
    found = np.empty(len(pairs), COUNT_DTYPE)
    found["cell"], found["word"] = cells[pairs // n_words], pairs % n_words
    for name, weight in (("count", None), ("expected", probability[inside]), ("nuclear", nuclear[inside])):
        found[name] = np.bincount(row.ravel(), weight, minlength=len(pairs))
    return found


# --- cells of a field on disk -------------------------------------------------------------------------------------


def write_cell_part(fields: Fields, name: str, fov: int, cells: pd.DataFrame) -> None:
    """Write cells for a later step."""
    columns = {column: pa.array(cells[column].to_numpy()) for column in cells if column != "geometry"}
    columns["geometry"] = pa.array(shapely.to_wkb(cells["geometry"].to_numpy(object)), pa.binary())
    pq.write_table(pa.table(columns), fields.file(name, fov, "parquet"))


def read_cell_part(fields: Fields, name: str, fov: int) -> pd.DataFrame:
    """Read what `write_cell_part` wrote."""
    table = read_table(fields.file(name, fov, "parquet"))
    cells = table.drop_columns("geometry").to_pandas()
    geometry = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    return cells.assign(geometry=np.asarray(geometry, dtype=object))
