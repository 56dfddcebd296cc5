"""Readers of two published single-cell data sets in their original formats."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pandas as pd

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

CORTEX_ROWS = (
    "tissue", "group #", "total mRNA mol", "well", "sex", "age", "diameter", "cell_id", "level1class", "level2class",
)  # fmt: skip
HEMATO_COLUMNS = ("cell_id", "barcode", "library_id", "seq_run_id", "pass_filter")
POOR_LIBRARY = "basal_bm1"  # left out, as its authors recommend


def read_cortex(path: str | os.PathLike[str]) -> AnnData:
    """Read CORTEX: 3,005 cells of mouse cortex and hippocampus (Zeisel et al. 2015).

    The tab-separated file ``expression_mRNA_17-Aug-2014.txt`` has ten rows of annotations with their names in the
    second column, an empty row, and one row per gene: name, cluster, counts. Returns an AnnData with counts in X,
    float32 (cell, gene), and the annotations in ``obs``; cell types are in ``level1class``.

    Raises InputError for a file with another layout.
    """
    from anndata import AnnData

    about: dict[str, list[str]] = {}
    genes: list[str] = []
    counts: list[np.ndarray] = []
    with _opened(path) as handle:
        for number, row in enumerate(csv.reader(handle, delimiter="\t"), 1):
            if number <= len(CORTEX_ROWS):
                name = CORTEX_ROWS[number - 1]
                if len(row) < 3 or row[1] != name:
                    raise InputError(f"{path}: row {number} has {row[1:2]} in the second column; expected {name!r}")
                about[name] = row[2:]
            elif len(row) > 1 and row[0]:
                try:
                    counts.append(np.array(row[2:], float))
                except ValueError as error:
                    raise InputError(f"{path}: row {number}, gene {row[0]!r}: {error}") from error
                genes.append(row[0])
    widths = {*map(len, about.values()), *map(len, counts)}
    if len(widths) != 1 or not counts:
        raise InputError(f"{path}: {len(counts)} genes, rows with {sorted(widths)} cells; the file may be truncated")
    obs = pd.DataFrame(about, index=pd.Index(about["cell_id"], name=None)).drop(columns="cell_id")
    return AnnData(np.array(counts, np.float32).T, obs=obs, var=pd.DataFrame(index=genes))


def read_hemato(
    path: str | os.PathLike[str],
    genes: str | os.PathLike[str] | None = None,
    potential: str | os.PathLike[str] | None = None,
) -> AnnData:
    """Read HEMATO: haematopoietic progenitors (Tusi et al. 2018).

    Rows of the file are cells; five columns are annotations, the others genes. Cells that did not pass the authors'
    filter are left out, and so is the library basal_bm1, as they recommend. With all three files, the result has the
    published 4,016 cells and 7,397 genes.

    Parameters
    ----------
    path : ``GSM2388072_basal_bone_marrow.raw_umifm_counts.csv.gz``, or the same as .csv
    genes : ``bBM.filtered_gene_list.paper.txt``, the authors' genes, one per line; all genes if None
    potential : ``bBM.spring_and_pba.csv``; its columns are added to ``obs``, and cells that it lacks are left out

    Returns
    -------
    AnnData with counts in X, float32 (cell, gene)

    Raises
    ------
    InputError : if a file lacks these columns, or if no cell or gene is left
    """
    from anndata import AnnData

    table = _read_csv(path)
    absent = [name for name in HEMATO_COLUMNS if name not in table]
    if absent:
        raise InputError(f"{path}: no column {absent[0]!r}; it has {', '.join(map(str, table.columns[:6]))}, ...")
    passed = table["pass_filter"].astype(str).isin(["1", "1.0", "True"]) & (table["library_id"] != POOR_LIBRARY)
    table = table[passed].set_index("cell_id")
    about = table[[name for name in HEMATO_COLUMNS if name != "cell_id"]]
    names = [name for name in table.columns if name not in HEMATO_COLUMNS]
    if genes is not None:
        with _opened(genes) as handle:
            wanted = handle.read().split()
        names = [name for name in wanted if name in table.columns]
    if potential is not None:
        more = _read_csv(potential)
        if "cell_id" not in more:
            raise InputError(f"{potential}: no column 'cell_id'; it has {', '.join(map(str, more.columns[:6]))}")
        more = more.set_index("cell_id")
        about = about.join(more[[name for name in more if name not in about]], how="inner")
    if about.empty or not names:
        raise InputError(
            f"{path}: {len(about)} cells and {len(names)} genes are left; check that the files belong together"
        )
    counts = table.loc[about.index, names].to_numpy(np.float32)
    return AnnData(counts, obs=about.rename_axis(None).astype({"library_id": str}), var=pd.DataFrame(index=names))


def _opened(path: str | os.PathLike[str]) -> TextIO:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    return Path(path).open(encoding="utf-8", newline="")


def _read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return pd.read_csv(path)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
