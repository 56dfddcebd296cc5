"""SpatialData stores (scverse): images, molecules as points, outlines as shapes, counts as the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish import results
from merfish.errors import InputError
from merfish.exchange.run import read_var
from merfish.imaging.ngff import CHUNK, count_levels

# Coordinate systems: micrometres in the frame of the stage, under the default name that readers use; and pixels of a
# mosaic of the fields, with the centre of the first pixel at 0.
MICROMETRE, PIXEL = "global", "pixel"


def write_spatialdata(run: Path, out: Path, images: Mapping[str, tuple[Any, list[str]]] | None = None) -> None:
    """Write a run as a SpatialData store: points ``transcripts``, shapes ``cells``, and ``table`` that annotates them.

    images: mosaics from `merfish.mosaic.section_images`, stored at several resolutions. All elements have the
    coordinate systems ``global`` (micrometres) and ``pixel``. Molecules and images are read while they are written.
    Raises InputError if the package spatialdata is not installed.
    """
    try:
        import geopandas
        import spatialdata
        from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
        from spatialdata.transformations import Affine, Identity, Translation
    except ImportError as error:
        raise InputError(f"--format spatialdata needs {error.name}: pip install 'merfish[spatialdata]'") from error
    import anndata
    import dask.dataframe as dd

    def affine(scale: float, shift: np.ndarray) -> Affine:
        matrix = [[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]]
        return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))

    record = results.read_run(run)
    scale, origin = float(record.get("microns_per_pixel", 1.0)), results.mosaic_origin(record)
    frames = {MICROMETRE: Identity(), PIXEL: affine(1 / scale, -origin / scale)}
    # SpatialData has the corner of the first pixel, not its centre, at 0
    of_images = {MICROMETRE: affine(scale, origin - scale / 2), PIXEL: Translation([-0.5, -0.5], axes=("x", "y"))}
    molecules = dd.read_parquet(run / results.TRANSCRIPTS)
    molecules = molecules.rename(columns={"x": "x_pixel", "y": "y_pixel", "z": "plane"})
    molecules["gene"] = molecules["gene"].astype(pd.CategoricalDtype(read_var(run).index.to_list()))
    points = PointsModel.parse(
        molecules,
        coordinates={axis: f"global_{axis}" for axis in "xyz"},
        feature_key="gene",
        instance_key="cell_id",
        transformations=frames,
    )
    cells = geopandas.read_parquet(run / results.CELLS).set_index("cell_id")
    table = anndata.read_h5ad(run / results.CELL_BY_GENE)
    table.obs["region"] = "cells"
    table.obs["region"] = table.obs["region"].astype("category")
    shapes = {"cells": ShapesModel.parse(cells, transformations=frames)} if len(cells) else {}
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id")
    pictures = {
        name: Image2DModel.parse(
            image,
            dims=("c", "y", "x"),
            c_coords=channels,
            scale_factors=[2] * (count_levels(image.shape) - 1),
            chunks=(1, CHUNK, CHUNK),
            transformations=of_images,
        )
        for name, (image, channels) in (images or {}).items()
    }
    store = spatialdata.SpatialData(
        images=pictures, points={"transcripts": points}, shapes=shapes, tables={"table": table}
    )
    store.write(out)
