"""Layers of the viewer as plain data."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import shapely

import merfish
from command import call
from merfish import mosaic, results, viewer
from merfish.cells.counts import read_cells
from merfish.imaging.ngff import open_image
from merfish.mosaic import Tile, blend
from merfish.pipeline.images import BITS, image_folder
from merfish.simulate import simulate_experiment


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewed")
    raw = simulate_experiment(folder / "tissue", fields=(1, 2), shape=(160, 160), drift=2.0, seed=5)
    merfish.run(raw, out=folder / "out", save_images=True)
    return folder / "out"


def by_name(layers):
    return {layer.options["name"]: layer for layer in layers}


def test_layers_of_a_field__lie_on_each_other(done):
    run = results.read_run(done)
    layers = by_name(viewer.layers_of_field(done, 1))
    assert {"DAPI", "polyT", "bit1", "bit16", "cells", "molecules", "blanks"} <= set(layers)
    x, y = run["stage"]["positions"][1]
    image = layers["bit3"]
    assert image.options["translate"] == [y, x]
    assert image.options["scale"] == [run["microns_per_pixel"]] * 2
    full = open_image(image_folder(done, 1) / BITS)[0][0]
    np.testing.assert_array_equal(np.asarray(image.data[0]), full[2, 0])
    kept = pd.read_parquet(done / results.TRANSCRIPTS)
    kept = kept[(kept["fov"] == 1) & ~kept["is_blank"]]
    shown = {tuple(place) for place in layers["molecules"].data}
    assert {(row.global_y, row.global_x) for row in kept.itertuples()} <= shown
    # molecules lie on light of their bits
    pixels = (layers["molecules"].data - image.options["translate"]) / image.options["scale"]
    rows, columns = np.clip(np.rint(pixels).astype(int), 0, 159).T
    brightest = np.max([layers[f"bit{k}"].data[0] for k in range(1, 17)], axis=0)
    assert np.median(brightest[rows, columns]) > 5 * np.median(brightest)


def test_layers_of_a_field__without_saved_images_show_the_overview(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    shutil.rmtree(out / results.IMAGES)
    assert set(by_name(viewer.layers_of_field(out, 0))) >= {"overview", "cells", "molecules"}
    with pytest.raises(merfish.InputError, match="no results of field 7; the run has fields from 0 to 1"):
        viewer.layers_of_field(out, 7)


def test_layers_of_the_section__hold_everything_or_say_of_how_much(done, monkeypatch):
    layers = by_name(viewer.layers_of_section(done))
    kept = pd.read_parquet(done / results.TRANSCRIPTS)
    assert len(layers["molecules"].data) + len(layers["blanks"].data) == len(kept)
    assert [level.shape[0] for level in layers["DAPI"].data] == [160]
    assert layers["DAPI"].data[0].shape == layers["overview"].data[0].shape
    length = shapely.length(read_cells(done / results.CELLS)["geometry"].to_numpy()).sum()
    assert np.hypot(*layers["cells"].data[:, 1].T).sum() == pytest.approx(length)
    monkeypatch.setattr(viewer, "MOST_POINTS", 100)
    monkeypatch.setattr(viewer, "MOST_OUTLINES", 2)
    layers = by_name(viewer.layers_of_section(done))
    step = -(-len(kept) // 100)
    assert 80 < len(layers[f"molecules, one of {step}"].data) <= 100
    assert layers["centres of cells"].kind == "points"


def test_lazy_mosaic__is_the_mosaic(monkeypatch):
    monkeypatch.setattr(mosaic, "BLOCK", 20)
    images = list(np.random.default_rng(0).normal(size=(3, 30, 40)).astype(np.float32))
    corners = np.array([[0, 0], [33.4, 2.0], [5.0, 25.6]])
    fields = [Tile(image, *place) for image, place in zip(images, ((0, 0), (2, 33), (26, 5)), strict=True)]
    whole = mosaic.lazy_mosaic(images, corners)
    expected = blend(fields, slice(0, 56), slice(0, 73), np.dtype("float32"))
    np.testing.assert_allclose(whole.compute(), expected, atol=1e-6)


def test_view__adds_every_layer_and_says_what_is_missing(done, monkeypatch, capsys):
    added = []

    class Viewer:
        def __init__(self, title):
            pass

        def __getattr__(self, name):
            return lambda data, **options: added.append((name, options["name"]))

    fake = type(sys)("napari")
    fake.Viewer, fake.run = Viewer, lambda: added.append("run")
    monkeypatch.setitem(sys.modules, "napari", fake)
    assert call(monkeypatch, "view", done, "--fov", 0) == 0
    assert {("add_image", "DAPI"), ("add_vectors", "cells"), ("add_points", "molecules")} <= set(added)
    assert added[-1] == "run"
    monkeypatch.setitem(sys.modules, "napari", None)
    assert call(monkeypatch, "view", done) == 2
    assert "pip install 'merfish[viewer]'" in capsys.readouterr().err
