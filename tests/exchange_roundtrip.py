"""Results of a run as read by squidpy, spatialdata-io, spatialdata and geopandas; run by `.ci/exchange`."""

from __future__ import annotations

import shutil

import anndata
import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
import spatialdata_io
import squidpy
from spatialdata.transformations import get_transformation

import merfish
from merfish import results
from merfish.exchange.geojson import write_geojson
from merfish.exchange.merscope import write_merscope
from merfish.exchange.spatialdata import write_spatialdata
from merfish.imaging.ngff import open_image
from merfish.mosaic import section_images, write_mosaic


@pytest.fixture(scope="module")
def table(done):
    return anndata.read_h5ad(done / results.CELL_BY_GENE)


@pytest.fixture(scope="module")
def calls(done):
    return pd.read_parquet(done / results.TRANSCRIPTS)


@pytest.fixture(scope="module")
def cells(done):
    return geopandas.read_parquet(done / results.CELLS)


@pytest.fixture(scope="module")
def merscope(done, tmp_path_factory):
    out = tmp_path_factory.mktemp("vizgen") / "region_0"
    write_merscope(done, out)
    return out


def dense(matrix):
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)


def test_cells_are_geoparquet(cells, table):
    assert cells.crs is None
    assert cells.geometry.is_valid.all()
    np.testing.assert_allclose(cells.geometry.area, cells["area"])
    assert cells["cell_id"].astype(str).tolist() == table.obs_names.tolist()


def test_squidpy_reads_merscope(merscope, table):
    found = squidpy.read.vizgen(
        merscope,
        counts_file="cell_by_gene.csv",
        meta_file="cell_metadata.csv",
        transformation_file="micron_to_mosaic_pixel_transform.csv",
    )
    blank = table.var["is_blank"].to_numpy()
    assert found.var_names.tolist() == table.var_names[~blank].tolist()
    np.testing.assert_array_equal(dense(found.X), dense(table[:, ~blank].X))
    np.testing.assert_array_equal(dense(found.obsm["blank_genes"]), dense(table[:, blank].X))
    np.testing.assert_allclose(found.obsm["spatial"], table.obsm["spatial"])
    assert found.obs["transcript_count"].tolist() == table.obs["n_transcripts"].tolist()


def test_spatialdata_io_reads_merscope(merscope, table, calls, cells):
    store = spatialdata_io.merscope(merscope, z_layers=None)
    (points,), (shapes,) = store.points.values(), store.shapes.values()
    points = points.compute()
    np.testing.assert_allclose(points[["x", "y"]], calls[["global_x", "global_y"]])
    renamed = calls["is_blank"] & ~calls["gene"].str.startswith("Blank-")
    names = calls["gene"].astype(object).where(~renamed, "Blank-" + calls["gene"])
    assert points["gene"].astype(str).tolist() == names.tolist()
    assert points["cell_id"].tolist() == calls["cell_id"].tolist()
    assert shapes.index.tolist() == cells["cell_id"].astype(str).tolist()
    assert shapely.equals(shapes.geometry.to_numpy(), cells.geometry.to_numpy()).all()
    blank = table.var["is_blank"].to_numpy()
    np.testing.assert_array_equal(dense(store.tables["table"].X), dense(table[:, ~blank].X))


@pytest.fixture(scope="module")
def store(raw, done, tmp_path_factory):
    """Return the SpatialData store of a run with saved images, and the folder of that run."""
    run = tmp_path_factory.mktemp("with_images") / "out"
    shutil.copytree(done, run)
    merfish.run(raw, out=run, save_images=True)
    path = run.parent / "run.zarr"
    write_spatialdata(run, path, section_images(run))
    return spatialdata.read_zarr(path), run


def test_spatialdata_store(store, table, calls, cells):
    store, _ = store
    assert set(store.coordinate_systems) == {"global", "pixel"}
    points = store.points["transcripts"].compute().sort_values("transcript_id")
    np.testing.assert_allclose(points[["x", "y", "z"]], calls[["global_x", "global_y", "global_z"]])
    assert points["gene"].astype(str).tolist() == calls["gene"].tolist()
    assert points["cell_id"].tolist() == calls["cell_id"].tolist()
    found = store.shapes["cells"]
    assert found.index.tolist() == cells["cell_id"].tolist()
    assert shapely.equals(found.geometry.to_numpy(), cells.geometry.to_numpy()).all()
    annotated = store.tables["table"]
    np.testing.assert_array_equal(dense(annotated.X), dense(table.X))
    joined, _ = spatialdata.join_spatialelement_table(store, "cells", table=annotated, how="inner")
    assert len(joined["cells"]) == len(cells)


def test_spatialdata_store__holds_the_mosaics(store, tmp_path):
    store, run = store
    assert spatialdata.models.get_channel_names(store.images["stains"]) == ["DAPI", "polyT"]
    assert spatialdata.models.get_channel_names(store.images["overview"]) == ["overview"]
    for k, (name, channel) in enumerate([("stains", "DAPI"), ("stains", "polyT"), ("overview", "overview")]):
        levels = open_image(write_mosaic(run, tmp_path / f"{k}.zarr", channel))[0]
        image = store.images[name]
        assert len(image.children) == len(levels) > 1
        found = image["scale0"]["image"].sel(c=channel).to_numpy()
        np.testing.assert_array_equal(found, levels[0][0, 0])


def test_spatialdata_store__has_images_where_the_cells_are(store):
    store, run = store
    image = store.images["stains"]
    stain = image["scale0"]["image"].sel(c="polyT").to_numpy()
    # coordinates of an image begin at the border of its first pixel
    middles = np.indices(stain.shape)[::-1].reshape(2, -1) + 0.5
    first = {"global": results.mosaic_origin(results.read_run(run)), "pixel": [0, 0]}
    for system, corner in first.items():
        cells = spatialdata.transform(store.shapes["cells"], to_coordinate_system=system)
        matrix = get_transformation(image, system).to_affine_matrix(("x", "y"), ("x", "y"))
        x, y = matrix[:2, :2] @ middles + matrix[:2, 2:]
        np.testing.assert_allclose([x[0], y[0]], corner, atol=1e-9)
        inside = shapely.intersects_xy(shapely.union_all(cells.geometry.to_numpy()), x, y)
        assert stain.ravel()[inside].mean() > 1.5 * stain.ravel()[~inside].mean()


def test_geopandas_reads_geojson(done, tmp_path, cells):
    write_geojson(done, tmp_path / "cells.geojson")
    found = geopandas.read_file(tmp_path / "cells.geojson")
    assert found["cell_id"].tolist() == cells["cell_id"].tolist()
    assert shapely.equals_exact(found.geometry.to_numpy(), cells.geometry.to_numpy(), 1e-9).all()


def test_squidpy_works_on_the_table(table):
    squidpy.gr.spatial_neighbors(table, coord_type="generic", n_neighs=4)
    assert table.obsp["spatial_connectivities"].shape == (table.n_obs, table.n_obs)
