"""Folders of registered stacks, run as experiments."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

import merfish
from merfish import InputError, results
from merfish.imaging.frames import read_bits
from merfish.imaging.opening import open_experiment
from merfish.imaging.preflight import preflight
from merfish.simulate import match_calls, simulate_stack
from merfish.transcripts import read_transcripts

SCALE = 0.1  # micrometres per pixel
STEP = 96  # pixels from the first field to the second
BOOK = merfish.mhd4_codebook([f"G{k}" for k in range(40)])


@pytest.fixture
def folder(tmp_path):
    """Two fields of 128 x 128 px cut from one stack, one as TIFF, the other as .npy of floats."""
    from merfish.codebook import write_codebook

    stack, truth = simulate_stack(BOOK, (128, 128 + STEP), seed=4)
    root = tmp_path / "stacks"
    root.mkdir()
    tifffile.imwrite(root / "stack_000.tif", stack[..., :128], photometric="minisblack")
    np.save(root / "stack_001.npy", stack[..., STEP:].astype(np.float32))
    write_codebook(BOOK, root / "codebook.csv")
    (root / "positions.csv").write_text(f"5,7\n{5 + STEP * SCALE},7\n")
    (root / "microscope.json").write_text(json.dumps({"microns_per_pixel": SCALE}))
    truth.to_parquet(tmp_path / "truth.parquet")
    return root


def test_run__of_registered_stacks(folder, tmp_path):
    table = merfish.run(folder, out=tmp_path / "out")
    assert table.n_obs == 0  # no stain
    calls = read_transcripts(tmp_path / "out" / results.TRANSCRIPTS)
    truth = pd.read_parquet(tmp_path / "truth.parquet")
    places = calls[["barcode_id"]].assign(x=(calls["global_x"] - 5) / SCALE, y=(calls["global_y"] - 7) / SCALE)
    paired, _ = match_calls(places, truth)
    assert len(paired) > 0.75 * len(truth)
    assert len(paired) > 0.9 * len(calls)  # each is counted once
    assert set(calls["fov"]) == {0, 1}
    assert "already registered" in (tmp_path / "out" / results.REPORT).read_text()


def test_open_experiment__planes_and_stains(folder):
    for path in folder.glob("stack_*"):
        path.unlink()
    stack = np.arange(16 * 2 * 9 * 8, dtype=np.uint16).reshape(16, 2, 9, 8)
    zarr.save_array(str(folder / "stack_0.zarr"), stack)
    tifffile.imwrite(folder / "stack_1.ome.tif", stack.swapaxes(0, 1), metadata={"axes": "ZCYX"})
    tifffile.imwrite(folder / "DAPI_0.tif", stack[0, 0])
    tifffile.imwrite(folder / "DAPI_1.tif", stack[0, 1])
    opened = open_experiment(folder)
    assert opened.z == (0.0, 1.0)
    assert [stain.name for stain in opened.stains] == ["DAPI"]
    for fov in (0, 1):
        assert (read_bits(opened, fov) == stack).all()


def test_preflight__lists_stacks_that_do_not_fit(folder):
    np.save(folder / "stack_001.npy", np.zeros((15, 128, 128), np.float32))
    listing = preflight(open_experiment(folder))
    assert listing.loc[listing["problem"] != "", "file"].tolist() == ["stack_001.npy"]
    (folder / "stack_001.npy").unlink()
    assert [problem[:7] for problem in preflight(open_experiment(folder))["problem"]] == ["", "missing"]


def break_bits(folder):
    tifffile.imwrite(folder / "stack_000.tif", np.zeros((15, 8, 8), np.uint16), photometric="minisblack")


def break_fields(folder):
    np.save(folder / "stack_2.npy", np.zeros((16, 8, 8)))


def break_names(folder):
    np.save(folder / "stack_0.npy", np.zeros((16, 8, 8)))


def break_scale(folder):
    (folder / "microscope.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_bits, "stack_000.tif: 15 images, which is not a multiple of the codebook's 16 bits"),
        (break_fields, "stack_2.npy: .*positions.csv lists 2 fields"),
        (break_names, "stack_0.npy and stack_000.tif are both 'stack' of field 0"),
        (break_scale, "microscope.json"),
    ],
)
def test_open_experiment__rejects_stacks(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        open_experiment(folder)


def test_read_bits__rejects_nan(folder):
    stack = np.load(folder / "stack_001.npy")
    stack[3, 5, 5] = np.nan
    np.save(folder / "stack_001.npy", stack)
    with pytest.raises(InputError, match=r"stack_001.npy: .* found NaN"):
        read_bits(open_experiment(folder), 1)
