"""Xenium's output folder (10x Genomics)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from merfish.exchange._reading import count_adata, find_file, matched, names_of, numbers, read_columns
from merfish.exchange.tenx import read_10x_h5

if TYPE_CHECKING:
    from anndata import AnnData

CENTRE = ["x_centroid", "y_centroid"]


def read_xenium(folder: str | os.PathLike[str]) -> AnnData:
    """Read cells of ``cell_feature_matrix.h5`` at the centroids in ``cells.parquet`` (or ``.csv.gz``), in micrometres.

    Controls and unassigned codewords are marked in ``var["is_blank"]``. Raises InputError naming file, column and row.
    """
    matrix = find_file(Path(folder), "cell_feature_matrix.h5")
    path = find_file(Path(folder), "cells.parquet", "cells.csv.gz", "cells.csv")
    barcodes, var, counts = read_10x_h5(matrix)
    cells = read_columns(path, ["cell_id", *CENTRE])
    cells.index = names_of(path, cells["cell_id"])
    cells = cells.iloc[matched(matrix, barcodes, path, cells.index)]
    return count_adata(matrix, counts, cells.drop(columns=CENTRE), var, numbers(path, cells, CENTRE), "xenium")
