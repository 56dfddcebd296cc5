"""Sums over the molecules and cells of a run, in one pass over its tables with constant memory."""

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

MOST_SQUARES, FEWEST_SQUARES = 400, 40  # along the longer side of the section
ENTRIES = 1 << 20  # of a matrix of counts, at a time
FEW_CELLS = 2  # mean number per square; with one, many squares of a tissue are empty
ENOUGH = 10  # molecules, mean number per square; with fewer, counting noise dominates
FEWEST_GENES = 3  # for a correlation


@dataclass(frozen=True, eq=False)
class Squares:
    """A grid of squares of ``side`` micrometres from ``corner`` (x, y); shape: (rows, columns)."""

    corner: np.ndarray
    side: float
    shape: tuple[int, int]

    @classmethod
    def over(cls, low: np.ndarray, high: np.ndarray, least: float = 0.0) -> Squares:
        """Return the finest grid between two corners (x, y) with squares of at least ``least`` micrometres."""
        side = max(float(np.max(high - low)) / MOST_SQUARES, least, 1e-6)
        columns, rows = np.maximum(np.ceil((high - low) / side).astype(int), 1).tolist()
        return cls(low, side, (rows, columns))

    @classmethod
    def for_cells(cls, n: int, low: np.ndarray, high: np.ndarray) -> Squares:
        """Return the finest grid between two corners (x, y) with a mean of `FEW_CELLS` of ``n`` cells per square."""
        return cls.over(low, high, float(np.sqrt(FEW_CELLS * np.prod(high - low) / max(n, 1))))

    @property
    def size(self) -> int:
        """Number of squares."""
        return self.shape[0] * self.shape[1]

    def number(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the square, numbered row by row, that contains each position or is nearest to it."""
        places = ((place - first) / self.side for place, first in zip((y, x), self.corner[::-1], strict=True))
        row, column = (np.clip(k.astype(int), 0, n - 1) for k, n in zip(places, self.shape, strict=True))
        return np.asarray(row * self.shape[1] + column)

    def joined(self, step: int) -> Squares:
        """Return the grid whose squares are ``step`` times as large."""
        rows, columns = (-(-n // step) for n in self.shape)
        return Squares(self.corner, self.side * step, (rows, columns))


@dataclass(frozen=True, eq=False)
class Molecules:
    """Kept molecules of a run.

    fovs: (field,). counts: (field, word) int32. in_cells: (field,) int64. density: int64, molecules of genes in each
    square of ``squares``.
    """

    fovs: np.ndarray
    counts: np.ndarray
    in_cells: np.ndarray
    density: np.ndarray
    squares: Squares


def sum_molecules(path: Path, fovs: np.ndarray, is_blank: np.ndarray, low: np.ndarray, high: np.ndarray) -> Molecules:
    """Sum a transcript table in parts; low, high: corners (x, y) of the section, in micrometres."""
    squares = Squares.over(low, high)
    counts = np.zeros((len(fovs), len(is_blank)), np.int32)
    in_cells, density = np.zeros(len(fovs), np.int64), np.zeros(squares.size, np.int64)
    wanted = ["fov", "barcode_id", "cell_id", "global_x", "global_y"]
    for part in parts(path, wanted):
        fov, word, cell, x, y = (part[name].to_numpy() for name in wanted)
        row = np.searchsorted(fovs, fov)
        counts += np.bincount(row * len(is_blank) + word, minlength=counts.size).reshape(counts.shape)
        in_cells += np.bincount(row[cell >= 0], minlength=len(fovs))
        density += np.bincount(squares.number(x, y)[~is_blank[word]], minlength=density.size)
    step = int(np.ceil(np.sqrt(ENOUGH * density.size / max(density.sum(), 1))))
    step = min(step, MOST_SQUARES // FEWEST_SQUARES)
    return Molecules(fovs, counts, in_cells, add_squares(density.reshape(squares.shape), step), squares.joined(step))


def add_squares(counts: np.ndarray, step: int) -> np.ndarray:
    """Sum over blocks of ``step`` rows and columns; those at the ends may be smaller."""
    rows, columns = (np.arange(0, side, step) for side in counts.shape)
    return np.add.reduceat(np.add.reduceat(counts, rows, axis=0), columns, axis=1)


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a run: numbers of molecules and genes, int32, and volume, float32, in cubic micrometres (cell,).

    mean_molecules: mean of ``n_molecules`` over the cells whose centres lie in each square of ``squares``, NaN for
    none.
    """

    n_molecules: np.ndarray
    n_genes: np.ndarray
    volume: np.ndarray
    mean_molecules: np.ndarray
    squares: Squares


def sum_cells(path: Path, n_genes: np.ndarray, low: np.ndarray, high: np.ndarray) -> Cells:
    """Sum a table of cells in parts; low, high: corners (x, y) of the section, in micrometres.

    n_genes: (cell,), from `genes_of_cells`.
    """
    n = len(n_genes)
    squares = Squares.for_cells(n, low, high)
    counts, volume = np.zeros(n, np.int32), np.zeros(n, np.float32)
    number, total = np.zeros(squares.size), np.zeros(squares.size)
    first = 0
    for part in parts(path, ["center_x", "center_y", "volume", "n_transcripts"]):
        x, y, volumes, molecules = (column.to_numpy() for column in part.columns)
        here = slice(first, first + len(x))
        counts[here], volume[here] = molecules, volumes
        square = squares.number(x, y)
        number += np.bincount(square, minlength=len(number))
        total += np.bincount(square, molecules, minlength=len(total))
        first += len(x)
    with np.errstate(invalid="ignore"):
        mean = (total / number).reshape(squares.shape)
    return Cells(counts, n_genes, volume, mean, squares)


def most_frequent(squares: Squares, places: np.ndarray, code: np.ndarray, n_codes: int) -> np.ndarray:
    """Return the most frequent code of the cells whose centres lie in each square, int (y, x); -1 without cells.

    places: centres (cell, 2), x and y in micrometres. code: (cell,) from 0 to ``n_codes`` - 1. Ties go to the lowest
    code.
    """
    number = squares.number(*places.T) * n_codes + code
    count = np.bincount(number, minlength=squares.size * n_codes).reshape(*squares.shape, n_codes)
    return np.where(count.any(axis=-1), count.argmax(axis=-1), -1)


def genes_of_cells(path: Path) -> np.ndarray:
    """Return the number of genes with molecules in each cell of a count table, int32 (cell,); blanks are omitted."""
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
    """Return a row for each field: its molecules, and the quality of its images; NaN for unknown values."""
    is_blank = np.array(run["codebook"]["is_blank"], bool)
    recorded = pd.DataFrame([_recorded(run["fields"][str(fov)]) for fov in molecules.fovs], columns=_RECORDED)
    flagged = pd.Series(run["quality"].get("fov", []), dtype=int).value_counts()
    kept = molecules.counts.sum(axis=1)
    genes = molecules.counts[:, ~is_blank]
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {
            "field": molecules.fovs,
            "found": recorded["n_found"],
            "kept": kept,
            "blanks": molecules.counts[:, is_blank].sum(axis=1) / kept,
            "in cells": molecules.in_cells / kept,
            "outlines": recorded["n_outlines"],
            "drift": recorded["drift"],
            "spot width": recorded["width"],
            "saturated": recorded["saturated"],
            "r": [log_correlation(row, genes.sum(axis=0) - row)[0] for row in genes],
            "seconds": recorded["seconds"],
            "unusual images": flagged.reindex(molecules.fovs, fill_value=0).to_numpy(),
        }
    return pd.DataFrame(columns)


_RECORDED = ("n_found", "n_outlines", "drift", "width", "saturated", "seconds")


def _recorded(field: Mapping[str, Any]) -> tuple[int, int, float, float, int, float]:
    """Return the figures `_RECORDED` of a field from its record."""
    drift, width = largest_drift(field["drift"]), median_width(field["quality"])
    saturated, seconds = sum(field["saturated"]), sum(field["seconds"].values())
    return field["n_found"], field["n_outlines"], drift, width, saturated, seconds


def largest_drift(rows: list[dict[str, Any]]) -> float:
    """Return the length of the largest drift of a field's rounds, in pixels; NaN if none is known."""
    lengths = [np.hypot(row["dy"], row["dx"]) for row in rows if row["dy"] is not None and row["dx"] is not None]
    return float(max(lengths, default=np.nan))


def median_width(quality: Mapping[str, Any]) -> float:
    """Return the median over the bits of the sigma of the spots, in pixels; NaN if no bit has spots."""
    widths = np.array(quality.get("width", []), float)
    known = widths[np.isfinite(widths)]
    return float(np.median(known)) if len(known) else float("nan")


def log_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Return Pearson's r of log10 of the values positive in both, and their number; NaN if they are few or equal."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    both = (a > 0) & (b > 0)
    x, y = np.log10(a[both]), np.log10(b[both])
    if len(x) < FEWEST_GENES or not np.ptp(x) or not np.ptp(y):
        return float("nan"), int(both.sum())
    return float(np.corrcoef(x, y)[0, 1]), int(both.sum())


def read_bulk(path: Path) -> pd.Series:
    """Read values by gene from a CSV file "gene,value", with or without a header. Raises InputError naming the line."""
    values: dict[str, float] = {}
    for number, line in enumerate(read_text(path, "table of bulk RNA-seq").splitlines(), 1):
        parts = [part.strip().strip('"') for part in line.split(",")]
        if not line.strip() or (number == 1 and len(parts) >= 2 and _number(parts[1]) is None):
            continue
        value = _number(parts[1]) if len(parts) >= 2 else None
        if value is None or value < 0:
            raise InputError(f"{path}: line {number}: expected a gene and a non-negative number, got {shown(line)}")
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
