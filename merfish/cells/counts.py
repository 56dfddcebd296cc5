"""Assign molecules to cells and count them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish._files import whole_file
from merfish._parquet import geo_schema
from merfish.codebook import Codebook
from merfish.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

OUTSIDE = -1
NO_CELL = np.iinfo(np.int64).max  # larger than any cell_id
MOST_SQUARES = 1 << 15  # most squares along each side of a grid


def assign_cells(x: np.ndarray, y: np.ndarray, polygons: np.ndarray, cell_ids: np.ndarray) -> np.ndarray:
    """Find the cell that contains each molecule.

    x, y (molecule,) and polygons (cell,) of shapely geometries in the same unit; cell_ids (cell,) integers. Returns
    int64 (molecule,), -1 outside every cell. Cells include their borders; where they overlap or touch, the molecule
    is assigned to the smallest cell_id, in any order of the cells. Molecules at NaN are outside.

    Raises InputError if lengths differ, or a cell_id is negative or not unique.
    """
    polygons, cell_ids = np.asarray(polygons, dtype=object), np.asarray(cell_ids, dtype=np.int64)
    if len(polygons) != len(cell_ids):
        raise InputError(f"{len(polygons)} polygons, but {len(cell_ids)} cell ids")
    if len(np.unique(cell_ids)) != len(cell_ids) or (cell_ids < 0).any():
        raise InputError("cell ids must be unique and non-negative")
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    molecule, row = _in_boxes(x, y, shapely.bounds(polygons).reshape(-1, 4))
    shapely.prepare(polygons)
    inside = shapely.intersects_xy(polygons[row], x[molecule], y[molecule])
    shapely.destroy_prepared(polygons)  # a kilobyte or more each
    cell = np.full(len(x), NO_CELL, dtype=np.int64)
    np.minimum.at(cell, molecule[inside], cell_ids[row[inside]])
    cell[cell == NO_CELL] = OUTSIDE
    return cell


def _in_boxes(x: np.ndarray, y: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs (pair,), (pair,) of a molecule and a box (box, 4), x, y, x, y, that contains it, borders included.

    Molecules are sorted by the squares of a grid, row by row, so that the molecules in a box form one contiguous range
    per row of the grid. Boxes of NaN contain nothing.
    """
    box = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    if not len(box):
        return box, box
    low, high = boxes[box, :2].min(axis=0), boxes[box, 2:].max(axis=0)
    molecule = np.flatnonzero((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))
    sides = boxes[box, 2:] - boxes[box, :2]
    side = max(float(np.median(sides)), float((high - low).max()) / MOST_SQUARES) or 1.0

    def square(places: np.ndarray, axis: int) -> np.ndarray:
        return np.floor((places - low[axis]) / side).astype(np.int64)

    width = square(high[:1], 0)[0] + 1
    number = square(y[molecule], 1) * width + square(x[molecule], 0)
    order = np.argsort(number, kind="stable")
    molecule, number = molecule[order], number[order]
    left, bottom, right, top = (square(boxes[box, k], k % 2) for k in range(4))
    of, line = ranges(bottom, top + 1)
    begin = np.searchsorted(number, line * width + left[of])
    run, k = ranges(begin, np.searchsorted(number, line * width + right[of], side="right"))
    molecule, box = molecule[k], box[of[run]]
    inside = (x[molecule] >= boxes[box, 0]) & (x[molecule] <= boxes[box, 2])
    inside &= (y[molecule] >= boxes[box, 1]) & (y[molecule] <= boxes[box, 3])
    return molecule[inside], box[inside]


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Enumerate the integers from each begin (range,) to its end (exclusive): index of the range, and integer.

    >>> ranges(np.array([3, 7]), np.array([5, 8]))
    (array([0, 0, 1]), array([3, 4, 7]))
    """
    count = end - begin
    of = np.repeat(np.arange(len(count)), count)
    return of, np.arange(len(of)) + np.repeat(begin - (np.cumsum(count) - count), count)


def count_table(transcripts: pd.DataFrame, cells: pd.DataFrame, codebook: Codebook) -> AnnData:
    """Count the molecules of each word in each cell.

    transcripts: barcode_id and cell_id, one row per molecule, -1 outside cells. cells: cell_id, center_x, center_y
    (micrometres) and any other columns; all but the geometry are copied to ``obs``.

    Returns an AnnData with X (cell, word) CSR int32, with a row for every cell, including those without molecules;
    ``obs`` indexed by cell_id as text, with n_transcripts; ``var`` indexed by gene, with is_blank;
    ``obsm["spatial"]`` (cell, 2) in micrometres.

    Raises InputError for a cell_id that is not in ``cells``, or a barcode_id that is not in the codebook.
    """
    from anndata import AnnData
    from scipy.sparse import coo_array, csr_matrix

    inside = transcripts["cell_id"].to_numpy() != OUTSIDE
    cell_id = transcripts["cell_id"].to_numpy()[inside]
    word = transcripts["barcode_id"].to_numpy()[inside]
    ids = pd.Index(cells["cell_id"].to_numpy(np.int64))
    if not ids.is_unique:
        raise InputError(f"cells: cell_id {ids[ids.duplicated()][0]} appears twice")
    row = ids.get_indexer(cell_id)
    if (row < 0).any():
        raise InputError(f"transcripts: cell_id {cell_id[row < 0][0]} is not among the {len(cells)} cells")
    if len(word) and not (word.min() >= 0 and word.max() < codebook.n_words):
        wrong = word[(word < 0) | (word >= codebook.n_words)][0]
        raise InputError(f"transcripts: barcode_id {wrong} is not in a codebook of {codebook.n_words}")
    ones = np.ones(len(word), np.int32)
    counts = csr_matrix(coo_array((ones, (row, word)), shape=(len(cells), codebook.n_words)))
    described = cells.drop(columns=["geometry", "n_transcripts"], errors="ignore")
    described = described.assign(n_transcripts=np.asarray(counts.sum(axis=1), np.int64).ravel())
    spatial = cells[["center_x", "center_y"]].to_numpy(np.float64)
    return AnnData(X=counts, obs=cell_obs(described), var=word_var(codebook), obsm={"spatial": spatial})


def cell_obs(cells: pd.DataFrame) -> pd.DataFrame:
    """Return cells without their geometry as ``obs`` of a count table, indexed by cell_id as text."""
    return cells.set_index(pd.Index(cells["cell_id"].to_numpy(np.int64).astype(str), name=None))


def word_var(codebook: Codebook) -> pd.DataFrame:
    """Return the words of a codebook as ``var`` of a count table."""
    return pd.DataFrame({"is_blank": codebook.is_blank}, index=pd.Index(codebook.names, name="gene"))


def write_cells(cells: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table of cells as GeoParquet with ``geometry`` (shapely, micrometres) as WKB, atomically."""
    wkb = shapely.to_wkb(np.asarray(cells["geometry"], dtype=object))
    table = pa.Table.from_pandas(cells.assign(geometry=wkb), preserve_index=False)
    with whole_file(path) as part:
        pq.write_table(table.replace_schema_metadata(geo_schema(table.schema).metadata), part)


def read_cells(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read what `write_cells` wrote, with ``geometry`` as shapely geometries.

    Raises InputError if the file cannot be read, or has no cell_id or geometry.
    """
    try:
        table = pd.read_parquet(path)
        table["geometry"] = shapely.from_wkb(table["geometry"].to_numpy())
    except KeyError as error:
        raise InputError(f"{path}: expected a column geometry (WKB, micrometres)") from error
    except (OSError, ValueError, TypeError, shapely.errors.GEOSException) as error:
        raise InputError(f"{path}: cannot be read as a table of cells: {error}") from error
    if "cell_id" not in table:
        raise InputError(f"{path}: expected a column cell_id, got {', '.join(map(str, table.columns))}")
    return table
