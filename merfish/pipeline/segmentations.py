"""Cells from another program: find their files, and read the cells of each field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from scipy.spatial import KDTree

from merfish import results
from merfish._text import listed
from merfish.calls.overlap import FIELD_RADIUS
from merfish.cells.merging import DEPTH, NO_LINKS, number_cells
from merfish.cells.stacks import footprints, planes, thickness
from merfish.errors import InputError
from merfish.exchange.labels import LABEL_SUFFIXES, read_label_outlines
from merfish.exchange.outlines import POLYGON_SUFFIXES, count_planes, is_label_image, read_outlines
from merfish.exchange.run import PLANE_OUTLINES
from merfish.imaging.images import fingerprint
from merfish.pipeline.assemble import MergeWork, TrimWork, write_cell_part
from merfish.pipeline.cluster import Failure, RunMap, StepError
from merfish.pipeline.fields import OUTLINES, write_outlines
from merfish.pipeline.folder import digest
from merfish.pipeline.progress import Display
from merfish.pipeline.reconcile import Fields, SameCellsWork, map_all
from merfish.pipeline.tables import CELL_SCHEMA

TRANSFORM = "micron_to_mosaic_pixel_transform.csv"
_MERSCOPE = "cell_boundaries.parquet"
_CELLPOSE = ("_cp_masks.tif", "_seg.npy")  # suffixes of Cellpose's output, the simpler format first


@dataclass(frozen=True)
class Segmentation:
    """Files of cells: one for the whole section, in micrometres, or one for each field, in pixels.

    files: by field; empty if ``path`` is the file.
    """

    path: Path
    files: Mapping[int, Path]

    def digest(self) -> str:
        """Return the digest of the contents."""
        paths = self.files or {-1: self.path}
        return digest({fov: fingerprint(path, whole=True)[1].hex() for fov, path in paths.items()})

    def planes(self, heights: Sequence[float]) -> np.ndarray | None:
        """Return the heights of the planes if all files have outlines in each of them, else None.

        heights: of the planes of the run, in micrometres.
        """
        paths = [*self.files.values()] or [self.path]
        stacked = len(heights) > 1 and all(count_planes(path) == len(heights) for path in paths)
        return np.array(heights) if stacked else None


def find_segmentation(path: Path, fovs: Sequence[int]) -> Segmentation:
    """Find the files of a segmentation. Raises InputError if there is none, or none for some of the fields.

    A folder contains one file per field, identified by the number after ``fov`` or else by the last number in its name;
    or it is a folder of MERSCOPE with ``cell_boundaries.parquet``. If any file was written by Cellpose, the others are
    taken for its input images and ignored.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a segmentation")
    if path.is_file() or path.suffix.lower() == ".zarr":
        is_label_image(path)
        return Segmentation(path, {})
    if (path / _MERSCOPE).is_file():
        return Segmentation(path / _MERSCOPE, {})
    there, files = sorted(path.iterdir()), dict[int, Path]()
    cellpose = ([file for file in there if file.name.endswith(ending)] for ending in _CELLPOSE)
    for file in next(filter(None, cellpose), there):
        fov = _field_of(file.name)
        if fov is None:
            continue
        other = files.setdefault(fov, file)
        if other != file:
            raise InputError(f"{other} and {file.name} both contain cells of field {fov}")
    missing = [str(fov) for fov in fovs if fov not in files]
    if missing:
        kinds = ", ".join((*LABEL_SUFFIXES, *POLYGON_SUFFIXES))
        raise InputError(
            f"{path}: no file for field {listed(missing, ', ')}; expected one file per field, with the field number "
            f"in its name, such as cells_{missing[0]}.tif ({kinds}), or a file with the cells of the whole section"
        )
    return Segmentation(path, {fov: files[fov] for fov in fovs})


