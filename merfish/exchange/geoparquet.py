"""GeoParquet 1.1: polygons in micrometres with other columns, without a coordinate reference system."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish._parquet import GEOMETRY
from merfish.errors import InputError


def column_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the columns of a Parquet table without reading its rows. Raises InputError for other files."""
    with _understood(path):
        return list(pq.read_schema(path).names)


def read_geoparquet(path: str | os.PathLike[str]) -> tuple[pa.Table, np.ndarray]:
    """Read a Parquet table with a WKB column: the table without that column, and geometries (row,) in the file's unit.

    The column is the one named in the GeoParquet metadata, else ``geometry`` or ``Geometry``. Raises InputError if
    there is none.
    """
    with _understood(path):
        table = pq.read_table(path)
    column = _geometry_column(table.schema)
    if column is None:
        raise InputError(f"{path}: expected a column geometry (WKB), got {', '.join(table.column_names)}")
    try:
        geometry = shapely.from_wkb(table[column].to_numpy(zero_copy_only=False))
    except (shapely.errors.GEOSException, TypeError) as error:
        raise InputError(f"{path}: column {column}: expected geometries as WKB: {error}") from error
    return table.drop_columns(column), np.asarray(geometry, dtype=object)


@contextmanager
def _understood(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from error


def _geometry_column(schema: pa.Schema) -> str | None:
    try:
        named = json.loads((schema.metadata or {})[b"geo"])["primary_column"]
    except (KeyError, TypeError, ValueError):
        named = None
    return next((name for name in (named, GEOMETRY, "Geometry") if name in schema.names), None)
