"""Parquet tables of many fields, written and read with only a few row groups in memory; GeoParquet.

pyarrow's metadata of a row group need about 1 kB per column, in readers and writers, so fields with few rows share a
row group; its own iterators open a reader for each row group in advance, 60 kB each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

GEOMETRY = "geometry"
ROWS = 1 << 18  # minimum number of rows of a row group
PART = 1 << 16  # maximum number of rows of a part, unless a single row group has more


class GroupWriter:
    """Write tables, one per field, in row groups of whole fields with at least ``rows`` rows."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int = ROWS) -> None:
        self._file, self._rows = pq.ParquetWriter(path, schema), rows
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._flush()
        self._file.close()

    def write(self, table: pa.Table) -> None:
        """Write the table of a field, or keep it until there are enough rows."""
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= self._rows:
            self._flush()

    def _flush(self) -> None:
        if any(map(len, self._waiting)):
            group = pa.concat_tables(self._waiting)
            self._file.write_table(group, row_group_size=len(group))
        self._waiting = []


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a small table on this thread; pyarrow's function of this name takes twice as long to start."""
    with pq.ParquetFile(source) as file:
        return file.read(columns, use_threads=False)


def parts(source: Any, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield a table in parts of whole row groups; source: path or file."""
    with pq.ParquetFile(source) as file:
        sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        first, rows = 0, 0
        for k, size in enumerate([*sizes, PART + 1]):
            if rows and rows + size > PART:
                yield file.read_row_groups(list(range(first, k)), columns)
                first, rows = k, 0
            rows += size


def between(source: Any, columns: Sequence[str], name: str, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Rows whose positions, columns name_x and name_y, lie between two corners (x, y), the second one exclusive."""
    places = [f"{name}_{axis}" for axis in "xy"]
    wanted = list(dict.fromkeys([*columns, *places]))
    with pq.ParquetFile(source) as file:
        index = [file.metadata.schema.names.index(place) for place in places]
        found = [file.schema_arrow.empty_table().select(wanted)]
        for k in range(file.num_row_groups):
            if _reaches(file.metadata.row_group(k), index, low, high):
                group = file.read_row_group(k, wanted)
                x, y = (group[place].to_numpy() for place in places)
                found.append(group.filter((x >= low[0]) & (y >= low[1]) & (x < high[0]) & (y < high[1])))
    return pa.concat_tables(found).select(list(columns)).to_pandas()


def _reaches(group: pq.RowGroupMetaData, index: Sequence[int], low: np.ndarray, high: np.ndarray) -> bool:
    """Whether a row group may have positions between two corners, by its statistics."""
    known = [group.column(k).statistics for k in index]
    return all(
        found is None or not found.has_min_max or (found.max >= a and found.min < b)
        for found, a, b in zip(known, low, high, strict=True)
    )


def geo_schema(schema: pa.Schema, column: str = GEOMETRY) -> pa.Schema:
    """Add the GeoParquet metadata that mark ``column`` (WKB) as the geometry."""
    described = {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"], "crs": None, "edges": "planar"}
    geo = {"version": "1.1.0", "primary_column": column, "columns": {column: described}}
    return schema.with_metadata({**(schema.metadata or {}), b"geo": json.dumps(geo).encode()})
