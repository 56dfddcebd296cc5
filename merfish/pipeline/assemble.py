"""Map over fields with their neighbours: final outlines, molecules without doubles in cells; then write the tables.

Tables are written one field after the other, a row group each, so that memory stays flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish.calls.overlap import FIELD_RADIUS, Sightings, seen_better_elsewhere
from merfish.cells.counts import assign_cells
from merfish.cells.merging import CellNumbers, part, unite
from merfish.pipeline.cluster import RunMap
from merfish.pipeline.progress import Display
from merfish.pipeline.reconcile import Fields, Reconciled, map_all, stage_outlines

COUNT_DTYPE = np.dtype([("cell", "i8"), ("word", "i4"), ("count", "i4")])
PLACED_DTYPE = np.dtype([("row", "i8"), ("cell", "i8")])


def assemble(fields: Fields, found: Reconciled, run_map: RunMap, display: Display) -> None:
    """Outline the cells and place the molecules of every field, into files of the work folder."""
    near = fields.near(found.stitching.positions, FIELD_RADIUS)
    for name, work in (
        ("unite cells", UniteWork(fields, found.cells, found.stitching.positions)),
        ("part cells", PartWork(fields, found.cells, near)),
        ("place", PlaceWork(fields, found.cells, found.stitching.positions, near)),
    ):
        map_all(name, work, fields.fovs, run_map, display)


@dataclass(frozen=True, eq=False)
class UniteWork:
    """Gives each cell whose home a field is one geometry."""

    fields: Fields
    cells: CellNumbers
    positions: np.ndarray

    def __call__(self, fov: int) -> int:
        """The number of cells; they go to the file ``united``."""
        members = self.cells.members(self.cells.at_home(fov))
        geometry = np.empty(len(members), dtype=object)
        for other in members["fov"].unique().tolist():
            rows = members["fov"].to_numpy() == other
            outlines = stage_outlines(self.fields, self.positions, other)
            geometry[rows] = outlines[members["outline"].to_numpy()[rows]]
        write_cell_part(self.fields, "united", fov, unite(members, geometry))
        return len(members)


@dataclass(frozen=True, eq=False)
class PartWork:
    """Takes the ground that larger cells have from the cells whose home a field is."""

    fields: Fields
    cells: CellNumbers
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> int:
        """The number of cells left; they go to the file ``cells``."""
        own = read_cell_part(self.fields, "united", fov)
        # a cell may reach into the fields of all its outlines, where it meets the cells that those show
        seen = set(self.cells.members(own["cell"].to_numpy())["fov"].tolist()) | {fov}
        seen |= {other for field in seen for other in self.near[field]}
        homes = {fov, *self.cells.homes(sorted(seen))}
        others = [read_cell_part(self.fields, "united", home) for home in sorted(homes)]
        cells = part(own, pd.concat(others, ignore_index=True))
        write_cell_part(self.fields, "cells", fov, cells)
        return len(cells)


@dataclass(frozen=True, eq=False)
class PlaceWork:
    """Drops the molecules of a field that another shows better, and puts the rest into cells."""

    fields: Fields
    cells: CellNumbers
    positions: np.ndarray
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> tuple[int, int]:
        """Numbers of molecules and of those in cells; they go to the files ``placed`` and ``counts``."""
        kept = np.load(self.fields.file("kept", fov))
        own = self._sightings(fov, kept)
        worse = seen_better_elsewhere(own, (self._sightings(other) for other in self.near[fov]))
        homes = {fov, *self.cells.homes([fov, *self.near[fov]])}
        known = pd.concat([read_cell_part(self.fields, "cells", home) for home in sorted(homes)], ignore_index=True)
        placed = np.empty(int((~worse).sum()), PLACED_DTYPE)
        placed["row"] = kept["row"][~worse]
        placed["cell"] = assign_cells(
            own.x[~worse], own.y[~worse], known["geometry"].to_numpy(), known["cell_id"].to_numpy()
        )
        np.save(self.fields.file("placed", fov), placed)
        np.save(self.fields.file("counts", fov), count_pairs(placed["cell"], kept["word"][~worse]))
        return len(placed), int((placed["cell"] >= 0).sum())

    def _sightings(self, fov: int, kept: np.ndarray | None = None) -> Sightings:
        kept = np.load(self.fields.file("kept", fov)) if kept is None else kept
        height, width = self.fields.shape
        x, y = kept["x"].astype(float), kept["y"].astype(float)
        edge = np.minimum.reduce([x, y, width - 1 - x, height - 1 - y])
        scale = self.fields.experiment.microns_per_pixel
        left, top = self.positions[fov]
        return Sightings(fov, kept["word"], left + x * scale, top + y * scale, edge)


def count_pairs(cell: np.ndarray, word: np.ndarray) -> np.ndarray:
    """How many molecules of each word each cell has, sorted: `COUNT_DTYPE`; cell -1 is none."""
    inside = cell >= 0
    pairs, count = np.unique(np.column_stack([cell[inside], word[inside]]), axis=0, return_counts=True)
    found = np.empty(len(pairs), COUNT_DTYPE)
    found["cell"], found["word"], found["count"] = pairs[:, 0], pairs[:, 1], count
    return found


# --- cells of a field on disk -------------------------------------------------------------------------------------


def write_cell_part(fields: Fields, name: str, fov: int, cells: pd.DataFrame) -> None:
    """Write cells for a later step."""
    geometry = pa.array(shapely.to_wkb(cells["geometry"].to_numpy(object)), pa.binary())
    table = pa.Table.from_pandas(cells.drop(columns="geometry"), preserve_index=False)
    pq.write_table(table.append_column("geometry", geometry), fields.file(name, fov).with_suffix(".parquet"))


def read_cell_part(fields: Fields, name: str, fov: int) -> pd.DataFrame:
    """What `write_cell_part` wrote."""
    table = pq.read_table(fields.file(name, fov).with_suffix(".parquet"))
    cells = table.drop_columns("geometry").to_pandas()
    geometry = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    return cells.assign(geometry=np.asarray(geometry, dtype=object))
