"""Read outlines of cells from the files of other segmentation programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shapely

from merfish._text import shown
from merfish.cells.stacks import stack
from merfish.errors import InputError
from merfish.exchange.geojson import NAMES, read_geojson
from merfish.exchange.geoparquet import column_names, read_geoparquet
from merfish.exchange.labels import LABEL_SUFFIXES, count_label_planes, read_label_outlines

PLANE = "ZIndex"  # column of MERSCOPE's outline files
POLYGON_SUFFIXES = (".geojson", ".json", ".parquet")
_POLYGON = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)


def is_label_image(path: Path) -> bool:
    """Return whether a file contains labels, not polygons, by its suffix. Raises InputError for other suffixes."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in (*LABEL_SUFFIXES, *POLYGON_SUFFIXES):
        expected = ", ".join((*LABEL_SUFFIXES, *POLYGON_SUFFIXES))
        raise InputError(f"{path}: unknown segmentation format; expected one of {expected}")
    return suffix in LABEL_SUFFIXES


def count_planes(path: Path) -> int:
    """Return the number of planes in which the cells of a segmentation have separate outlines; 1 for one outline each.

    These are the planes of a label image, or those of the column ``ZIndex`` (MERSCOPE) if the outlines of any cell
    differ.
    """
    if is_label_image(path):
        return count_label_planes(path)
    if path.suffix != ".parquet" or PLANE not in column_names(path):
        return 1
    names, geometry, plane = _read_parquet(path)
    outlines = pd.Series(shapely.to_wkb(geometry), dtype=object).groupby(np.array(names, dtype=object))
    return int(plane.max(initial=0)) + 1 if (outlines.nunique() > 1).any() else 1


def read_outlines(path: str | os.PathLike[str], *, stacked: bool = False) -> pd.DataFrame:
    """Read the cells of a segmentation: cell_id int64 ascending, name (only if names are not numbers), and geometry.

    Label images are in pixels (see `merfish.exchange.labels.label_outlines`); GeoJSON (Baysor, proseg, QuPath, QGIS)
    and GeoParquet (MERSCOPE, SpatialData) are in the unit of the file. Several outlines of a cell are united or, if
    ``stacked``, kept by plane (see `merfish.cells.stacks`). Raises InputError naming file and cell.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a segmentation")
    if is_label_image(path):
        _, labels, geometry = read_label_outlines(path, stacked=stacked)
        return pd.DataFrame({"cell_id": labels, "geometry": geometry})
    if path.suffix != ".parquet":
        names, geometry = read_geojson(path)
        return numbered(*_one_each(names, _polygons(path, names, geometry)))
    names, geometry, plane = _read_parquet(path)
    geometry = _polygons(path, names, geometry)
    return numbered(*(_stacked(names, plane, geometry) if stacked else _one_each(names, geometry)))


def _read_parquet(path: Path) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Return names, polygons and planes of the outlines: planes from MERSCOPE's column, else 0."""
    table, geometry = read_geoparquet(path)
    column = next((name for name in (*NAMES, "__index_level_0__") if name in table.column_names), None)
    there = ~shapely.is_missing(geometry)
    names = [None] * len(geometry) if column is None else table[column].to_pylist()
    plane = table[PLANE].to_numpy() if PLANE in table.column_names else np.zeros(len(geometry), np.int64)
    if plane.dtype.kind not in "iu" or plane.min(initial=0) < 0:
        raise InputError(f"{path}: column {PLANE}: expected non-negative integers")
    return [name for name, kept in zip(names, there, strict=True) if kept], geometry[there], plane[there]


def _polygons(path: Path, names: Sequence[Any], geometry: np.ndarray) -> np.ndarray:
    """Return valid polygons. Raises InputError for other geometries."""
    wrong = np.flatnonzero(~np.isin(shapely.get_type_id(geometry), _POLYGON))
    if len(wrong):
        kind = geometry[wrong[0]].geom_type
        raise InputError(f"{path}: cell {shown(names[wrong[0]])}, row {wrong[0] + 1}: expected a polygon, got a {kind}")
    infinite = np.flatnonzero(~np.isfinite(shapely.bounds(geometry)).all(axis=1) & ~shapely.is_empty(geometry))
    if len(infinite):
        raise InputError(f"{path}: cell {shown(names[infinite[0]])}: its coordinates are not finite")
    broken = np.flatnonzero(~shapely.is_valid(geometry))
    for k, mended in zip(broken, shapely.make_valid(geometry[broken]), strict=True):
        parts = shapely.get_parts(mended)
        geometry[k] = shapely.union_all(parts[np.isin(shapely.get_type_id(parts), _POLYGON)])
    return geometry


def _one_each(names: Sequence[Any], geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unite the outlines that share a name; each outline without a name is a cell."""
    keys = np.array([str(name) for name in names], dtype=object)
    unnamed = np.array([name is None for name in names], bool)
    keys[unnamed] = np.char.add("unnamed ", np.flatnonzero(unnamed).astype(str))
    code, found = pd.factorize(keys)
    if len(found) == len(keys):
        return keys if not unnamed.all() else np.arange(1, len(keys) + 1), geometry
    order = np.argsort(code, kind="stable")
    bounds = np.append(np.flatnonzero(np.diff(code[order], prepend=-1)), len(order))
    joined = [shapely.union_all(geometry[order[a:b]]) for a, b in pairwise(bounds)]
    return np.asarray(found, dtype=object), np.array(joined, dtype=object)


def _stacked(names: Sequence[Any], plane: np.ndarray, geometry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unite outlines as `_one_each` does, but in each plane; plane: index of the plane of each outline."""
    n_planes = int(plane.max(initial=0)) + 1
    code, found = pd.factorize(np.array([str(name) for name in names], dtype=object))
    place, joined = _one_each((code * n_planes + plane).tolist(), geometry)
    outlines = np.full((len(found), n_planes), shapely.Polygon(), dtype=object)
    outlines.flat[place.astype(np.int64)] = joined
    return np.asarray(found, dtype=object), stack(outlines)


def numbered(names: np.ndarray, geometry: np.ndarray) -> pd.DataFrame:
    """Return the non-empty cells by cell_id: their names if all are positive integers, else numbers in order."""
    filled = ~shapely.is_empty(geometry)
    names, geometry = np.asarray(names)[filled], geometry[filled]
    text = pd.Series(names, dtype=object).astype(str)
    if text.str.fullmatch(r"[1-9][0-9]{0,17}").all():
        table = pd.DataFrame({"cell_id": text.astype(np.int64).to_numpy(), "geometry": geometry})
        return table.sort_values("cell_id", ignore_index=True)
    return pd.DataFrame({"cell_id": np.arange(1, len(text) + 1), "name": text.to_numpy(), "geometry": geometry})
