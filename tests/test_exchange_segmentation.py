from __future__ import annotations

import gzip
import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import merfish
from command import call
from merfish import InputError, results
from merfish._parquet import geo_schema
from merfish.cells.counts import assign_cells, read_cells
from merfish.exchange.geojson import read_geojson
from merfish.exchange.labels import label_image, label_outlines, read_label_outlines
from merfish.exchange.outlines import read_outlines
from merfish.imaging import _header
from merfish.pipeline import assign as assigning
from merfish.pipeline.assign import assign
from merfish.pipeline.segmentations import find_segmentation
from merfish.transcripts import read_transcripts

pytestmark = pytest.mark.usefixtures("short_reports")

SQUARES = [shapely.box(0, 0, 4, 4), shapely.box(10, 0, 14, 4)]


# --- files --------------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 0, 1, 2, 7]))
)
def test_label_image_to_outlines_and_back(labels):
    found, outlines = label_outlines(labels)
    assert found.tolist() == sorted(set(labels.ravel().tolist()) - {0})
    assert shapely.is_valid(outlines).all()
    assert shapely.area(outlines).tolist() == [(labels == label).sum() for label in found]
    np.testing.assert_array_equal(label_image(outlines, found, labels.shape), labels)


def test_label_outlines__join_planes():
    planes = np.zeros((2, 5, 5), int)
    planes[0, 1:3, 1:3] = planes[1, 2:4, 2:4] = 3
    (label,), (outline,) = label_outlines(planes)
    assert (label, outline.area) == (3, 7.0)


@pytest.mark.parametrize("most", [1, 1 << 26])
def test_label_images__of_every_format_in_blocks(monkeypatch, tmp_path, most):
    monkeypatch.setattr(_header, "MOST_BLOCK", most)
    labels = np.zeros((2, 40, 50), np.uint16)
    labels[0, 3:9, 4:30], labels[0, 20:40, 33:50], labels[1, 5:37, 2:8] = 7, 2, 7
    np.save(tmp_path / "a.npy", labels)
    tifffile.imwrite(tmp_path / "b.tif", labels, compression="zlib")
    tifffile.imwrite(tmp_path / "c.ome.tif", labels, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "d.tif", labels, tile=(16, 32), compression="zlib", byteorder=">")
    tifffile.imwrite(tmp_path / "e.tif", labels, rowsperstrip=7, compression="lzw")
    chunked = zarr.create_array(str(tmp_path / "f.zarr"), shape=labels.shape, chunks=(1, 16, 16), dtype=float)
    chunked[:] = labels  # chunks of zeros have no file
    np.save(tmp_path / "g_seg.npy", {"masks": labels, "outlines": labels * 0, "est_diam": 30.0})
    found, outlines = label_outlines(labels)
    assert found.tolist() == [2, 7]
    for path in tmp_path.iterdir():
        shape, same, again = read_label_outlines(path)
        assert (shape, same.tolist()) == (labels.shape, [2, 7]), path.name
        assert shapely.equals_exact(again, outlines).all(), path.name


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_label_image__of_no_labels(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    labels = np.full((5, 7), 0.5, np.float32)
    np.save(path, labels) if suffix == "npy" else tifffile.imwrite(path, labels)
    with pytest.raises(InputError, match=rf"a\.{suffix}: expected a label image of integers, got float32"):
        read_label_outlines(path)


class Harm:
    def __reduce__(self):
        return (open, ("harm", "w"))


@pytest.mark.parametrize("content", [{"masks": Harm()}, Harm(), {"other": 1}, [1, {"masks": np.ones(3)}]])
def test_cellpose_file__is_never_unpickled(monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    np.save("x_seg.npy", np.array([{"masks": 1}, content], dtype=object)[1:], allow_pickle=True)
    with pytest.raises(InputError, match=r"save the masks as \.tif or \.npy"):
        read_label_outlines("x_seg.npy")
    assert not (tmp_path / "harm").exists()


def polygon(square):
    return {"type": "Polygon", "coordinates": [list(map(list, square.exterior.coords))]}


def features(key):
    return [
        {"type": "Feature", "geometry": polygon(square), "properties": {key: k + 5}} for k, square in enumerate(SQUARES)
    ]


def test_read_outlines__of_everyones_polygons(tmp_path):
    proseg = {"type": "FeatureCollection", "features": features("cell")}
    with gzip.open(tmp_path / "proseg.geojson.gz", "wt") as file:
        json.dump(proseg, file)
    baysor = [{**polygon(square), "cell": k + 5} for k, square in enumerate(SQUARES)]
    (tmp_path / "baysor.json").write_text(json.dumps({"geometries": baysor, "type": "GeometryCollection"}))
    (tmp_path / "lines.geojson").write_text("\n".join(map(json.dumps, features("cell_id"))))
    wkb = pa.array(shapely.to_wkb(shapely.multipolygons([[square] for square in SQUARES])), pa.binary())
    # MERSCOPE has one row per plane
    table = pa.table({"EntityID": [6, 5, 6], "ZIndex": [0, 0, 1], "Geometry": [wkb[1], wkb[0], wkb[1]]})
    pq.write_table(table.replace_schema_metadata(geo_schema(table.schema, "Geometry").metadata), tmp_path / "m.parquet")
    for path in tmp_path.iterdir():
        found = read_outlines(path)
        assert found["cell_id"].tolist() == [5, 6], path.name
        assert shapely.equals(found["geometry"].to_numpy(), SQUARES).all(), path.name


def test_read_outlines__numbers_cells_with_names(tmp_path):
    cells = features("id")
    cells[0]["properties"]["id"], cells[1]["properties"]["id"] = "aaab-1", "aaac-1"
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": cells}))
    found = read_outlines(tmp_path / "a.geojson")
    assert found[["cell_id", "name"]].to_numpy().tolist() == [[1, "aaab-1"], [2, "aaac-1"]]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_read_geojson__in_pieces_of_any_size(monkeypatch, tmp_path, size):
    monkeypatch.setattr("merfish.exchange.geojson.CHUNK", size)
    path = tmp_path / "a.geojson"
    path.write_text("\n".join(map(json.dumps, features("cell"))))
    assert read_geojson(path)[0] == [5, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "FeatureCollection", "features": [{"type": "Feature"}]}', "feature 1: expected a Polygon"),
        ('{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}', "got 'Point'"),
        ('{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1]]]}}]}', "feature 1: its coordin"),
        ('{"features": [{"geometry": {"type": "Pol', "feature 1: not JSON"),
        ('{"features": [', "the file ends within the collection"),
        ("not json", "feature 1: not JSON"),
    ],
)
def test_read_geojson__names_the_faulty_feature(tmp_path, text, message):
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(InputError, match=message):
        read_geojson(tmp_path / "a.geojson")


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def pixel_labels(out, folder):
    """Write the cells of a run as a label image per field, with cell + 100 in field 1: numbers need not agree."""
    folder.mkdir()
    record = results.read_run(out)
    cells = read_cells(out / results.CELLS)
    for fov, position in enumerate(record["stage"]["positions"]):
        move = lambda xy, at=position: (xy - at) / record["microns_per_pixel"]  # noqa: E731
        outlines = shapely.transform(cells["geometry"].to_numpy(), move)
        labels = label_image(outlines, cells["cell_id"].to_numpy(), record["fields"][str(fov)]["shape"])
        tifffile.imwrite(folder / f"fov{fov}_masks.tif", np.where((labels > 0) & (fov == 1), labels + 100, labels))


