"""Writing the tables of a run one field after the other: a row group, or some rows of counts, each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from scipy.sparse import coo_array, csr_matrix

from merfish import results
from merfish.calls.overlap import FIELD_RADIUS
from merfish.cells.counts import cell_obs, word_var
from merfish.codebook import Codebook
from merfish.pipeline.assemble import COUNT_DTYPE, read_cell_part
from merfish.pipeline.fields import read_calls
from merfish.pipeline.progress import Display
from merfish.pipeline.reconcile import Fields, Reconciled, rate_field
from merfish.transcripts import transcript_table

CELL_SCHEMA = pa.schema(
    [
        ("cell_id", pa.int64()),
        ("fov", pa.int32()),
        ("center_x", pa.float64()),
        ("center_y", pa.float64()),
        ("area", pa.float64()),
        ("volume", pa.float64()),
        ("geometry", pa.binary()),
        ("n_transcripts", pa.int64()),
    ]
)
_NO_OBS = CELL_SCHEMA.empty_table().drop_columns("geometry").to_pandas()


@dataclass(frozen=True)
class Written:
    """Numbers of what stands in the tables; transcripts_per_cell: median."""

    n_molecules: int
    n_in_cells: int
    n_cells: int
    transcripts_per_cell: float


def write_tables(fields: Fields, found: Reconciled, words: pd.DataFrame, stage: Path, display: Display) -> Written:
    """Write transcripts, cells and counts into ``stage``.

    words: statistics of each word, as `merfish.calls.error_model.word_statistics` gives them. Raises OSError if the
    disk is full.
    """
    with display.step("write tables"):
        per_cell = write_counts(fields, found, words, stage, display)
        n_molecules, n_in_cells = write_transcripts(fields, found, stage, display)
    return Written(n_molecules, n_in_cells, len(per_cell), float(np.median(per_cell)) if len(per_cell) else 0.0)


def write_counts(fields: Fields, found: Reconciled, words: pd.DataFrame, stage: Path, display: Display) -> np.ndarray:
    """Write ``cell_by_gene.h5ad`` and ``cells.parquet``; returns the number of molecules of each cell."""
    book = fields.experiment.codebook
    contributors = _contributors(fields, found)
    reserve(stage, _most_bytes(fields, found))
    obs = [_NO_OBS]
    with (
        pq.ParquetWriter(stage / results.CELLS, CELL_SCHEMA) as cell_file,
        CountFile(stage / results.CELL_BY_GENE, book, words) as counts,
    ):
        for fov in display.track(fields.fovs, len(fields.fovs), "write counts"):
            cells = read_cell_part(fields, "cells", fov)
            block = count_block(fields, contributors[fov], cells["cell_id"].to_numpy(), book.n_words)
            cells = cells.assign(n_transcripts=np.asarray(block.sum(axis=1), np.int64).ravel())
            counts.append(block)
            cell_file.write_table(cells_table(cells))
            obs.append(cells.drop(columns="geometry"))
        table = pd.concat(obs, ignore_index=True)
        counts.finish(table)
    return table["n_transcripts"].to_numpy()


def write_transcripts(fields: Fields, found: Reconciled, stage: Path, display: Display) -> tuple[int, int]:
    """Write both tables of transcripts; returns the numbers of molecules kept and of those in cells."""
    schema = transcript_schema(fields.experiment.codebook)
    n_molecules = n_in_cells = first_id = 0
    with (
        pq.ParquetWriter(stage / results.ALL_TRANSCRIPTS, schema) as every,
        pq.ParquetWriter(stage / results.TRANSCRIPTS, schema) as kept,
    ):
        for fov in display.track(fields.fovs, len(fields.fovs), "write calls"):
            calls, placed = field_transcripts(fields, found, fov, first_id)
            first_id += len(calls)
            every.write_table(pa.Table.from_pandas(calls, schema, preserve_index=False))
            kept.write_table(pa.Table.from_pandas(placed, schema, preserve_index=False))
            n_molecules += len(placed)
            n_in_cells += int((placed["cell_id"] >= 0).sum())
    return n_molecules, n_in_cells


def reserve(folder: Path, n_bytes: int) -> None:
    """Raise OSError unless so much can be written: HDF5 crashes the process when the disk is full."""
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, n_bytes)


def _most_bytes(fields: Fields, found: Reconciled) -> int:
    """More than counts and cells take: their parts on disk, a line of ``obs`` a cell, and what an empty file takes."""
    names = (fields.file("counts", fov) for fov in fields.fovs)
    cells = (fields.file("cells", fov).with_suffix(".parquet") for fov in fields.fovs)
    parts = sum(path.stat().st_size for path in (*names, *cells))
    return parts + 300 * len(found.cells.home) + (1 << 17)


def transcript_schema(book: Codebook) -> pa.Schema:
    """Columns and types of transcript tables, with what pandas needs to give them back."""
    none = np.empty(0, np.int32)
    empty = transcript_table(book, none, x=none, y=none, hamming_distance=none, intensity=none)
    return pa.Schema.from_pandas(empty, preserve_index=False)


def field_transcripts(fields: Fields, found: Reconciled, fov: int, first_id: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Transcript tables of a field: every call, rated, and those that are kept, each once, with their cells."""
    experiment = fields.experiment
    calls = read_calls(fields.out, fov)
    x, y = found.stitching.positions[fov]
    columns = {name: calls[name].to_numpy() for name in calls.columns}
    columns["probability"] = rate_field(calls, found.filter)[0]
    columns["transcript_id"] = np.arange(first_id, first_id + len(calls))
    columns["global_x"] = x + columns["x"].astype(float) * experiment.microns_per_pixel
    columns["global_y"] = y + columns["y"].astype(float) * experiment.microns_per_pixel
    columns["global_z"] = np.interp(columns["z"].astype(float), np.arange(len(experiment.z)), experiment.z)
    table = transcript_table(experiment.codebook, columns.pop("barcode_id"), fov=fov, **columns)
    placed = np.load(fields.file("placed", fov))
    return table, table.iloc[placed["row"]].assign(cell_id=placed["cell"]).reset_index(drop=True)


