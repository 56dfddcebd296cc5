"""Counts of a table, read in blocks, since a backed AnnData may be larger than memory, and stored compactly."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from spatialvae.errors import InputError

ENTRIES = 2**22  # values in a block, including zeros


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts (cell, gene) in compressed row form, with the smallest integer types that hold the values.

    ``indptr`` int64 (cell + 1,); ``indices`` and ``data`` unsigned (entry,); ``depth`` float32 (cell,), the row sums.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    depth: np.ndarray
    n_genes: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.depth), self.n_genes

    def spread_over(self, places: np.ndarray, n_genes: int) -> Counts:
        """The same counts in a table of ``n_genes`` columns, with columns moved to ``places``; the others are empty."""
        indices = places.astype(np.min_scalar_type(n_genes - 1))[self.indices]
        return Counts(self.indptr, indices, self.data, self.depth, n_genes)

    def blocks(self) -> Iterator[tuple[slice, sp.csr_array]]:
        """Iterate over blocks of consecutive rows and their counts, float32."""
        n, step = len(self.depth), max(ENTRIES // self.n_genes, 1)
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            start, stop = self.indptr[rows.start], self.indptr[rows.stop]
            data, indices = self.data[start:stop].astype(np.float32), self.indices[start:stop].astype(np.int32)
            indptr = (self.indptr[rows.start : rows.stop + 1] - start).astype(np.int32)
            yield rows, sp.csr_array((data, indices, indptr), shape=(rows.stop - first, self.n_genes))

    def of_genes(self) -> np.ndarray:
        """The sums over cells, float64 (gene,)."""
        total = np.zeros(self.n_genes)
        for _, block in self.blocks():
            total += column_sums(block)
        return total

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Dense counts of ``rows`` (row,): float32 (row, gene)."""
        from spatialvae import _kernels

        out = np.empty((len(rows), self.n_genes), np.float32)
        _kernels.dense_rows(self.indptr, self.indices, self.data, rows, out)
        return out


def column_sums(block: sp.csr_array) -> np.ndarray:
    """Sums of the columns of ``block`` (row, gene), float64 (gene,). (SciPy's ``block.sum(0, dtype=float)`` adds up in
    float32: its relative error was 3e-3 for 350,000 equal values.)"""
    return block.T @ np.ones(block.shape[0])


def read_counts(matrix: Any, columns: np.ndarray, where: str) -> Counts:
    """Check and store ``columns`` of ``matrix`` (cell, gene), an array or sparse matrix, in memory or in a file.

    The matrix is read twice, in blocks: to check it and determine sizes, and to copy it. Counts from a file are copied
    to an unnamed memory-mapped temporary file (in ``TMPDIR``; 2 to 4 bytes per non-zero count), so that the system can
    page them out; it is removed with the last reference to it.

    Cells without counts are allowed. Raises InputError, naming ``where``, for values of another type or that are not
    non-negative integers, a matrix without any counts, and a damaged matrix.
    """
    from spatialvae import _kernels

    kind = np.dtype(matrix.dtype)
    if kind.kind not in "biu" and kind not in (np.float32, np.float64):
        raise InputError(f"{where} is of type {kind}; expected integers, float32 or float64")
    n, in_file = matrix.shape[0], not (isinstance(matrix, np.ndarray) or sp.issparse(matrix))
    length, depth, highest = np.zeros(n, np.int64), np.zeros(n), 0
    for rows, genes, values in _entries(matrix, columns, where):
        _check(rows, columns[genes], values, where)
        _kernels.tally(rows, values, length, depth)
        highest = max(highest, int(values.max(initial=0)))
    if highest == 0:
        raise InputError(f"{where} has no counts: all {n} cells are zero for the {len(columns)} genes of the model")
    indptr = np.append(0, np.cumsum(length))
    indices = _array(int(indptr[-1]), np.min_scalar_type(len(columns) - 1), in_file)
    data = _array(int(indptr[-1]), np.min_scalar_type(highest), in_file)
    free = indptr[:-1].copy()
    for rows, genes, values in _entries(matrix, columns, where):
        _kernels.append_entries(rows, genes, values, free, indices, data)
    return Counts(indptr, indices, data, depth.astype(np.float32), len(columns))


def _entries(matrix: Any, columns: np.ndarray, where: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, indices into ``columns`` and values of non-zero entries, in blocks of rows (of columns for CSC)."""
    place = np.full(matrix.shape[1], -1, np.int64)
    place[columns] = np.arange(len(columns))
    by_column = getattr(matrix, "format", "") == "csc"
    length, width = reversed(matrix.shape) if by_column else matrix.shape
    step = max(ENTRIES // width, 1)
    chunk = (getattr(matrix, "chunks", None) or (1,))[0]
    step = -(-step // chunk) * chunk if isinstance(chunk, int) else step  # each chunk of the file is decompressed once
    for first in range(0, length, step):
        part = slice(first, first + step)
        entries = _block(matrix, (slice(None), part) if by_column else part, where).tocoo()
        rows, genes = entries.row.astype(np.int64), entries.col.astype(np.int64)
        genes, rows = place[genes + first * by_column], rows + first * (not by_column)
        kept = (genes >= 0) & (entries.data != 0)
        yield rows[kept], genes[kept], entries.data[kept]


def _block(matrix: Any, part: Any, where: str) -> Any:
    """``matrix[part]`` as a sparse matrix without duplicate entries. It may share memory with ``matrix``, which is not
    changed. Indices are checked before compiled code uses them."""
    try:
        if sp.issparse(matrix) and matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=False)  # the lengths of its arrays, before slicing
        block = matrix[part]
        block = block if sp.issparse(block) else sp.csr_array(np.asarray(block))
        if block.format in ("csr", "csc"):
            block.check_format(full_check=True)
    except (ValueError, IndexError) as error:
        raise InputError(f"{where} is damaged: row pointers or indices do not match the data: {error}") from error
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


def _check(rows: np.ndarray, genes: np.ndarray, values: np.ndarray, where: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(values) | (values < 0) | (values != np.round(values)))
    if len(wrong):
        at = wrong[0]
        raise InputError(
            f"{where}: expected counts (non-negative integers); row {rows[at]}, column {genes[at]} is {values[at]:g}"
        )


def _array(size: int, dtype: np.dtype, in_file: bool) -> np.ndarray:
    if not in_file:
        return np.empty(size, dtype)
    with tempfile.TemporaryFile() as file:  # the mapping remains valid without the name and the handle
        if hasattr(
            os, "posix_fallocate"
        ):  # a full disk raises an error here; writing to the mapping would crash the process
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return np.asarray(np.memmap(file, dtype, "w+", shape=size))
