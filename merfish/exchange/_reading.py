"""What the readers of vendors' folders share: files found, columns checked, counts as CSR, one table."""

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

CHUNK_VALUES = 1 << 24  # of a dense table of counts that are in memory at a time


def find_file(folder: Path, *patterns: str) -> Path:
    """The one file that matches the first pattern with a match. Raises InputError if there is none, or several."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with {' or '.join(patterns)}")
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            raise InputError(
                f"{folder}: expected one file {pattern}, got {listed([path.name for path in found], ', ')}"
            )
        if found:
            return found[0]
    raise InputError(f"{folder}: no file {' or '.join(patterns)}")


@contextmanager
def understood(path: Path, what: str) -> Iterator[None]:
    """Turn what pandas and Arrow raise on a file that they cannot understand into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: cannot be read as {what}: {error or type(error).__name__}") from error


def separator(path: Path) -> str:
    """Comma of .csv, tab of .tsv and .txt, packed or not."""
    return "," if ".csv" in path.suffixes else "\t"


def read_columns(path: Path, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """A table (.csv, .tsv, .txt, packed or not, or .parquet) that has these columns, others too.

    options: for `pandas.read_csv`. Raises InputError naming the columns that are missing.
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
    """Columns as float64 (row, column). Raises InputError naming the column, and the row by its first value."""
    found = np.empty((len(table), len(columns)))
    for k, name in enumerate(columns):
        found[:, k] = pd.to_numeric(table[name], errors="coerce")
        bad = np.flatnonzero(~np.isfinite(found[:, k]))
        if len(bad):
            value = table[name].iloc[bad[0]]
            raise InputError(f"{path}: column {name}, row {bad[0] + 1}: expected a number, got {_told(value)}")
    return found


def _told(value: Any) -> str:
    return shown(np.asarray(value).item())


def names_of(path: Path, column: Iterable[Any], what: str = "cell") -> pd.Index:
    """Names as text, each once. Raises InputError naming one that stands twice."""
    names = pd.Index([name.decode() if isinstance(name, bytes) else str(name) for name in column], dtype=object)
    if not names.is_unique:
        raise InputError(f"{path}: {what} {names[names.duplicated()][0]!r} stands twice")
    return names


def read_counts(path: Path, index: Sequence[str] = ()) -> tuple[pd.DataFrame, pd.Index, csr_matrix]:
    """A dense table of counts as text: the columns that name its rows, names of the others, and CSR (row, column).

    index: columns that are no counts; the first one if none is given. It is read some rows at a time. Raises InputError
    naming row and column of what is no count.
    """
    with understood(path, "a table of counts"):
        header = pd.read_csv(path, sep=separator(path), nrows=0).columns
    keys = list(index or header[:1])
    others = [name for name in header if name not in keys]
    if not others:
        raise InputError(f"{path}: expected counts, a column a feature; got {listed(list(map(str, header)), ', ')}")
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
        raise InputError(f"{where}: expected a count, got {_told(block.iloc[row, column])}")
    return values.astype(np.int32)


def count_adata(
    path: Path, counts: csr_matrix, obs: pd.DataFrame, var: pd.DataFrame, spatial: np.ndarray, source: str
) -> AnnData:
    """The table that every reader returns.

    counts (cell, feature) of int32; obs, var by their names; spatial (cell, 2 or 3) micrometre. ``var["is_blank"]``
    marks control features; ``uns`` says where the table comes from, and the unit. Raises InputError without cells.
    """
    from anndata import AnnData

    if not len(obs):
        raise InputError(f"{path}: no cell has both counts and a place")
    obs = obs.loc[:, ~obs.columns.duplicated()].copy()
    for name in obs.select_dtypes(object):  # mixed values cannot be written
        obs[name] = obs[name].map(lambda value: value.decode() if isinstance(value, bytes) else str(value))
    adata = AnnData(X=counts, obs=obs, var=var, obsm={"spatial": np.asarray(spatial, np.float64)})
    adata.uns["source"] = source
    adata.uns["spatial_unit"] = "micrometre"
    return adata


def matched(path: Path, names: pd.Index, other: Path, places: pd.Index) -> np.ndarray:
    """For each name the row of its place. Raises InputError if one has no place."""
    row = places.get_indexer(names)
    if (row < 0).any():
        missing = names[row < 0]
        raise InputError(
            f"{other}: {len(missing)} of the {len(names)} cells of {path.name} are not there, the first {missing[0]!r}"
        )
    return row
