"""Parquet tables with a row group for each field, read without holding more than a few of them.

pyarrow's own iterators open a reader of every row group that they may come to, 60 kB each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1 << 18  # of a part, at most, unless a single row group has more


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """A small table, whole, on this thread: pyarrow's function of this name takes twice as long to begin."""
    with pq.ParquetFile(source) as file:
        return file.read(columns, use_threads=False)


def parts(source: Any, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield a table part by part, whole row groups; source: path or file."""
    with pq.ParquetFile(source) as file:
        sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        first, rows = 0, 0
        for k, size in enumerate([*sizes, ROWS + 1]):
            if rows and rows + size > ROWS:
                yield file.read_row_groups(list(range(first, k)), columns)
                first, rows = k, 0
            rows += size


def between(source: Any, columns: Sequence[str], name: str, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Rows whose places, columns name_x and name_y, lie between two corners (x, y), the second left out."""
    places = [f"{name}_{axis}" for axis in "xy"]
    wanted = list(dict.fromkeys([*columns, *places]))
    with pq.ParquetFile(source) as file:
        index = [file.metadata.schema.names.index(place) for place in places]
        groups = [k for k in range(file.num_row_groups) if _reaches(file.metadata.row_group(k), index, low, high)]
        table = file.read_row_groups(groups, wanted).to_pandas()
    inside = ((table[places] >= low) & (table[places] < high)).all(axis=1)
    return table.loc[inside, list(columns)].reset_index(drop=True)


def _reaches(group: pq.RowGroupMetaData, index: Sequence[int], low: np.ndarray, high: np.ndarray) -> bool:
    """Whether a row group may have places between two corners, by its statistics."""
    known = [group.column(k).statistics for k in index]
    return all(
        found is None or not found.has_min_max or (found.max >= a and found.min < b)
        for found, a, b in zip(known, low, high, strict=True)
    )