def test_assign__own_cells_give_the_same_results(done, copy_of_run, tmp_path):
    shutil.copy(done / results.CELLS, tmp_path / "cells.parquet")
    assign(copy_of_run, tmp_path / "cells.parquet")
    assert (copy_of_run / results.TRANSCRIPTS).read_bytes() == (done / results.TRANSCRIPTS).read_bytes()
    before, after = (anndata.read_h5ad(out / results.CELL_BY_GENE) for out in (done, copy_of_run))
    after = after[before.obs_names]  # rows are sorted by field, here the one that contains the centre of a cell
    shared = [name for name in after.obs if name != "fov"]  # nuclei and stains of such cells are not measured
    pd.testing.assert_frame_equal(after.obs[shared], before.obs[shared])
    assert {"volume", "n_transcripts", "is_empty"} <= set(shared)
    assert abs(after.layers["expected"] - before.layers["expected"]).max() < 1e-5
    pd.testing.assert_frame_equal(after.var, before.var)
    assert (after.X != before.X).nnz == 0
    record = results.read_run(copy_of_run)
    assert record["segmentation"]["path"] == str(tmp_path / "cells.parquet")
    assert record["figures"] == results.read_run(done)["figures"]
    assert not [path for path in copy_of_run.glob("**/.*") if path.name != ".lock"]


def test_assign__labels_of_each_field_make_one_cell_of_those_that_cross(done, copy_of_run, tmp_path):
    pixel_labels(done, tmp_path / "labels")
    assign(copy_of_run, tmp_path / "labels")
    before, after = (read_transcripts(out / results.TRANSCRIPTS)["cell_id"] for out in (done, copy_of_run))
    # each new cell is an old one: no cell was cut at a border or merged with another
    both = (before >= 0) & (after >= 0)
    pairs = pd.crosstab(before[both], after[both])
    assert pairs.max(axis=1).sum() > 0.98 * len(before[both])
    assert ((before >= 0) == (after >= 0)).mean() > 0.97
    n_cells = len(read_cells(done / results.CELLS))
    assert abs(len(read_cells(copy_of_run / results.CELLS)) - n_cells) <= 0.05 * n_cells


def test_assign__writes_all_or_nothing(monkeypatch, done, copy_of_run):
    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(assigning, "_write_placed", disk_full)
    with pytest.raises(OSError, match="no space left"):
        assign(copy_of_run, done / results.CELLS)
    for name in (results.TRANSCRIPTS, results.CELLS, results.CELL_BY_GENE, results.RUN, results.REPORT):
        assert (copy_of_run / name).read_bytes() == (done / name).read_bytes(), name