def _field_of(name: str) -> int | None:
    """Return the field of a segmentation file, None if its name has no field number.

    >>> _field_of("cells_fov_007_z3.tif"), _field_of("scan2_image_012_cp_masks.tif"), _field_of("notes3.txt")
    (7, 12, None)
    """
    stem, _, suffix = name.lower().removesuffix(".gz").rpartition(".")
    if f".{suffix}" not in (*LABEL_SUFFIXES, *POLYGON_SUFFIXES):
        return None
    found = re.search(r"fov[^0-9]{0,2}([0-9]{1,9})", stem) or re.search(r"([0-9]{1,9})[^0-9]*$", stem)
    return int(found[1]) if found else None


def slice_depth(planes: Sequence[float]) -> float:
    """Return the depth of cells of which only the outlines are known: that of the imaged volume, in micrometres.

    >>> slice_depth([0.0]), slice_depth([0.0, 1.5, 3.0])
    (1.0, 4.5)
    """
    return DEPTH if len(planes) == 1 else float(np.gradient(np.asarray(planes, float)).sum())


def part_by_field(fields: Fields, cells: Segmentation, depth: float, run_map: RunMap, shown: Display) -> pa.Schema:
    """Write the cells of each field as file ``cells`` of the work folder; returns the schema of the table of cells.

    depth: of every cell, in micrometres.
    """
    schema = CELL_SCHEMA if fields.planes is None else CELL_SCHEMA.append(pa.field(PLANE_OUTLINES, pa.binary()))
    if cells.files:
        _join_fields(fields, cells, depth, run_map, shown)
        return schema
    table = section_cells(fields, cells.path, depth)
    named = "name" in table
    frames = fields.experiment.positions[list(fields.fovs)] + np.array(fields.size) / 2
    home = KDTree(frames).query(table[["center_x", "center_y"]].to_numpy())[1] if len(table) else np.empty(0, int)
    table["fov"] = np.array(fields.fovs, np.int32)[home]
    by_home = table.groupby("fov")
    for fov in fields.fovs:
        write_cell_part(fields, "cells", fov, by_home.get_group(fov) if fov in by_home.groups else table[:0])
    return schema.append(pa.field("name", pa.string())) if named else schema


def section_cells(fields: Fields, path: Path, depth: float) -> pd.DataFrame:
    """Return the cells of a whole section by cell_id, with their centres and areas, in micrometres.

    Raises InputError if none of them overlaps the fields.
    """
    if is_label_image(path):
        shape, found, outlines = read_label_outlines(path, stacked=fields.planes is not None)
        outlines = _in_micrometre(fields, path, shape, outlines)
        table = pd.DataFrame({"cell_id": found})
    else:
        table = read_outlines(path, stacked=fields.planes is not None)
        outlines = table.pop("geometry").to_numpy(object)
    scale = fields.experiment.microns_per_pixel
    low = fields.experiment.positions[list(fields.fovs)].min(axis=0) - scale / 2
    high = fields.experiment.positions[list(fields.fovs)].max(axis=0) + np.array(fields.size)
    if len(outlines):
        span = shapely.total_bounds(outlines)
        if (span[:2] > high).any() or (span[2:] < low).any():
            raise InputError(
                f"{path}: its cells span x {span[0]:.0f} to {span[2]:.0f}, y {span[1]:.0f} to {span[3]:.0f}, but the "
                f"fields of the run span x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}; expected "
                "micrometres in the frame of the stage"
            )
    geometry = footprints(outlines)
    area = shapely.area(geometry)
    center = shapely.get_coordinates(shapely.centroid(geometry)).reshape(-1, 2)
    table = table.assign(center_x=center[:, 0], center_y=center[:, 1], area=area, geometry=geometry)
    if fields.planes is None:
        return table.assign(volume=area * depth)
    volume = (shapely.area(planes(outlines)) * thickness(fields.planes)).sum(axis=1) if len(table) else 0.0
    return table.assign(volume=volume, **{PLANE_OUTLINES: shapely.to_wkb(outlines)})


