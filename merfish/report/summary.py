"""What a page needs to know of molecules and cells: sums over fields, in one pass with memory that stays flat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish._parquet import parts
from merfish._text import read_text, shown
from merfish.errors import InputError

DENSITY_BINS, FEWEST_BINS = 400, 40  # along the longer side of the section
ENTRIES = 1 << 20  # of a matrix of counts, at a time
ENOUGH = 10  # molecules in a square, on average; with fewer one sees their noise
FEWEST_GENES = 3  # to correlate


@dataclass(frozen=True, eq=False)
class Molecules:
    """Kept molecules of a run.

    fovs: (field,); counts: (field, word) int32; in_cells: (field,) int64; density: (y, x) int64, molecules of genes in
    squares of ``bin`` micrometre from ``corner`` (x, y).
    """

    fovs: np.ndarray
    counts: np.ndarray
    in_cells: np.ndarray
    density: np.ndarray
    corner: np.ndarray
    bin: float


def sum_molecules(path: Path, fovs: np.ndarray, is_blank: np.ndarray, low: np.ndarray, high: np.ndarray) -> Molecules:
    """Sum up a table of transcripts, part by part; low, high: corners (x, y) of the section, micrometre."""
    bin_ = max(float(np.max(high - low)) / DENSITY_BINS, 1e-6)
    columns, rows = np.maximum(np.ceil((high - low) / bin_).astype(int), 1)
    counts = np.zeros((len(fovs), len(is_blank)), np.int32)
    in_cells, density = np.zeros(len(fovs), np.int64), np.zeros(rows * columns, np.int64)
    wanted = ["fov", "barcode_id", "cell_id", "global_x", "global_y"]
    for part in parts(path, wanted):
        fov, word, cell, x, y = (part[name].to_numpy() for name in wanted)
        row = np.searchsorted(fovs, fov)
        counts += np.bincount(row * len(is_blank) + word, minlength=counts.size).reshape(counts.shape)
        in_cells += np.bincount(row[cell >= 0], minlength=len(fovs))
        square = _squares(x, y, low, bin_, (rows, columns))
        density += np.bincount(square[~is_blank[word]], minlength=density.size)
    step = int(np.ceil(np.sqrt(ENOUGH * density.size / max(density.sum(), 1))))
    step = min(step, DENSITY_BINS // FEWEST_BINS)
    return Molecules(fovs, counts, in_cells, add_squares(density.reshape(rows, columns), step), low, bin_ * step)


def add_squares(counts: np.ndarray, step: int) -> np.ndarray:
    """Sums over squares of ``step`` rows and columns; those at the ends may be cut."""
    rows, columns = (np.arange(0, side, step) for side in counts.shape)
    return np.add.reduceat(np.add.reduceat(counts, rows, axis=0), columns, axis=1)


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a run: numbers of molecules and genes, int32, and volume, float32, cubic micrometre (cell,).

    full: (y, x) molecules of a cell, mean of those with their centre in a square of ``bin`` micrometre from ``corner``
    (x, y), NaN without any.
    """

    n_molecules: np.ndarray
    n_genes: np.ndarray
    volume: np.ndarray
    full: np.ndarray
    corner: np.ndarray
    bin: float


def sum_cells(path: Path, n_genes: np.ndarray, low: np.ndarray, high: np.ndarray) -> Cells:
    """Sum up a table of cells, part by part; low, high: corners (x, y) of the section, micrometre.

    n_genes: (cell,), as `genes_of_cells` counts them. Squares are so large that one holds a cell on average.
    """
    n = len(n_genes)
    bin_ = max(float(np.max(high - low)) / DENSITY_BINS, float(np.sqrt(np.prod(high - low) / max(n, 1))), 1e-6)
    columns, rows = np.maximum(np.ceil((high - low) / bin_).astype(int), 1)
    counts, volume = np.zeros(n, np.int32), np.zeros(n, np.float32)
    number, total = np.zeros(rows * columns), np.zeros(rows * columns)
    first = 0
    for part in parts(path, ["center_x", "center_y", "volume", "n_transcripts"]):
        x, y, volumes, molecules = (column.to_numpy() for column in part.columns)
        here = slice(first, first + len(x))
        counts[here], volume[here] = molecules, volumes
        square = _squares(x, y, low, bin_, (rows, columns))
        number += np.bincount(square, minlength=len(number))
        total += np.bincount(square, molecules, minlength=len(total))
        first += len(x)
    with np.errstate(invalid="ignore"):
        full = (total / number).reshape(rows, columns)
    return Cells(counts, n_genes, volume, full, low, bin_)


