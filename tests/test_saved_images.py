"""Registered images saved by a run, mosaics of them, and the layers of a viewer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import merfish
from command import call
from merfish import mosaic, results
from merfish.config import RunConfig
from merfish.imaging import ngff
from merfish.imaging.field import aligned_stain, register_field, stain_shifts
from merfish.imaging.images import read_stack
from merfish.imaging.opening import open_experiment
from merfish.pipeline import images
from merfish.pipeline.survey import read_calibration
from merfish.simulate import simulate_experiment

pytestmark = pytest.mark.usefixtures("short_reports")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return simulate_experiment(
        tmp_path_factory.mktemp("raw") / "tissue", fields=(1, 2), shape=(160, 160), drift=2.0, seed=5
    )


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    merfish.run(raw, out=out, save_images=True)
    return out


def saved(out):
    """Return names and bytes of all files with images."""
    root = out / results.IMAGES
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_saved_images__are_the_registered_ones(raw, done):
    experiment, config = open_experiment(raw), RunConfig()
    calibration = read_calibration(done)
    field = register_field(experiment, 1, config, calibration)
    levels, names = ngff.open_image(images.image_folder(done, 1) / images.BITS)
    assert names == [bit.name for bit in experiment.bits]
    height = calibration.normalization.scale[:, None, None, None]
    np.testing.assert_array_less(np.abs(levels[0][:] - field.bits) / height, 1 / 1000)
    shifts, _ = stain_shifts(experiment, 1, ["DAPI", "polyT"])
    stains = {name: aligned_stain(experiment, 1, name, shift)[0] for name, shift in shifts.items()}
    kept, names = ngff.open_image(images.image_folder(done, 1) / images.STAINS)
    assert names == list(stains)
    np.testing.assert_allclose(kept[0][:, 0], np.stack(list(stains.values())), atol=0.5001)


def test_saved_bits__decode_to_the_molecules_of_the_run(raw, done):
    stack = read_stack(images.image_folder(done, 0) / images.BITS)
    scale = read_calibration(done).normalization
    from merfish.decoding.methods import decode_filtered

    calls = decode_filtered(stack, open_experiment(raw).codebook, scale)
    found = pd.read_parquet(done / results.ALL_TRANSCRIPTS, filters=[("fov", "==", 0)])
    assert abs(len(calls) - len(found)) <= 0.03 * len(found)


@pytest.mark.parametrize("how", ["workers", "afterwards"])
def test_saved_images__are_the_same_bytes_by_every_route(raw, done, tmp_path, how):
    out = tmp_path / "out"
    if how == "afterwards":
        shutil.copytree(done, out)
        shutil.rmtree(out / results.IMAGES / "fov_0001")
        (out / results.IMAGES / ".fov_0001.abcdef12").mkdir()
        (out / results.IMAGES / "fov_0000" / images.BITS / "0" / "c" / "3" / "0" / "0" / "0").unlink()
        before = (out / results.RUN).stat().st_mtime_ns
        merfish.run(raw, out=out, save_images=True)
        assert (out / results.RUN).stat().st_mtime_ns == before
    else:
        merfish.run(raw, out=out, save_images=True, workers=2)
    assert saved(out) == saved(done)
    assert (out / results.TRANSCRIPTS).read_bytes() == (done / results.TRANSCRIPTS).read_bytes()


def test_saved_images__of_an_earlier_run_are_refused(raw, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    path = out / results.IMAGES / "fov_0000" / "record.json"
    path.write_text(path.read_text().replace('"program"', '"other"'))
    with pytest.raises(merfish.InputError, match=r"fov_0000: no saved images .* --save-images"):
        images.saved_channels(out, 0)
    assert set(images.saved_channels(out, 1)) == {"DAPI", "polyT", *(f"bit{k}" for k in range(1, 17))}


def test_ngff__metadata_say_where_each_level_lies(tmp_path):
    levels = ngff.create_image(tmp_path / "a.zarr", (1, 2, 600, 300), "uint16", ["DAPI"], (1.5, 0.1, 0.2), (5.0, 7.0))
    assert [level.shape for level in levels] == [(1, 2, 600, 300), (1, 2, 300, 150), (1, 2, 150, 75)]
    ome = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    assert ome["version"] == "0.5"
    assert [axis["name"] for axis in ome["multiscales"][0]["axes"]] == list("czyx")
    scale, move = (ome["multiscales"][0]["datasets"][2]["coordinateTransformations"][k] for k in (0, 1))
    assert scale == {"type": "scale", "scale": [1.0, 1.5, 0.4, 0.8]}
    np.testing.assert_allclose(move["translation"], [0, 0, 5.15, 7.3])


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_halve__is_the_mean_of_the_pixels_that_are_there(image):
    found = ngff.halve(image)
    assert found.shape == tuple(-(-side // 2) for side in image.shape)
    for y, x in np.ndindex(found.shape):
        part = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert abs(found[y, x] - part.mean()) <= 0.51


def test_fill_levels__by_tiles_is_as_halving_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(ngff, "TILE", 64)
    monkeypatch.setattr(ngff, "CHUNK", 32)
    monkeypatch.setattr(ngff, "SMALLEST", 60)
    whole = np.random.default_rng(0).normal(size=(2, 1, 201, 130)).astype(np.float32)
    levels = ngff.create_image(tmp_path / "a.zarr", whole.shape, "float32", ["a", "b"], (1, 1, 1))
    levels[0][:] = whole
    ngff.fill_levels(levels)
    for level in levels:
        np.testing.assert_allclose(level[:], whole, atol=1e-6)
        whole = ngff.halve(whole)
    assert levels[-1].shape == (2, 1, 51, 33)


# --- mosaics ------------------------------------------------------------------------------------------------------


def test_blend__by_tiles_is_the_weighted_mean_of_all_fields():
    rng = np.random.default_rng(0)
    fields = [mosaic.Tile(rng.normal(size=(40, 30)), row, column) for row, column in ((0, 0), (3, 22), (35, 5))]
    total, weights = np.zeros((75, 60)), np.zeros((75, 60))
    for field in fields:
        for y, x in np.ndindex(40, 30):
            weight = min(y, 39 - y, x, 29 - x) + 1
            total[field.row + y, field.column + x] += weight * field.image[y, x]
            weights[field.row + y, field.column + x] += weight
    expected = np.divide(total, weights, out=np.zeros_like(total), where=weights > 0)
    for y in (slice(0, 32), slice(32, 75)):
        for x in (slice(0, 50), slice(50, 60)):
            found = mosaic.blend(fields, y, x, np.dtype("float32"))
            np.testing.assert_allclose(found, expected[y, x], atol=1e-5)


@pytest.mark.parametrize("channel", ["DAPI", "bit3", "overview"])
def test_mosaic__shows_each_field_at_its_place(done, tmp_path, monkeypatch, channel):
    monkeypatch.setattr(ngff, "TILE", 64)
    monkeypatch.setattr(ngff, "CHUNK", 32)
    assert call(monkeypatch, "mosaic", done, "--channel", channel, "--out", tmp_path / "m.zarr") == 0
    assert call(monkeypatch, "mosaic", done, "--channel", channel, "--out", tmp_path / "m.ome.tif") == 0
    levels, names = ngff.open_image(tmp_path / "m.zarr")
    assert names == [channel]
    whole = levels[0][0, 0]
    run = results.read_run(done)
    places, scale = np.array(run["stage"]["positions"]), run["microns_per_pixel"]
    shift = np.rint((places[1] - places[0]) / scale).astype(int)
    assert whole.shape == (160, 160 + shift[0])
    image = mosaic.field_image(done, 1, channel)
    alone = slice(20, 160)  # right of the overlap
    np.testing.assert_array_equal(whole[:, shift[0] + 20 :], image[..., :, alone].reshape(160, 140))
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as file:
        series = file.series[0]
        assert (series.axes, len(series.levels)) == ("YX", len(levels))
        for k, level in enumerate(levels):
            np.testing.assert_array_equal(series.levels[k].asarray(), level[0, 0])
        assert f'PhysicalSizeX="{scale}"' in file.ome_metadata


def test_mosaic__says_what_there_is(done, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "mosaic", done, "--channel", "bit99", "--out", tmp_path / "m.zarr") == 2
    assert "no saved image 'bit99'; it has DAPI, polyT, bit1" in capsys.readouterr().err
    assert call(monkeypatch, "mosaic", done, "--out", tmp_path / "m.png") == 2
    assert "expected a name that ends in .zarr" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
