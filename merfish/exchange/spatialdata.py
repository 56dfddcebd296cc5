"""SpatialData stores (scverse): molecules as points, outlines as shapes, counts as the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from merfish import results
from merfish.errors import InputError
from merfish.exchange.run import read_var

MICROMETRE, PIXEL = "micrometre", "pixel"  # coordinate systems: of the stage, and of a mosaic of the fields


def write_spatialdata(run: Path, out: Path) -> None:
    """Write a run as a SpatialData store: points ``transcripts``, shapes ``cells``, ``table`` that annotates them.

    All are in micrometre, and known in the coordinate systems ``micrometre`` and ``pixel``. Molecules are read as they
    are written. Raises InputError where the package spatialdata is missing.
    """
    try:
        import geopandas
        import spatialdata
        from spatialdata.models import PointsModel, ShapesModel, TableModel
        from spatialdata.transformations import Affine, Identity
    except ImportError as error:
        raise InputError(f"--format spatialdata needs {error.name}: pip install 'merfish[spatialdata]'") from error
    import anndata
    import dask.dataframe as dd

    record = results.read_run(run)
    scale = 1 / float(record.get("microns_per_pixel", 1.0))
    left, top = (min(places) for places in zip(*record["stage"]["positions"], strict=True))
    matrix = [[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]]
    frames = {MICROMETRE: Identity(), PIXEL: Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))}
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
    store = spatialdata.SpatialData(points={"transcripts": points}, shapes=shapes, tables={"table": table})
    store.write(out)
