"""GeoParquet 1.1: polygons in micrometre with other columns; there is no coordinate reference system."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish.errors import InputError

GEOMETRY = "geometry"


def geo_schema(schema: pa.Schema, column: str = GEOMETRY) -> pa.Schema:
    """Add the metadata by which readers of GeoParquet recognise ``column`` (WKB) as the geometry."""
    described = {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"], "crs": None, "edges": "planar"}
    geo = {"version": "1.1.0", "primary_column": column, "columns": {column: described}}
    return schema.with_metadata({**(schema.metadata or {}), b"geo": json.dumps(geo).encode()})


def read_geoparquet(path: str | os.PathLike[str]) -> tuple[pa.Table, np.ndarray]:
    """Read a Parquet table with a WKB column: the table without that column, and geometries (row,) in the file's unit.

    The column is the one named in the GeoParquet metadata, else ``geometry`` or ``Geometry``. Raises InputError if
    there is none.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from error
    column = _geometry_column(table.schema)
    if column is None:
        raise InputError(f"{path}: expected a column geometry (WKB), got {', '.join(table.column_names)}")
    try:
        geometry = shapely.from_wkb(table[column].to_numpy(zero_copy_only=False))
    except (shapely.errors.GEOSException, TypeError) as error:
        raise InputError(f"{path}: column {column}: expected geometries as WKB: {error}") from error
    return table.drop_columns(column), np.asarray(geometry, dtype=object)


def _geometry_column(schema: pa.Schema) -> str | None:
    try:
        named = json.loads((schema.metadata or {})[b"geo"])["primary_column"]
    except (KeyError, TypeError, ValueError):
        named = None
    return next((name for name in (named, GEOMETRY, "Geometry") if name in schema.names), None)
