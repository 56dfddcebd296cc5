"""Read the tables of a run in blocks of rows, for the writers of other formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from scipy.sparse import csr_matrix

from merfish import results
from merfish.errors import InputError

ROWS = 4096  # cells read at a time
PLANE_OUTLINES = "plane_outlines"  # column of the cells: WKB, a collection with one outline per plane


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path}: not a table written by a run: {error}") from error


def transcript_tables(run: Path) -> Iterator[pa.Table]:
    """Yield kept molecules by row group, columns `merfish.transcripts.COLUMNS`; one empty table if there are none."""
    path = run / results.TRANSCRIPTS
    with _whole(path):
        file = pq.ParquetFile(path)
    with file:
        yield file.schema_arrow.empty_table()
        for k in range(file.num_row_groups):
            with _whole(path):
                table = file.read_row_group(k)
            yield table


def cell_tables(run: Path) -> Iterator[pd.DataFrame]:
    """Yield blocks of cells with ``geometry`` (shapely, micrometres); one empty table if there are none.

    The column `PLANE_OUTLINES` is omitted.
    """
    for cells in _cell_tables(run):
        yield cells.drop(columns=PLANE_OUTLINES, errors="ignore")


def stacked_cell_tables(run: Path, n_planes: int) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Yield blocks of cells, and outlines (cell, plane): one for each plane, or the same one in all."""
    for cells in _cell_tables(run):
        outlines = np.repeat(cells["geometry"].to_numpy(object)[:, None], n_planes, axis=1)
        if PLANE_OUTLINES in cells and len(cells):
            with _whole(run / results.CELLS):
                stacks = np.asarray(shapely.from_wkb(cells[PLANE_OUTLINES].to_numpy(object)))
            outlines = shapely.get_geometry(stacks[:, None], np.arange(n_planes))
        yield cells.drop(columns=PLANE_OUTLINES, errors="ignore"), outlines


def _cell_tables(run: Path) -> Iterator[pd.DataFrame]:
    path = run / results.CELLS
    with _whole(path):
        file = pq.ParquetFile(path)
    with file:
        for batch in chain([file.schema_arrow.empty_table()], file.iter_batches(ROWS)):
            with _whole(path):
                geometry = shapely.from_wkb(batch.column("geometry").to_numpy(zero_copy_only=False))
            names = [name for name in batch.schema.names if name != "geometry"]
            yield batch.select(names).to_pandas().assign(geometry=np.asarray(geometry, dtype=object))


def read_var(run: Path) -> pd.DataFrame:
    """Read ``var`` of the count table of a run."""
    from anndata.io import read_elem

    path = run / results.CELL_BY_GENE
    with _whole(path), h5py.File(path) as file:
        return read_elem(file["var"])


def count_blocks(run: Path) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    """Yield names of cells and counts as CSR (cell, word) in blocks, in the order of ``cells.parquet``."""
    path = run / results.CELL_BY_GENE
    with _whole(path), h5py.File(path) as file:
        matrix, n_words = file["X"], int(file["X"].attrs["shape"][1])
        begin = matrix["indptr"][:]
        names = file["obs"][file["obs"].attrs["_index"]]
        for first in range(0, len(begin) - 1, ROWS):
            at = begin[first : first + ROWS + 1]
            parts = (matrix["data"][at[0] : at[-1]], matrix["indices"][at[0] : at[-1]], at - at[0])
            yield names[first : first + ROWS].astype(str), csr_matrix(parts, shape=(len(at) - 1, n_words))


def write_dense(path: Path, index: str, names: pd.Index, blocks: Iterator[tuple[np.ndarray, csr_matrix]]) -> None:
    """Write counts as CSV: one row per cell, with its name in the column ``index``, and one column per word."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        pd.DataFrame(columns=names).to_csv(file, index_label=index)
        for cells, block in blocks:
            pd.DataFrame(block.toarray(), index=cells).to_csv(file, header=False)


def write_tables(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write tables with the same columns to one CSV file."""
    import pyarrow.csv as pv

    first = next(tables)
    with pv.CSVWriter(path, first.schema) as file:
        for table in tables:
            file.write_table(table)
