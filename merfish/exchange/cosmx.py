"""CosMx' flat files (NanoString, Bruker)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from merfish.exchange._reading import count_adata, find_file, matched, names_of, numbers, read_columns, read_counts

if TYPE_CHECKING:
    from anndata import AnnData

MICRONS_PER_PIXEL = 0.12028  # of the instrument's images; 0.18 for those of the first alpha instruments
KEY = ["fov", "cell_ID"]
CENTRE = ["CenterX_global_px", "CenterY_global_px"]
_CONTROLS = "^(?:negprb|negative|systemcontrol|falsecode|custom_negprb)"


def read_cosmx(folder: str | os.PathLike[str], microns_per_pixel: float = MICRONS_PER_PIXEL) -> AnnData:
    """Read cells of ``*exprMat_file.csv`` at the global centres in ``*metadata_file.csv`` (compressed or not).

    The centres are converted to micrometres. Cells are named ``FOV_CELL``; molecules outside cells (cell 0) are
    omitted. Negative probes and system controls are marked in ``var["is_blank"]``. Raises InputError naming file, row
    and column.
    """
    path = find_file(Path(folder), "*exprMat_file.csv", "*exprMat_file.csv.gz")
    where = find_file(Path(folder), "*metadata_file.csv", "*metadata_file.csv.gz")
    # later exports repeat the name of the cell
    extra = [name for name in ("cell", "cell_id") if name in read_columns(path, KEY, nrows=0)]
    rows, genes, counts = read_counts(path, [*KEY, *extra])
    inside = np.flatnonzero(rows["cell_ID"] != "0")
    names = names_of(path, (rows["fov"] + "_" + rows["cell_ID"]).iloc[inside])
    cells = read_columns(where, [*KEY, *CENTRE], dtype=dict.fromkeys(KEY, str))
    cells.index = names_of(where, cells["fov"] + "_" + cells["cell_ID"])
    cells = cells.iloc[matched(path, names, where, cells.index)]
    var = pd.DataFrame({"is_blank": genes.str.lower().str.contains(_CONTROLS)}, index=genes.rename("gene"))
    spatial = numbers(where, cells, CENTRE) * microns_per_pixel
    return count_adata(path, counts[inside], cells, var, spatial, "cosmx")
