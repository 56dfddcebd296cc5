"""Counts and coordinates as plain CSV."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely

from merfish.exchange._reading import count_adata, find_file, matched, names_of, numbers, read_columns, read_counts
from merfish.exchange.run import cell_tables, count_blocks, read_var, transcript_tables, write_dense, write_tables

if TYPE_CHECKING:
    from anndata import AnnData


def read_csv(folder: str | os.PathLike[str], microns_per_pixel: float = 1.0) -> AnnData:
    """Read cells of ``counts.csv`` at the coordinates in ``coordinates.csv``, in micrometres.

    counts.csv: cell, then one column per feature; features with blank, notarget or negative in their names are marked
    in ``var["is_blank"]``. coordinates.csv: cell, x, y and optionally z; other columns are copied to ``obs``. Both may
    be .tsv, and compressed. microns_per_pixel: factor applied to the coordinates. Raises InputError naming file, row
    and column.
    """
    path = find_file(Path(folder), "counts.csv", "counts.csv.gz", "counts.tsv", "counts.tsv.gz")
    stem = "coordinates"
    where = find_file(Path(folder), f"{stem}.csv", f"{stem}.csv.gz", f"{stem}.tsv", f"{stem}.tsv.gz")
    rows, genes, counts = read_counts(path)
    names = names_of(path, rows.iloc[:, 0])
    cells = read_columns(where, ["cell", "x", "y"], dtype={"cell": str})
    cells.index = names_of(where, cells["cell"])
    cells = cells.iloc[matched(path, names, where, cells.index)]
    axes = [axis for axis in "xyz" if axis in cells]
    var = pd.DataFrame({"is_blank": is_control(genes)}, index=genes.rename("gene"))
    spatial = numbers(where, cells, axes) * microns_per_pixel
    return count_adata(path, counts, cells.drop(columns=["cell", *axes]), var, spatial, "csv")


def is_control(genes: pd.Index) -> np.ndarray:
    """Return which features are controls, by their names."""
    return np.asarray(genes.str.lower().str.contains("blank|notarget|negative|negcontrol|control_"), dtype=bool)


def write_csv(run: Path, out: Path) -> None:
    """Write a run into a new folder: transcripts.csv, cells.csv (outlines as WKT), and the input of `read_csv`."""
    out.mkdir()
    write_tables(out / "transcripts.csv", transcript_tables(run))
    write_dense(out / "counts.csv", "cell", read_var(run).index, count_blocks(run))
    places = {"cell_id": "cell", "center_x": "x", "center_y": "y"}
    with (
        open(out / "cells.csv", "w", encoding="utf-8", newline="") as cell_file,
        open(out / "coordinates.csv", "w", encoding="utf-8", newline="") as place_file,
    ):
        for k, cells in enumerate(cell_tables(run)):
            outlines = shapely.to_wkt(cells["geometry"].to_numpy(object), rounding_precision=6)
            cells.assign(geometry=outlines).to_csv(cell_file, header=k == 0, index=False)
            cells[list(places)].rename(columns=places).to_csv(place_file, header=k == 0, index=False)
