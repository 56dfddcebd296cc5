"""Helper functions of the readers: find files, check columns, read counts as CSR, build the AnnData table."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from merfish._text import listed, shown
from merfish.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

CHUNK_VALUES = 1 << 24  # values of a dense count table in memory at a time


def find_file(folder: Path, *patterns: str) -> Path:
    """Return the file that matches the first pattern with any match. Raises InputError for no match or several."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with {' or '.join(patterns)}")
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            raise InputError(
                f"{folder}: expected one file matching {pattern}, got {listed([path.name for path in found], ', ')}"
            )
        if found:
            return found[0]
    there = listed(sorted(path.name for path in folder.iterdir()), ", ") or "nothing"
    raise InputError(f"{folder}: no file matches {' or '.join(patterns)}; the folder has {there}")


@contextmanager
def understood(path: Path, what: str) -> Iterator[None]:
    """Convert errors of pandas and Arrow on reading a file to an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: cannot be read as {what}: {error or type(error).__name__}") from error


def separator(path: Path) -> str:
    """Return the separator for a suffix: comma for .csv, tab for .tsv and .txt, compressed or not."""
    return "," if ".csv" in path.suffixes else "\t"


def read_columns(path: Path, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """Read a table (.csv, .tsv, .txt, possibly compressed, or .parquet) that must have these columns.

    options: passed to `pandas.read_csv`. Raises InputError naming the columns that are missing.
    """
    with understood(path, "a table"):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep=separator(path), **options)
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; it has {listed(list(map(str, table.columns)), ', ')}"
        )
    return table


def numbers(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Return columns as float64 (row, column). Raises InputError naming column and row of a non-numeric value."""
    found = np.empty((len(table), len(columns)))
    for k, name in enumerate(columns):
        found[:, k] = pd.to_numeric(table[name], errors="coerce")
        bad = np.flatnonzero(~np.isfinite(found[:, k]))
        if len(bad):
            value = table[name].iloc[bad[0]]
            raise InputError(f"{path}: column {name}, row {bad[0] + 1}: expected a number, got {_plain(value)}")
    return found


def _plain(value: Any) -> str:
    """Format a NumPy scalar for a message."""
    return shown(np.asarray(value).item())


def names_of(path: Path, column: Iterable[Any], what: str = "cell") -> pd.Index:
    """Return names as text. Raises InputError for a name that appears twice."""
    names = pd.Index([name.decode() if isinstance(name, bytes) else str(name) for name in column], dtype=object)
    if not names.is_unique:
        raise InputError(f"{path}: {what} {names[names.duplicated()][0]!r} appears twice")
    return names


def read_counts(path: Path, index: Sequence[str] = ()) -> tuple[pd.DataFrame, pd.Index, csr_matrix]:
    """Read a dense count table: its index columns, the names of the other columns, and counts as CSR (row, column).

    index: columns that contain no counts, by default the first. The file is read in blocks of rows. Raises InputError
    naming row and column of a value that is not a count.
    """
    with understood(path, "a table of counts"):
        header = pd.read_csv(path, sep=separator(path), nrows=0).columns
    keys = list(index or header[:1])
    others = [name for name in header if name not in keys]
    if not others:
        raise InputError(
            f"{path}: expected a column of counts for each feature; got {listed(list(map(str, header)), ', ')}"
        )
    blocks, rows, first = [csr_matrix((0, len(others)), dtype=np.int32)], [pd.DataFrame(columns=keys)], 0
    with understood(path, "a table of counts"):
        size = max(CHUNK_VALUES // len(others), 1)
        kinds: dict[Hashable, Any] = dict.fromkeys(keys, str)
        with pd.read_csv(path, sep=separator(path), chunksize=size, dtype=kinds) as chunks:
            for chunk in chunks:
                blocks.append(csr_matrix(_checked_counts(path, chunk[others], first)))
                rows.append(chunk[keys])
                first += len(chunk)
    return pd.concat(rows[1:] or rows, ignore_index=True), names_of(path, others, "column"), vstack(blocks, "csr")


def _checked_counts(path: Path, block: pd.DataFrame, first: int) -> np.ndarray:
    values = block.to_numpy()
    if values.dtype.kind not in "iu":
        values = block.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    bad = np.argwhere(~(np.isfinite(values) & (values >= 0) & (values == np.rint(values)) & (values < 1 << 31)))
    if len(bad):
        row, column = bad[0]
        where = f"{path}: row {first + row + 1}, column {block.columns[column]}"
        raise InputError(f"{where}: expected a count, got {_plain(block.iloc[row, column])}")
    return values.astype(np.int32)


def count_adata(
    path: Path, counts: csr_matrix, obs: pd.DataFrame, var: pd.DataFrame, spatial: np.ndarray, source: str
) -> AnnData:
    """Build the table that every reader returns.

    counts: (cell, feature) int32. obs, var: indexed by name. spatial: (cell, 2 or 3) in micrometres.
    ``var["is_blank"]`` marks control features; ``uns`` contains the source of the table and the unit. Raises InputError
    if there are no cells.
    """
    from anndata import AnnData

    if not len(obs):
        raise InputError(f"{path}: no cell has both counts and coordinates")
    obs = obs.loc[:, ~obs.columns.duplicated()].copy()
    for name in obs.select_dtypes(object):  # HDF5 cannot store columns of mixed types
        obs[name] = obs[name].map(lambda value: value.decode() if isinstance(value, bytes) else str(value))
    adata = AnnData(X=counts, obs=obs, var=var, obsm={"spatial": np.asarray(spatial, np.float64)})
    adata.uns["source"] = source
    adata.uns["spatial_unit"] = "micrometre"
    return adata


def matched(path: Path, names: pd.Index, other: Path, places: pd.Index) -> np.ndarray:
    """Return the row of the coordinates of each name. Raises InputError if a name has none."""
    row = places.get_indexer(names)
    if (row < 0).any():
        missing = names[row < 0]
        raise InputError(
            f"{other}: {len(missing)} of the {len(names)} cells of {path.name} are missing, the first is {missing[0]!r}"
        )
    return row