def _squares(x: np.ndarray, y: np.ndarray, low: np.ndarray, bin_: float, shape: tuple[int, int]) -> np.ndarray:
    """The square of a grid of shape (rows, columns), numbered row by row, that each place lies in or is nearest to."""
    column = np.clip(((x - low[0]) / bin_).astype(int), 0, shape[1] - 1)
    return np.asarray(np.clip(((y - low[1]) / bin_).astype(int), 0, shape[0] - 1) * shape[1] + column)


def genes_of_cells(path: Path) -> np.ndarray:
    """Number of genes, int32 (cell,), that each cell of a table of counts shows, blanks left out."""
    import h5py

    with h5py.File(path, "r") as file:
        starts, is_blank = file["X/indptr"][:], file["var/is_blank"][:].astype(bool)
        genes = np.zeros(len(starts) - 1, np.int32)
        entries = file["X/indices"]
        for first in range(0, len(entries), ENTRIES):
            words = entries[first : first + ENTRIES]
            cell = np.searchsorted(starts, np.arange(first, first + len(words)), side="right") - 1
            seen = cell[~is_blank[words]]
            if len(seen):
                genes[seen[0] : seen[-1] + 1] += np.bincount(seen - seen[0]).astype(np.int32)
    return genes


def field_table(run: Mapping[str, Any], molecules: Molecules) -> pd.DataFrame:
    """A row a field: what it shows and how good its images are; NaN for what is not known."""
    is_blank = np.array(run["codebook"]["is_blank"], bool)
    said = pd.DataFrame([_said_of_field(run["fields"][str(fov)]) for fov in molecules.fovs], columns=_SAID)
    flagged = pd.Series(run["quality"].get("fov", []), dtype=int).value_counts()
    kept = molecules.counts.sum(axis=1)
    genes = molecules.counts[:, ~is_blank]
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {
            "field": molecules.fovs,
            "found": said["n_found"],
            "kept": kept,
            "blanks": molecules.counts[:, is_blank].sum(axis=1) / kept,
            "in cells": molecules.in_cells / kept,
            "outlines": said["n_outlines"],
            "drift": said["drift"],
            "spot width": said["width"],
            "saturated": said["saturated"],
            "r": [log_correlation(row, genes.sum(axis=0) - row)[0] for row in genes],
            "seconds": said["seconds"],
            "unusual images": flagged.reindex(molecules.fovs, fill_value=0).to_numpy(),
        }
    return pd.DataFrame(columns)


_SAID = ("n_found", "n_outlines", "drift", "width", "saturated", "seconds")


def _said_of_field(field: Mapping[str, Any]) -> tuple[int, int, float, float, int, float]:
    """Of the record of a field what `_SAID` names."""
    drift, width = largest_drift(field["drift"]), median_width(field["quality"])
    saturated, seconds = sum(field["saturated"]), sum(field["seconds"].values())
    return field["n_found"], field["n_outlines"], drift, width, saturated, seconds


def largest_drift(rows: list[dict[str, Any]]) -> float:
    """Of all rounds, pixel; NaN of none."""
    lengths = [np.hypot(row["dy"], row["dx"]) for row in rows if row["dy"] is not None and row["dx"] is not None]
    return float(max(lengths, default=np.nan))


def median_width(quality: Mapping[str, Any]) -> float:
    """Sigma of the spots, pixel, in the median of the bits; NaN where no bit shows any."""
    widths = np.array(quality.get("width", []), float)
    known = widths[np.isfinite(widths)]
    return float(np.median(known)) if len(known) else float("nan")


def log_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Pearson's r of log10 of the values that are positive in both, and their number; NaN of too few or equal ones."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    both = (a > 0) & (b > 0)
    x, y = np.log10(a[both]), np.log10(b[both])
    if len(x) < FEWEST_GENES or not np.ptp(x) or not np.ptp(y):
        return float("nan"), int(both.sum())
    return float(np.corrcoef(x, y)[0, 1]), int(both.sum())


def read_bulk(path: Path) -> pd.Series:
    """Values by gene from a CSV file "gene,value" with or without a head. Raises InputError naming the line."""
    values: dict[str, float] = {}
    for number, line in enumerate(read_text(path, "table of bulk RNA-seq").splitlines(), 1):
        parts = [part.strip().strip('"') for part in line.split(",")]
        if not line.strip() or (number == 1 and len(parts) >= 2 and _number(parts[1]) is None):
            continue
        value = _number(parts[1]) if len(parts) >= 2 else None
        if value is None or value < 0:
            raise InputError(f"{path}: line {number}: expected a gene and a number from 0, got {shown(line)}")
        if parts[0] in values:
            raise InputError(f"{path}: line {number}: the gene {shown(parts[0])} appears twice")
        values[parts[0]] = value
    return pd.Series(values, dtype=float)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
