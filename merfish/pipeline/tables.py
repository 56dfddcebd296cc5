"""Write the tables of a run, one field at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from scipy.sparse import coo_array, csr_matrix

from merfish import results
from merfish._parquet import GroupWriter, geo_schema
from merfish.calls.overlap import FIELD_RADIUS
from merfish.cells.counts import OUTSIDE, cell_obs, word_var
from merfish.codebook import Codebook
from merfish.exchange.run import PLANE_OUTLINES
from merfish.pipeline.assemble import COUNT_DTYPE, PLACED_DTYPE, read_cell_part
from merfish.pipeline.fields import read_calls, read_spots
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
        ("is_empty", pa.bool_()),
    ]
)

# x, y, z: pixels and planes of the field; global_*: µm in the frame of the stage; intensity: heights of a typical spot
SEQUENTIAL_SCHEMA = pa.schema(
    [
        ("gene", pa.string()),
        ("fov", pa.int32()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("z", pa.float32()),
        ("global_x", pa.float64()),
        ("global_y", pa.float64()),
        ("intensity", pa.float32()),
        ("cell_id", pa.int64()),
    ]
)

CELLS_TOGETHER = 1 << 14  # cells per row group; their outlines take 500 bytes each
CHUNK, ENTRIES = 1 << 10, 1 << 14  # cells per block of a column of ``obs``, counts per block of a matrix


@dataclass(frozen=True)
class Written:
    """Numbers of molecules and cells in the tables; transcripts_per_cell: median."""

    n_molecules: int
    n_in_cells: int
    n_cells: int
    transcripts_per_cell: float


def write_tables(
    fields: Fields, found: Reconciled, words: pd.DataFrame, genes: Sequence[str], stage: Path, display: Display
) -> Written:
    """Write transcripts, cells and counts into ``stage``.

    words: statistics of each word, from `merfish.calls.error_model.word_statistics`. genes: names of the genes imaged
    one by one. Raises OSError if the disk is full.
    """
    with display.step("write tables"):
        var = count_var(fields.experiment.codebook, words, genes)
        per_cell = write_counts(fields, _contributors(fields, found), var, stage, display, cell_schema(fields))
        n_molecules, n_in_cells = write_transcripts(fields, found, stage, display)
        if genes:
            write_sequential(fields, found, genes, stage)
    return Written(n_molecules, n_in_cells, len(per_cell), float(np.median(per_cell)) if len(per_cell) else 0.0)


def write_counts(
    fields: Fields,
    contributors: Mapping[int, Iterable[int]],
    var: pd.DataFrame,
    stage: Path,
    display: Display,
    schema: pa.Schema = CELL_SCHEMA,
) -> np.ndarray:
    """Write ``cell_by_gene.h5ad`` and ``cells.parquet``; returns the number of molecules of each cell.

    contributors: for each field, the fields whose molecules may lie in its cells. var: describes the words, then the
    genes imaged one by one.
    """
    reserve(stage, _most_bytes(fields, len(schema.names)))
    n_words = int((~var["sequential"]).sum())
    shapes = [field.name for field in schema if field.type == pa.binary()]
    none = schema.empty_table().drop_columns(shapes).to_pandas()
    per_cell = [none["n_transcripts"].to_numpy()]
    with (
        GroupWriter(stage / results.CELLS, geo_schema(schema), CELLS_TOGETHER) as cell_file,
        CountFile(stage / results.CELL_BY_GENE, var, none) as counts,
    ):
        for fov in display.track(fields.fovs, len(fields.fovs), "write counts"):
            cells = read_cell_part(fields, "cells", fov)
            pairs = pairs_of_cells(fields, contributors[fov], cells["cell_id"].to_numpy())
            cells = with_counts(cells, pairs[pairs["word"] < n_words])[schema.names]
            counts.append(pairs, cells.drop(columns=shapes))
            cell_file.write(cells_table(cells, geo_schema(schema)))
            per_cell.append(cells["n_transcripts"].to_numpy())
    return np.concatenate(per_cell)


def write_transcripts(fields: Fields, found: Reconciled, stage: Path, display: Display) -> tuple[int, int]:
    """Write both transcript tables; returns the number of kept molecules, and the number of those in cells."""
    schema = transcript_schema(fields.experiment.codebook)
    n_molecules = n_in_cells = first_id = 0
    with (
        GroupWriter(stage / results.ALL_TRANSCRIPTS, schema) as every,
        GroupWriter(stage / results.TRANSCRIPTS, schema) as kept,
    ):
        for fov in display.track(fields.fovs, len(fields.fovs), "write calls"):
            calls, placed = field_transcripts(fields, found, fov, first_id, schema)
            first_id += len(calls)
            every.write(calls)
            kept.write(placed)
            n_molecules += len(placed)
            n_in_cells += int((placed["cell_id"].to_numpy() != OUTSIDE).sum())
    return n_molecules, n_in_cells


def reserve(folder: Path, n_bytes: int) -> None:
    """Raise OSError unless ``n_bytes`` can be written: HDF5 crashes the process when the disk is full."""
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, n_bytes)


def _most_bytes(fields: Fields, n_columns: int) -> int:
    """Return an upper bound on the size of counts and cells: parts on disk, rows of ``obs``, and an empty file."""
    # text takes 16 bytes plus its letters, numbers at most 8; two matrices of two vectors of 4 bytes
    empty = (1 << 17) + 16 * CHUNK * n_columns + 16 * ENTRIES
    names = (fields.file("counts", fov) for fov in fields.fovs)
    cells = [fields.file("cells", fov, "parquet") for fov in fields.fovs]
    parts = sum(path.stat().st_size for path in (*names, *cells))
    return parts + 500 * sum(pq.read_metadata(path).num_rows for path in cells) + empty


def transcript_schema(book: Codebook) -> pa.Schema:
    """Return the schema of transcript tables, with the metadata from which pandas restores the dtypes."""
    none = np.empty(0, np.int32)
    empty = transcript_table(book, none, x=none, y=none, hamming_distance=none, intensity=none)
    return pa.Schema.from_pandas(empty, preserve_index=False)


def field_transcripts(
    fields: Fields, found: Reconciled, fov: int, first_id: int, schema: pa.Schema
) -> tuple[pa.Table, pa.Table]:
    """Return the transcript tables of a field: all calls with probabilities, and the kept ones without duplicates."""
    experiment, book = fields.experiment, fields.experiment.codebook
    calls = read_calls(fields.out, fov)
    word, n = calls["barcode_id"].to_numpy(), len(calls)
    x, y = found.stitching.positions[fov]
    columns = {name: calls[name].to_numpy() for name in schema.names if name in calls}
    columns |= {
        "transcript_id": np.arange(first_id, first_id + n),
        "gene": pa.array(book.names, pa.string()).take(pa.array(word)),
        "is_blank": book.is_blank[word],
        "fov": np.full(n, fov),
        "global_x": x + columns["x"].astype(float) * experiment.microns_per_pixel,
        "global_y": y + columns["y"].astype(float) * experiment.microns_per_pixel,
        "global_z": np.interp(columns["z"].astype(float), np.arange(len(experiment.z)), experiment.z),
        "probability": rate_field(calls, found.filter)[0],
        "cell_id": np.full(n, OUTSIDE),
    }
    every = pa.table({name: columns[name] for name in schema.names}, schema)
    placed = fields.read_rows("placed", fov, PLACED_DTYPE)
    at = schema.get_field_index("cell_id")
    kept = every.take(placed["row"]).set_column(at, schema.field(at), pa.array(placed["cell"]))
    return every, kept


def write_sequential(fields: Fields, found: Reconciled, genes: Sequence[str], stage: Path) -> None:
    """Write the molecules of genes imaged one by one, without duplicates, with their cells."""
    experiment = fields.experiment
    with GroupWriter(stage / results.SEQUENTIAL, SEQUENTIAL_SCHEMA) as file:
        for fov in fields.fovs:
            placed = fields.read_rows("single", fov, PLACED_DTYPE)
            spots = read_spots(fields.out, fov)[placed["row"]]
            left, top = found.stitching.positions[fov]
            columns: dict[str, Any] = {name: spots[name] for name in ("x", "y", "z")}
            columns |= {"gene": np.array(genes, dtype=object)[spots["gene"]], "fov": np.full(len(spots), fov, np.int32)}
            columns["global_x"] = left + spots["x"].astype(float) * experiment.microns_per_pixel
            columns["global_y"] = top + spots["y"].astype(float) * experiment.microns_per_pixel
            columns |= {"intensity": spots["height"], "cell_id": placed["cell"]}
            file.write(pa.table({name: columns[name] for name in SEQUENTIAL_SCHEMA.names}, SEQUENTIAL_SCHEMA))


# --- cells and counts ---------------------------------------------------------------------------------------------


def _contributors(fields: Fields, found: Reconciled) -> dict[int, list[int]]:
    """Return for each field the fields whose molecules may lie in its cells."""
    near = fields.near(found.stitching.positions, FIELD_RADIUS)
    inverse: dict[int, list[int]] = {fov: [] for fov in fields.fovs}
    for fov in fields.fovs:
        for home in found.cells.homes([fov, *near[fov]]):
            inverse[home].append(fov)
    return inverse


def pairs_of_cells(fields: Fields, contributors: Iterable[int], cell_ids: np.ndarray) -> np.ndarray:
    """Count molecules of each word in the cells of a field, `COUNT_DTYPE`; ``cell``: row in sorted ``cell_ids``."""
    parts = [fields.read_rows("counts", fov, COUNT_DTYPE) for fov in contributors]
    pairs = np.concatenate(parts) if parts else np.empty(0, COUNT_DTYPE)
    row = np.searchsorted(cell_ids, pairs["cell"])
    here = row < len(cell_ids)
    here[here] = cell_ids[row[here]] == pairs["cell"][here]
    pairs = pairs[here]
    pairs["cell"] = row[here]
    return pairs


def with_counts(cells: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    """Add n_transcripts, is_empty and nuclear_fraction to cells; the latter is NaN for cells without molecules."""
    n, nuclear = (np.bincount(pairs["cell"], pairs[name], minlength=len(cells)) for name in ("count", "nuclear"))
    with np.errstate(invalid="ignore"):
        return cells.assign(n_transcripts=n.astype(np.int64), is_empty=n == 0, nuclear_fraction=nuclear / n)


def count_var(book: Codebook, words: pd.DataFrame, genes: Sequence[str]) -> pd.DataFrame:
    """Return ``var`` of the counts: the words, then the genes imaged one by one, marked ``sequential``.

    A gene that is also in the codebook is named ``<gene>_sequential``.
    """
    var = word_var(book)
    stated = ["detection_efficiency", "confidence_ratio", "misidentification_rate"]
    var[stated] = words.set_index("gene")[stated]
    names = [f"{gene}_sequential" if gene in book.names else gene for gene in genes]
    single = pd.DataFrame({"is_blank": False, **dict.fromkeys(stated, np.nan)}, pd.Index(names, name="gene"))
    both = pd.concat([var, single]) if names else var
    return both.assign(is_blank=both["is_blank"].astype(bool), sequential=np.arange(len(both)) >= len(var))


class CountFile:
    """Writes ``cell_by_gene.h5ad``; cells are appended with their counts and metadata."""

    def __init__(self, path: Path, var: pd.DataFrame, cells: pd.DataFrame) -> None:
        """Create the file; cells: a table without rows that gives columns and dtypes."""
        from anndata import AnnData
        from anndata.io import write_elem

        none = {name: csr_matrix((0, len(var)), dtype=COUNT_DTYPE[name]) for name in ("count", "expected")}
        self.file = h5py.File(path, "w")
        write_elem(self.file, "/", AnnData(none["count"], var=var, layers={"expected": none["expected"]}))
        self.counts = {"count": self.file["X"], "expected": self.file["layers/expected"]}
        for matrix in self.counts.values():
            for name, block in (("data", ENTRIES), ("indices", ENTRIES), ("indptr", CHUNK)):
                _grow_in_blocks(matrix, name, block)
        del self.file["obs"], self.file["obsm"]
        rows, pairs = ({"maxshape": (None, *one), "chunks": (CHUNK, *one)} for one in ((), (2,)))
        write_elem(self.file, "obs", cell_obs(cells), dataset_kwargs=rows)
        write_elem(self.file, "obsm", {"spatial": _centres(cells)}, dataset_kwargs=pairs)

    def __enter__(self) -> CountFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, pairs: np.ndarray, cells: pd.DataFrame) -> None:
        """Append cells and their counts, `COUNT_DTYPE`; ``cell`` is the row in ``cells``.

        AnnData's own ``append`` reads the whole matrix each time.
        """
        if not len(cells):
            return
        for kind, matrix in self.counts.items():
            _append_rows(matrix, pairs[kind], pairs["cell"], pairs["word"], len(cells))
        obs = cell_obs(cells)
        _extend(self.file["obs/_index"], obs.index.to_numpy(object))
        for name in obs:
            _extend(self.file["obs"][name], obs[name].to_numpy())
        _extend(self.file["obsm/spatial"], _centres(cells))


def _centres(cells: pd.DataFrame) -> np.ndarray:
    return cells[["center_x", "center_y"]].to_numpy(np.float64)


def _grow_in_blocks(group: h5py.Group, name: str, block: int) -> None:
    """Store a vector again in blocks of ``block`` values; HDF5 would use blocks of one if it starts with one value."""
    values = group[name][:]
    del group[name]
    group.create_dataset(name, data=values, maxshape=(None,), chunks=(block,))


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    """Append values along the first axis."""
    old = len(dataset)
    dataset.resize(old + len(values), axis=0)
    dataset[old:] = values


def _append_rows(matrix: h5py.Group, values: np.ndarray, row: np.ndarray, column: np.ndarray, n_rows: int) -> None:
    """Append rows to a CSR matrix on disk; entries of the same row and column are summed."""
    width = matrix.attrs["shape"][1]
    block = csr_matrix(coo_array((values, (row, column)), shape=(n_rows, width), dtype=values.dtype))
    block.sort_indices()
    begin = len(matrix["data"])
    _extend(matrix["data"], block.data)
    _extend(matrix["indices"], block.indices)
    _extend(matrix["indptr"], block.indptr[1:].astype(np.int64) + begin)
    matrix.attrs["shape"] = [matrix.attrs["shape"][0] + n_rows, width]


def cell_schema(fields: Fields) -> pa.Schema:
    """Return the columns of ``cells.parquet``: those of every run, nuclear_fraction, measurements of stains.

    The outlines in each plane come last, if cells have them.
    """
    known = list(read_cell_part(fields, "cells", fields.fovs[0]).columns) if fields.fovs else []
    others = [name for name in known if name not in (*CELL_SCHEMA.names, PLANE_OUTLINES)]
    shapes = [] if fields.planes is None else [pa.field(PLANE_OUTLINES, pa.binary())]
    measured = [pa.field(name, pa.float64()) for name in ("nuclear_fraction", *others)]
    return pa.schema([*CELL_SCHEMA, *measured, *shapes])


def cells_table(cells: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return cells as stored in ``cells.parquet``."""
    wkb = shapely.to_wkb(cells["geometry"].to_numpy(object))
    return pa.Table.from_pandas(cells.assign(geometry=wkb), schema, preserve_index=False)