def _in_micrometre(fields: Fields, path: Path, shape: tuple[int, ...], outlines: np.ndarray) -> np.ndarray:
    """Transform outlines of a label image of the section to micrometres; a single field needs no transform file."""
    beside = path.parent / TRANSFORM
    if beside.is_file():
        try:
            matrix = np.linalg.inv(np.loadtxt(beside).reshape(3, 3))
        except (ValueError, np.linalg.LinAlgError) as error:
            raise InputError(f"{beside}: expected 3 x 3 numbers, micrometres to pixels: {error}") from error
    elif len(fields.fovs) == 1 and shape[-2:] == tuple(fields.shape):
        scale, (x, y) = fields.experiment.microns_per_pixel, fields.experiment.positions[fields.fovs[0]]
        matrix = np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]])
    else:
        raise InputError(
            f"{path}: a label image of a whole section needs {TRANSFORM} beside it (3 x 3, micrometres to pixels); "
            "for labels of single fields, give a folder with one file per field"
        )
    moved = shapely.transform(outlines, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])
    return np.asarray(moved, dtype=object)


def _join_fields(fields: Fields, cells: Segmentation, depth: float, run_map: RunMap, shown: Display) -> None:
    """Read cells from files of single fields, and merge those seen in several fields."""
    positions = fields.experiment.positions
    for fov, n in _each(ReadWork(fields, cells.files, depth), fields.fovs, run_map):
        fields.outlines[fov] = n
    overlapping = fields.near(positions, 0.0)
    pairs = map_all("match cells", SameCellsWork(fields, positions, overlapping), fields.fovs, run_map, shown)
    numbers = number_cells(fields.outlines, np.concatenate([NO_LINKS, *(pairs[fov] for fov in fields.fovs)]))
    map_all("merge cells", MergeWork(fields, numbers, positions), fields.fovs, run_map, shown)
    near = fields.near(positions, FIELD_RADIUS)
    map_all("trim overlaps", TrimWork(fields, numbers, near), fields.fovs, run_map, shown)


def _each(work: Any, fovs: Sequence[int], run_map: RunMap) -> list[tuple[int, Any]]:
    """Return the results of a map in which a failure means a faulty input file."""
    found = []
    for fov, outcome in run_map(work, fovs):
        if isinstance(outcome, Failure):
            if outcome.traceback:
                raise StepError(f"field {fov}: {outcome.reason}", outcome)
            raise InputError(outcome.reason)
        found.append((fov, outcome))
    return found


@dataclass(frozen=True, eq=False)
class ReadWork:
    """Reads the cells of a field from its file; depth: of each cell, in micrometres."""

    fields: Fields
    files: Mapping[int, Path]
    depth: float

    def __call__(self, fov: int) -> int:
        """Write the cells to the field's file of outlines, and return their number."""
        path = self.files[fov]
        height, width = self.fields.shape
        if is_label_image(path):
            shape, _, outlines = read_label_outlines(path, stacked=self.fields.planes is not None)
            if shape[-2:] != (height, width):
                raise InputError(f"{path}: labels have {shape[-1]} x {shape[-2]} px, fields have {width} x {height}")
        else:
            outlines = read_outlines(path, stacked=self.fields.planes is not None)["geometry"].to_numpy(object)
        if len(outlines):
            left, low, right, high = shapely.total_bounds(outlines)
            if min(left, low) < -width or right > 2 * width or high > 2 * height:
                raise InputError(
                    f"{path}: its cells span x {left:.0f} to {right:.0f}, y {low:.0f} to {high:.0f}; expected pixels "
                    f"of field {fov}, {width} x {height}"
                )
        place = results.field_folder(self.fields.out, fov)
        place.mkdir(parents=True)
        measured = pd.DataFrame({"depth": np.full(len(outlines), self.depth)})
        write_outlines(list(outlines), place / OUTLINES, measured)
        return len(outlines)
