from __future__ import annotations

import importlib.util
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import shapely

from command import call
from merfish import results
from merfish.cells.counts import read_cells
from merfish.exchange.merscope import read_merscope
from merfish.exchange.outlines import read_outlines
from merfish.exchange.plain import read_csv
from merfish.pipeline.assign import assign
from merfish.transcripts import read_transcripts

pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def table(done):
    return anndata.read_h5ad(done / results.CELL_BY_GENE)


@pytest.mark.parametrize(("kind", "read"), [("merscope", read_merscope), ("csv", read_csv)])
def test_tables_come_back(monkeypatch, tmp_path, done, table, kind, read):
    assert call(monkeypatch, "export", done, "--format", kind, "--out", tmp_path / "there") == 0
    back = read(tmp_path / "there")
    assert (back.X != table.X).nnz == 0
    assert back.obs_names.tolist() == table.obs_names.tolist()
    assert back.var["is_blank"].tolist() == table.var["is_blank"].tolist()
    np.testing.assert_allclose(back.obsm["spatial"], table.obsm["spatial"], rtol=1e-12)


def test_outlines_come_back_as_the_same_cells(monkeypatch, tmp_path, done):
    cells = read_cells(done / results.CELLS).sort_values("cell_id")
    copy = shutil.copytree(done, tmp_path / "copy")
    for kind in ("merscope", "geojson"):
        assert call(monkeypatch, "export", done, "--format", kind, "--out", tmp_path / f"cells.{kind}") == 0
        path = tmp_path / "cells.geojson" if kind == "geojson" else tmp_path / "cells.merscope/cell_boundaries.parquet"
        found = read_outlines(path)
        assert found["cell_id"].tolist() == sorted(cells["cell_id"])
        differs = shapely.symmetric_difference(found["geometry"].to_numpy(), cells["geometry"].to_numpy())
        assert shapely.area(differs).max() < 1e-9
        assign(copy, path.parent if kind == "merscope" else path)
        assert (copy / results.TRANSCRIPTS).read_bytes() == (done / results.TRANSCRIPTS).read_bytes()


def test_baysor_has_every_molecule(monkeypatch, tmp_path, done):
    assert call(monkeypatch, "export", done, "--format", "baysor", "--out", tmp_path / "molecules.csv") == 0
    found, calls = pd.read_csv(tmp_path / "molecules.csv"), read_transcripts(done / results.TRANSCRIPTS)
    np.testing.assert_allclose(found[["x", "y", "z"]], calls[["global_x", "global_y", "global_z"]], rtol=1e-12)
    assert found["gene"].tolist() == calls["gene"].tolist()
    assert found["cell"].tolist() == calls["cell_id"].clip(lower=0).tolist()


def test_merscope_tables_have_vizgens_columns(monkeypatch, tmp_path, done):
    out = tmp_path / "region_0"
    assert call(monkeypatch, "export", done, "--format", "merscope", "--out", out) == 0
    expected = "EntityID fov volume center_x center_y min_x min_y max_x max_y anisotropy transcript_count "
    expected += "perimeter_area_ratio solidity"
    cells = pd.read_csv(out / "cell_metadata.csv")
    assert cells.columns.tolist() == expected.split()
    assert cells["solidity"].between(0.5, 1).all()
    assert (cells["anisotropy"] >= 1).all()
    assert cells["center_x"].between(cells["min_x"], cells["max_x"]).all()
    calls = pd.read_csv(out / "detected_transcripts.csv", index_col=0)
    expected = "barcode_id global_x global_y global_z x y fov gene transcript_id cell_id"
    assert calls.columns.tolist() == expected.split()
    # the transform maps micrometres to pixels of a mosaic whose first pixel is that of the first field
    matrix = np.loadtxt(out / "images" / "micron_to_mosaic_pixel_transform.csv")
    pixel = calls[["global_x", "global_y"]].to_numpy() @ matrix[:2, :2].T + matrix[:2, 2]
    first = calls["fov"].to_numpy() == 0
    assert np.ptp(pixel[first] - calls.loc[first, ["x", "y"]].to_numpy(), axis=0).max() < 1e-3


def test_export__writes_whole_or_not_at_all(monkeypatch, tmp_path, done, capsys):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merfish.exchange.merscope._write_cells", disk_full)
    assert call(monkeypatch, "export", done, "--format", "merscope", "--out", tmp_path / "out") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    assert call(monkeypatch, "export", done, "--format", "csv", "--out", tmp_path / "there") == 2
    assert "already exists" in capsys.readouterr().err
    assert call(monkeypatch, "export", tmp_path / "there", "--format", "csv", "--out", tmp_path / "new") == 2
    assert "expected the folder of a finished run" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("spatialdata") is not None, reason="the package is there")
def test_export_to_spatialdata__says_what_is_missing(monkeypatch, tmp_path, done, capsys):
    assert call(monkeypatch, "export", done, "--format", "spatialdata", "--out", tmp_path / "a.zarr") == 2
    assert "pip install 'merfish[spatialdata]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
