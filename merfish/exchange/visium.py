"""Visium's and Visium HD's output folder (10x Genomics' Space Ranger)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from merfish._files import read_json
from merfish._text import shown
from merfish.errors import InputError
from merfish.exchange._reading import count_adata, find_file, matched, names_of, numbers, read_columns
from merfish.exchange.tenx import read_10x_h5

if TYPE_CHECKING:
    from anndata import AnnData

# Space Ranger before 2.0 wrote positions without a header
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
PLACE = ["pxl_col_in_fullres", "pxl_row_in_fullres"]  # x, y
SPOT = 65.0  # micrometres; diameter of a spot, which Space Ranger states in pixels


def read_visium(folder: str | os.PathLike[str]) -> AnnData:
    """Read spots of ``filtered_feature_bc_matrix.h5`` at positions in ``spatial/tissue_positions*``, in micrometres.

    Positions are in pixels of the full image, and are scaled by ``microns_per_pixel`` (Visium HD) of
    ``scalefactors_json.json``, or by the diameter of a spot in it. Raises InputError naming file, column and row.
    """
    matrix = find_file(Path(folder), "filtered_feature_bc_matrix.h5", "*filtered_feature_bc_matrix.h5")
    spatial = Path(folder) / "spatial"
    path = find_file(spatial, "tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    headerless = {"header": None, "names": COLUMNS} if path.name == "tissue_positions_list.csv" else {}
    scale = microns_per_pixel(find_file(spatial, "scalefactors_json.json"))
    barcodes, var, counts = read_10x_h5(matrix)
    spots = read_columns(path, COLUMNS, **headerless)
    spots.index = names_of(path, spots["barcode"], "barcode")
    spots = spots.iloc[matched(matrix, barcodes, path, spots.index)]
    adata = count_adata(
        matrix,
        counts,
        spots[["in_tissue", "array_row", "array_col"]],
        var,
        numbers(path, spots, PLACE) * scale,
        "visium",
    )
    adata.uns["microns_per_pixel"] = scale
    return adata


def microns_per_pixel(path: Path) -> float:
    """Read the scale of the full image. Raises InputError if the file does not contain it."""
    values = read_json(path)
    factors = values if isinstance(values, dict) else {}
    scale, spot = factors.get("microns_per_pixel"), factors.get("spot_diameter_fullres")
    given = scale if scale is not None else spot
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e6:
        raise InputError(f"{path}: expected a positive microns_per_pixel or spot_diameter_fullres, got {shown(given)}")
    return float(given) if scale is not None else SPOT / float(given)