def test_run_with_a_segmentation__and_back(raw, done, copy_of_run, tmp_path):
    names = [*"abcdefgh"]
    cells = read_cells(done / results.CELLS)[: len(names)].assign(cell_id=names)
    shapes = [
        {"id": row.cell_id, "geometry": json.loads(shapely.to_geojson(row.geometry))} for row in cells.itertuples()
    ]
    (tmp_path / "some.geojson").write_text(json.dumps({"features": shapes}))
    table = merfish.run(raw, out=copy_of_run, segmentation=tmp_path / "some.geojson")
    assert sorted(table.obs["name"]) == names
    calls = read_transcripts(copy_of_run / results.TRANSCRIPTS)
    expected = assign_cells(calls["global_x"], calls["global_y"], cells["geometry"].to_numpy(), np.arange(1, 9))
    assert calls["cell_id"].tolist() == expected.tolist()
    written = (copy_of_run / results.RUN).read_bytes()
    merfish.run(raw, out=copy_of_run, segmentation=tmp_path / "some.geojson")
    assert (copy_of_run / results.RUN).read_bytes() == written  # nothing has changed
    merfish.run(raw, out=copy_of_run)
    for name in (results.TRANSCRIPTS, results.CELLS, results.CELL_BY_GENE):
        assert (copy_of_run / name).read_bytes() == (done / name).read_bytes(), name
    assert f"cells from {tmp_path / 'some.geojson'} are replaced" in (copy_of_run / results.LOG).read_text()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda f: tifffile.imwrite(f / "fov0.tif", np.ones((9, 9), int)),
            "no file for field 1, 2, 3; expected one file",
        ),
        (lambda f: [tifffile.imwrite(f / f"{k}.tif", np.ones((9, 9), int)) for k in range(4)], "labels have 9 x 9 px"),
        (
            lambda f: [np.save(f / f"{k}.npy", np.ones((256, 256)) / 2) for k in range(4)],
            "expected a label image",
        ),
        (lambda f: (f / "0.geojson").write_text(json.dumps({"features": features("id")})), "no file for field 1, 2, 3"),
    ],
)
def test_assign__refuses_files_that_do_not_fit(copy_of_run, tmp_path, write, message):
    (tmp_path / "cells").mkdir()
    write(tmp_path / "cells")
    with pytest.raises(InputError, match=message):
        assign(copy_of_run, tmp_path / "cells")


def test_assign__refuses_other_units_and_says_so(monkeypatch, copy_of_run, tmp_path, capsys):
    far = [{"geometry": polygon(shapely.box(9000, 9000, 9100, 9100))}]
    (tmp_path / "a.geojson").write_text(json.dumps({"features": far}))
    assert call(monkeypatch, "assign", copy_of_run, "--segmentation", tmp_path / "a.geojson") == 2
    assert "its cells span x 9000 to 9100" in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "whole.tif", np.ones((300, 300), int))
    assert call(monkeypatch, "assign", copy_of_run, "--segmentation", tmp_path / "whole.tif") == 2
    assert "needs micron_to_mosaic_pixel_transform.csv beside it" in capsys.readouterr().err


def test_assign__label_image_of_the_section_by_its_transform(copy_of_run, tmp_path):
    left, low, right, high = shapely.total_bounds(read_cells(copy_of_run / results.CELLS)["geometry"].to_numpy())
    labels = np.zeros((100, 100), np.uint8)
    labels[:, :50], labels[:, 50:] = 1, 2
    tifffile.imwrite(tmp_path / "mosaic.tif", labels)
    per_micron = 100 / max(right - left, high - low)
    matrix = [[per_micron, 0, -left * per_micron - 0.5], [0, per_micron, -low * per_micron - 0.5], [0, 0, 1]]
    np.savetxt(tmp_path / "micron_to_mosaic_pixel_transform.csv", matrix)
    assign(copy_of_run, tmp_path / "mosaic.tif")
    calls = read_transcripts(copy_of_run / results.TRANSCRIPTS)
    middle = left + 50 / per_micron
    inside = calls[calls["cell_id"] >= 0]
    assert len(inside) > 100
    assert (inside["cell_id"] == np.where(inside["global_x"] < middle, 1, 2)).all()


def test_assign__of_no_run_makes_nothing(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "assign", tmp_path / "none", "--segmentation", tmp_path) == 2
    assert "expected that of a finished run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_find_segmentation__of_cellpose_beside_its_images(tmp_path):
    for name in ("a_0.tif", "a_1.tif", "a_0_seg.npy", "a_1_seg.npy", "notes1.txt"):
        (tmp_path / name).touch()
    assert find_segmentation(tmp_path, [0, 1]).files == {k: tmp_path / f"a_{k}_seg.npy" for k in (0, 1)}


def test_find_segmentation__of_a_merscope_folder(tmp_path):
    (tmp_path / "cell_boundaries.parquet").touch()
    assert find_segmentation(tmp_path, [0, 1]).path == tmp_path / "cell_boundaries.parquet"
