"""Slide-seq: counts and positions of beads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from merfish.errors import InputError
from merfish.exchange._reading import count_adata, find_file, names_of, numbers, read_counts, separator, understood

if TYPE_CHECKING:
    from anndata import AnnData

MICRONS_PER_PIXEL = 0.65  # of the images in which Slide-seq and Slide-seqV2 locate beads


def read_slideseq(folder: str | os.PathLike[str], microns_per_pixel: float = MICRONS_PER_PIXEL) -> AnnData:
    """Read the beads that have both counts and a position, in micrometres.

    folder: contains ``*digital_expression*``, ``*counts*`` or ``MappedDGEForR*`` (beads in columns or rows, detected by
    their names) and ``*location*`` (bead, x, y in pixels, with or without a header). Raises InputError naming file, row
    and column.
    """
    root = Path(folder)
    path = find_file(root, "*digital_expression*", "MappedDGEForR*", "*counts*", "*expression*")
    where = find_file(root, "*ocation*")
    places = _read_locations(where)
    rows, columns, counts = read_counts(path)
    names = names_of(path, rows.iloc[:, 0], "row")
    if columns.isin(places.index).sum() > names.isin(places.index).sum():
        names, columns, counts = columns, names, counts.T.tocsr()
    known = names.isin(places.index)
    if not known.any():
        raise InputError(f"{path}: no row or column is a bead of {where}, whose first bead is {places.index[0]!r}")
    beads = names[known]
    var = pd.DataFrame({"is_blank": np.zeros(len(columns), bool)}, index=columns.rename("gene"))
    spatial = places.loc[beads].to_numpy() * microns_per_pixel
    return count_adata(path, counts[np.flatnonzero(known)], pd.DataFrame(index=beads), var, spatial, "slideseq")


def _read_locations(path: Path) -> pd.DataFrame:
    """Read positions of beads: columns x, y in pixels, indexed by barcode."""
    with understood(path, "locations of beads"):
        table = pd.read_csv(path, sep=separator(path), header=None, dtype=str)
    if table.shape[1] < 3 or not len(table):
        raise InputError(f"{path}: expected columns bead, x, y; got {table.shape[1]} columns in {len(table)} rows")
    table = table.iloc[:, -3:]  # some files begin with a column of row numbers
    if pd.to_numeric(table.iloc[:1, 1], errors="coerce").isna().all():
        table = table.iloc[1:]
    table.columns = pd.Index(["bead", "x", "y"])
    values = numbers(path, table, ["x", "y"])
    return pd.DataFrame(values, columns=["x", "y"], index=names_of(path, table["bead"], "bead"))