# --- cells and counts ---------------------------------------------------------------------------------------------


def _contributors(fields: Fields, found: Reconciled) -> dict[int, list[int]]:
    """For each field those whose molecules may lie in the cells whose home it is."""
    near = fields.near(found.stitching.positions, FIELD_RADIUS)
    inverse: dict[int, list[int]] = {fov: [] for fov in fields.fovs}
    for fov in fields.fovs:
        for home in found.cells.homes([fov, *near[fov]]):
            inverse[home].append(fov)
    return inverse


def count_block(fields: Fields, contributors: Iterable[int], cell_ids: np.ndarray, n_words: int) -> csr_matrix:
    """Counts (cell, word) int32 of the cells of a field."""
    parts = [np.load(fields.file("counts", fov)) for fov in contributors]
    pairs = np.concatenate(parts) if parts else np.empty(0, COUNT_DTYPE)
    row = np.searchsorted(cell_ids, pairs["cell"])
    here = row < len(cell_ids)
    here[here] = cell_ids[row[here]] == pairs["cell"][here]
    entries = (pairs["count"][here], (row[here], pairs["word"][here]))
    return csr_matrix(coo_array(entries, shape=(len(cell_ids), n_words), dtype=np.int32))


class CountFile:
    """``cell_by_gene.h5ad`` as it grows: counts are appended cell by cell, what describes the cells comes last."""

    def __init__(self, path: Path, book: Codebook, words: pd.DataFrame) -> None:
        from anndata import AnnData
        from anndata.io import write_elem

        var = word_var(book)
        stated = ["detection_efficiency", "confidence_ratio", "misidentification_rate"]
        var[stated] = words.set_index("gene")[stated]
        self.file = h5py.File(path, "w")
        write_elem(self.file, "/", AnnData(X=csr_matrix((0, book.n_words), dtype=np.int32), var=var))
        self.counts = self.file["X"]

    def __enter__(self) -> CountFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, block: csr_matrix) -> None:
        """Counts (cell, word) of the next cells.

        AnnData's own ``append`` reads what is there each time, so that it takes longer and longer.
        """
        block.sort_indices()
        begin = len(self.counts["data"])
        for name, values in (
            ("data", block.data),
            ("indices", block.indices),
            ("indptr", block.indptr[1:].astype(np.int64) + begin),
        ):
            old = len(self.counts[name])
            self.counts[name].resize(old + len(values), axis=0)
            self.counts[name][old:] = values
        self.counts.attrs["shape"] = [self.counts.attrs["shape"][0] + block.shape[0], block.shape[1]]

    def finish(self, cells: pd.DataFrame) -> None:
        """What describes the cells, as in ``cells.parquet``, in the order of their counts."""
        from anndata.io import write_elem

        del self.file["obs"], self.file["obsm"]
        write_elem(self.file, "obs", cell_obs(cells))
        write_elem(self.file, "obsm", {"spatial": cells[["center_x", "center_y"]].to_numpy(np.float64)})


def cells_table(cells: pd.DataFrame) -> pa.Table:
    """Cells as they stand in ``cells.parquet``."""
    wkb = shapely.to_wkb(cells["geometry"].to_numpy(object))
    return pa.Table.from_pandas(cells.assign(geometry=wkb), CELL_SCHEMA, preserve_index=False)
