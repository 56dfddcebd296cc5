"""Cells above each other: 3-D segmentation, and outlines and molecules of each plane in a run."""

from __future__ import annotations

import shutil
from itertools import groupby

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import merfish
from merfish import InputError, results
from merfish.cells.counts import read_cells
from merfish.cells.measure import find_stacked_cells
from merfish.cells.merging import in_stage_frame, trim_overlaps
from merfish.cells.stacks import footprints, planes, stack, thickness
from merfish.cells.volume import link
from merfish.config import RunConfig
from merfish.exchange.labels import label_image
from merfish.exchange.merscope import write_merscope
from merfish.imaging.field import aligned_stain, stain_shifts
from merfish.imaging.opening import open_experiment
from merfish.pipeline.assign import assign
from merfish.simulate import simulate_experiment


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A raw experiment of two layers of cells."""
    out = tmp_path_factory.mktemp("layers") / "raw"
    return simulate_experiment(
        out, fields=(1, 2), shape=(224, 224), planes=9, layers=2, drift=2.0, density=0.001, seed=31
    )


def same_volume(outlines, truth, heights):
    """Return whether cells (true, found) match: an intersection over union of their volumes above 0.5.

    outlines: (found, plane) at ``heights``; true cells fill the lower or the upper half of them.
    """
    here = (heights >= heights[-1] / 2) == truth["layer"].to_numpy(bool)[:, None]
    shapes = truth["geometry"].to_numpy(object)[:, None, None]
    common = (shapely.area(shapely.intersection(shapes, outlines)) * here[:, None]).sum(axis=2)
    volume = truth["area"].to_numpy()[:, None] * here.sum(axis=1)[:, None]
    return common / (volume + shapely.area(outlines).sum(axis=1) - common) > 0.5


def f1(same, truth):
    """Return F1, with the recall of cells of which more than half was imaged."""
    recall, precision = same[truth["visible"] > 0.5].any(axis=1).mean(), same.any(axis=0).mean()
    return 2 * recall * precision / (recall + precision)


@pytest.mark.parametrize("fov", [0, 1])
def test_find_stacked_cells__finds_both_layers(raw, fov):
    experiment = open_experiment(raw)
    shifts, _ = stain_shifts(experiment, fov, ["DAPI", "polyT"])
    dapi, polyt = (aligned_stain(experiment, fov, name, shift) for name, shift in shifts.items())
    heights = np.array(experiment.stain("DAPI").z)
    found = find_stacked_cells(dapi, polyt, heights, experiment.microns_per_pixel)
    outlines = planes(in_stage_frame(found.outlines, experiment.positions[fov], experiment.microns_per_pixel))
    truth = read_cells(raw / "truth" / "cells.parquet")
    low = experiment.positions[fov]
    frame = shapely.box(*low, *(low + 223 * experiment.microns_per_pixel))
    whole = truth[shapely.within(truth["geometry"].to_numpy(object), frame) & (truth["visible"] > 0.999)]
    assert len(whole) >= 4
    assert same_volume(outlines, whole, heights).any(axis=1).mean() >= 0.9
    volume = found.measured["depth"] * shapely.area(footprints(found.outlines))
    pixels = (shapely.area(planes(found.outlines)) * thickness(heights)).sum(axis=1)
    assert np.median(np.abs(volume / pixels - 1)) < 0.1
    with pytest.raises(InputError, match="the 9 planes"):
        find_stacked_cells(dapi[:5], polyt, heights, experiment.microns_per_pixel)


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    merfish.run(raw, out=out, config=RunConfig(stacked_cells=True))
    return out


def test_run__has_cells_and_molecules_of_each_plane(raw, done):
    cells, truth = read_cells(done / results.CELLS), read_cells(raw / "truth" / "cells.parquet")
    outlines = planes(shapely.from_wkb(cells["plane_outlines"].to_numpy()))
    heights = np.array(open_experiment(raw).stain("DAPI").z)
    assert f1(same_volume(outlines, truth, heights), truth) >= 0.9
    np.testing.assert_allclose(cells["volume"], (shapely.area(outlines) * thickness(heights)).sum(axis=1))
    np.testing.assert_allclose(shapely.area(cells["geometry"].to_numpy()), cells["area"])
    # no position belongs to two cells
    for plane in outlines.T:
        assert shapely.union_all(plane).area == pytest.approx(shapely.area(plane).sum(), abs=1e-6)
    calls = pd.read_parquet(done / results.TRANSCRIPTS)
    inside = calls[calls["cell_id"] >= 0]
    row = np.searchsorted(cells["cell_id"], inside["cell_id"])
    plane = np.abs(inside["global_z"].to_numpy()[:, None] - heights).argmin(axis=1)
    assert shapely.intersects_xy(outlines[row, plane], inside["global_x"], inside["global_y"]).all()
    assert len(inside) > 0.8 * len(calls)
    counts = inside.groupby("cell_id").size().reindex(cells["cell_id"], fill_value=0)
    assert counts.tolist() == cells["n_transcripts"].tolist()


@pytest.mark.parametrize("per_field", [True, False])
def test_assign__label_images_of_the_planes_of_a_run(done, tmp_path, per_field):
    record, cells = results.read_run(done), read_cells(done / results.CELLS)
    scale, positions = record["microns_per_pixel"], np.array(record["stage"]["positions"])
    outlines = planes(shapely.from_wkb(cells["plane_outlines"].to_numpy()))
    if per_field:
        corners, shape, path = positions, (224, 224), tmp_path / "cells"
        path.mkdir()
        files = [path / f"cells_{fov}.tif" for fov in range(2)]
    else:
        corners, shape, path = positions.min(axis=0)[None], (240, 480), tmp_path / "cells.zarr"
        files = [path]
        x, y = -corners[0] / scale
        transform = f"{1 / scale} 0 {x}\n0 {1 / scale} {y}\n0 0 1\n"
        (tmp_path / "micron_to_mosaic_pixel_transform.csv").write_text(transform)
    for (left, top), file in zip(corners, files, strict=True):
        to_pixels = shapely.transform(outlines, lambda xy, corner=(left, top): (xy - corner) / scale)
        labels = np.stack([label_image(plane, cells["cell_id"].to_numpy(), shape) for plane in to_pixels.T])
        zarr.save_array(str(file), labels) if file.suffix == ".zarr" else tifffile.imwrite(file, labels)
    out = shutil.copytree(done, tmp_path / "run")
    assign(out, path)
    again = read_cells(out / results.CELLS).sort_values("cell_id", ignore_index=True)
    same = planes(shapely.from_wkb(again["plane_outlines"].to_numpy()))
    assert len(again) == len(cells)
    if not per_field:
        common = shapely.area(shapely.intersection(outlines, same)).sum() / shapely.area(outlines).sum()
        assert common > 0.95
        np.testing.assert_allclose(again["volume"], cells["volume"], rtol=0.05)
    before, after = (pd.read_parquet(run / results.TRANSCRIPTS) for run in (done, out))
    assert ((before["cell_id"] >= 0) == (after["cell_id"] >= 0)).mean() > 0.97
    assert after.groupby("cell_id").size().drop(-1).tolist() == again["n_transcripts"].tolist()


def test_merscope__has_the_outlines_of_each_plane(done, tmp_path):
    write_merscope(done, tmp_path / "region")
    rows = pq.read_table(tmp_path / "region" / "cell_boundaries.parquet").to_pandas()
    cells = read_cells(done / results.CELLS)
    outlines = planes(shapely.from_wkb(cells["plane_outlines"].to_numpy()))
    row = np.searchsorted(cells["cell_id"], rows["EntityID"])
    assert shapely.equals(shapely.from_wkb(rows["Geometry"].to_numpy()), outlines[row, rows["ZIndex"]]).all()
    assert len(rows) == (~shapely.is_empty(outlines)).sum() < outlines.size
    # a run uses them
    out = shutil.copytree(done, tmp_path / "run")
    assign(out, tmp_path / "region")
    again = read_cells(out / results.CELLS).set_index("cell_id").loc[cells["cell_id"]]
    assert shapely.equals(planes(shapely.from_wkb(again["plane_outlines"].to_numpy())), outlines).all()
    before, after = (pd.read_parquet(run / results.TRANSCRIPTS) for run in (done, out))
    assert after["cell_id"].tolist() == before["cell_id"].tolist()


TIED = np.array([[[1, 0, 1]], [[1, 0, 2]], [[0, 0, 0]]], np.int32)  # two labels lie on halves of one


@given(hnp.arrays(np.int32, (3, 4, 5), elements=st.integers(0, 3)))
@example(TIED)
def test_link__joins_only_what_lies_on_each_other(labels):
    # labels differ between planes
    labels = labels + np.where(labels > 0, 3 * np.arange(3, dtype=np.int32)[:, None, None], 0)
    dense = np.unique(np.append(labels, 0), return_inverse=True)[1][:-1].reshape(labels.shape)
    linked = link(dense)
    np.testing.assert_array_equal(linked > 0, dense > 0)
    of_plane = {int(label): k for k, plane in enumerate(dense) for label in np.unique(plane) if label}
    pairs = sorted({(int(b), int(a)) for a, b in zip(dense.ravel(), linked.ravel(), strict=True) if a})
    assert len(pairs) == len(of_plane)  # no label is split
    for _, members in groupby(pairs, key=lambda pair: pair[0]):
        layers = sorted(of_plane[label] for _, label in members)
        assert layers == list(range(layers[0], layers[-1] + 1))


def test_part__lets_cells_lie_above_each_other():
    low, high, none = shapely.box(0, 0, 8, 8), shapely.box(2, 2, 9, 9), shapely.Polygon()
    shapes = np.array([[low, low, none], [none, high, high]])
    cells = pd.DataFrame({"cell": [0, 1], "fov": 0, "geometry": stack(shapes)})
    parted = planes(trim_overlaps(cells, cells)["geometry"].to_numpy(object))
    # the first is larger, and keeps the plane in which both lie
    assert shapely.equals(parted, [[low, low, none], [none, shapely.difference(high, low), high]]).all()
    assert shapely.area(footprints(stack(shapes))).tolist() == [64.0, 49.0]
