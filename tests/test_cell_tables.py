"""Cell tables of a run: stains, depth, expected counts, genes imaged one by one, custom segmenters."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile

import merfish
from merfish import InputError, results
from merfish.cells.counts import assign_cells, read_cells
from merfish.cells.measure import depths, find_cells, load_segmenter
from merfish.cells.segmentation import segment
from merfish.config import RunConfig
from merfish.decoding.sequential import brighter_beside, find_molecules
from merfish.demo import match_cells
from merfish.imaging.opening import open_experiment
from merfish.imaging.preprocess import bandpass
from merfish.pipeline.assemble import COUNT_DTYPE
from merfish.pipeline.assign import assign
from merfish.pipeline.record import run_summary
from merfish.pipeline.tables import CHUNK, CountFile
from merfish.simulate import simulate_experiment
from merfish.simulate.optics import Imaging, expose, photons
from merfish.transcripts import read_transcripts

pytestmark = pytest.mark.usefixtures("short_reports")

MPP, SHAPE = 0.108, (400, 400)
GENES = ("Malat1", "Gene001")  # the second is also in the codebook


def smfish(raw, per_cell, seed=0):
    """Add genes imaged one by one, one frame each, to a simulated experiment; returns true counts (cell, gene)."""
    rng = np.random.default_rng(seed)
    cells = read_cells(raw / "truth" / "cells.parquet")
    outlines, counts = cells["geometry"].to_numpy(), np.zeros((len(cells), len(GENES)))
    low_x, low_y, high_x, high_y = shapely.total_bounds(outlines)
    drift = pd.read_csv(raw / "truth" / "drift.csv").groupby("fov").last()
    fields = pd.read_csv(raw / "truth" / "fields.csv")
    frames = {fov: [] for fov in fields["fov"]}
    for gene in range(len(GENES)):
        n = int(per_cell * len(cells) * 3)
        x, y = rng.uniform(low_x, high_x, n), rng.uniform(low_y, high_y, n)
        cell = assign_cells(x, y, outlines, cells["cell_id"].to_numpy())
        amount = rng.gamma(1.0, 0.4, len(cells)).clip(max=1)  # cells differ
        stay = (cell > 0) & (rng.random(n) < np.append(amount, 0)[cell - 1])
        x, y, cell = x[stay], y[stay], cell[stay]
        counts[:, gene] = np.bincount(cell - 1, minlength=len(cells))
        light = np.exp(rng.normal(0, 0.3, (len(x), 1)))
        for field in fields.itertuples():
            px = (x - field.x) / MPP + drift.at[field.fov, "dx"]
            py = (y - field.y) / MPP + drift.at[field.fov, "dy"]
            near = (px > -9) & (py > -9) & (px < SHAPE[1] + 9) & (py < SHAPE[0] + 9)
            image = photons(
                py[near], px[near], np.zeros(near.sum()), light[near], np.array([1.35]), np.array([400.0]),
                (1, *SHAPE), Imaging(),
            )  # fmt: skip
            frames[field.fov].append(expose(image[0], Imaging(), np.random.SeedSequence([seed, gene, field.fov]))[0])
    for fov, images in frames.items():
        tifffile.imwrite(raw / f"smfish_{fov:03d}_09.tif", np.stack(images), photometric="minisblack")
    table = raw / "data_organization.csv"
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for frame, gene in enumerate(GENES):
        one = {"channelName": gene, "readoutName": gene, "imageType": "smfish", "imagingRound": 9, "frame": frame}
        rows.append({**rows[-1 - frame], **one, "color": "650"})  # with the beads of the stains
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return counts


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    raw = simulate_experiment(tmp_path_factory.mktemp("raw") / "e", fields=(1, 2), shape=SHAPE, density=0.004, seed=8)
    return raw, smfish(raw, per_cell=25)


@pytest.fixture(scope="module")
def done(experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    merfish.run(experiment[0], out=out)
    return out


def matched(done, raw):
    """Return the rows of found cells and of the matching true cells, for cells that are imaged whole."""
    truth = read_cells(raw / "truth" / "cells.parquet")
    match = match_cells(read_cells(done / results.CELLS)["geometry"].to_numpy(), truth["geometry"].to_numpy())
    whole = np.flatnonzero((match >= 0) & (truth["visible"].to_numpy() > 0.999))
    return match[whole], whole


def test_run__counts_genes_imaged_one_by_one(done, experiment):
    raw, truth = experiment
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    assert table.var_names[table.var["sequential"]].tolist() == ["Malat1", "Gene001_sequential"]
    assert not table.var.loc[table.var["sequential"], "is_blank"].any()
    spots = pd.read_parquet(done / results.SEQUENTIAL)
    inside = spots[spots["cell_id"] >= 0].groupby("gene").size()
    assert table[:, table.var["sequential"]].X.sum(axis=0).A1.tolist() == inside[list(GENES)].tolist()
    cells = read_cells(done / results.CELLS)
    again = assign_cells(spots["global_x"], spots["global_y"], cells["geometry"].to_numpy(), cells["cell_id"])
    np.testing.assert_array_equal(again, spots["cell_id"])
    assert any(re.fullmatch(r"spots of .*: Malat1 \d+, Gene001 [\d,]+", line) for line in run_summary(done)["lines"])
    found, real = matched(done, raw)
    assert len(found) > 20
    counts = table[:, table.var["sequential"]].X.toarray()[found]
    for gene in range(len(GENES)):
        assert np.corrcoef(counts[:, gene], truth[real, gene])[0, 1] > 0.97
        assert counts[:, gene].sum() == pytest.approx(truth[real, gene].sum(), rel=0.1)


def test_run__tells_depth_stains_and_nuclei_of_cells(done, experiment):
    cells = read_cells(done / results.CELLS)
    np.testing.assert_allclose(cells["volume"], cells["area"])  # one plane
    assert cells["nucleus_area"].div(cells["area"]).median() == pytest.approx(0.32, abs=0.06)
    for stain in ("DAPI", "polyT"):
        np.testing.assert_allclose(cells[f"{stain}_total"], cells[f"{stain}_mean"] * cells["area"] / MPP**2)
    # a nucleus has at least 500 photons over a background of 60 and an offset of 100
    dark = cells["DAPI_mean"] - 160
    assert (dark / (cells["nucleus_area"] / cells["area"])).median() == pytest.approx(600, rel=0.2)
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    assert {"polyT_mean", "polyT_total", "nucleus_area", "nuclear_fraction", "is_empty"} <= set(table.obs)
    full = table.obs["n_transcripts"] > 20
    assert table.obs.loc[full, "nuclear_fraction"].mean() == pytest.approx(0.32, abs=0.08)


def test_run__expects_as_many_as_the_probabilities_say(done):
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    calls = read_transcripts(done / results.TRANSCRIPTS)
    inside = calls[calls["cell_id"] >= 0]
    assert table.layers["expected"].dtype == np.float32
    word = ~table.var["sequential"].to_numpy()
    assert table.layers["expected"][:, word].sum() == pytest.approx(inside["probability"].sum(), rel=1e-5)
    assert (table.layers["expected"] > table.X).nnz == 0
    some = inside[inside["cell_id"] == inside["cell_id"].mode()[0]]
    by_gene = some.groupby("gene")["probability"].sum()
    row = table[str(some["cell_id"].iloc[0]), by_gene.index].layers["expected"]
    np.testing.assert_allclose(np.asarray(row.todense()).ravel(), by_gene, rtol=1e-5)
    np.testing.assert_array_equal(table.obs["n_transcripts"], table[:, word].X.sum(axis=1).A1)
    np.testing.assert_array_equal(table.obs["is_empty"], table.obs["n_transcripts"] == 0)


def test_count_file__of_blocks_of_cells_reads_as_the_table_of_all(tmp_path):
    rng = np.random.default_rng(0)
    var = pd.DataFrame({"is_blank": [False, False, True]}, pd.Index(["a", "b", "blank"], name="gene"))
    sizes = (CHUNK - 1, 0, 3, 2)  # one block ends within a chunk of the file, one is empty, one crosses its end
    n = sum(sizes)
    cells = pd.DataFrame({"cell_id": np.arange(1, n + 1), "fov": np.repeat(np.int32([0, 1, 2, 3]), sizes)})
    cells = cells.assign(center_x=rng.random(n), center_y=rng.random(n), is_empty=rng.random(n) < 0.5)
    row, word = np.nonzero(rng.random((n, 3)) < 0.3)
    pairs = np.zeros(len(row), COUNT_DTYPE)
    pairs["cell"], pairs["word"], pairs["count"] = row, word, rng.integers(1, 9, len(row))
    pairs["expected"] = pairs["count"] * np.float32(0.5)
    with CountFile(tmp_path / "blocks.h5ad", var, cells.iloc[:0]) as file:
        for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
            own = pairs[(row >= stop - size) & (row < stop)]
            own["cell"] -= stop - size
            file.append(own, cells.iloc[stop - size : stop])
    dense = {name: np.zeros((n, 3), COUNT_DTYPE[name]) for name in ("count", "expected")}
    for name, values in dense.items():
        values[row, word] = pairs[name]
    table = anndata.read_h5ad(tmp_path / "blocks.h5ad")
    np.testing.assert_array_equal(table.X.todense(), dense["count"])
    np.testing.assert_array_equal(table.layers["expected"].todense(), dense["expected"])
    np.testing.assert_array_equal(table.obsm["spatial"], cells[["center_x", "center_y"]])
    pd.testing.assert_frame_equal(table.obs, cells.set_index(cells["cell_id"].astype(str).rename(None)))
    with h5py.File(tmp_path / "blocks.h5ad") as file:  # blocks of one value would use 7 kB of memory each
        grown = [*file["obs"].values(), *file["X"].values(), *file["layers/expected"].values()]
        assert min(vector.chunks[0] for vector in grown) >= CHUNK


# --- depth ----------------------------------------------------------------------------------------------------------


def test_find_cells__measures_how_deep_cells_reach():
    """Make three columns that are stained in 2, 3 and 5 of 5 planes, with spacings of 1, 2 and 2 micrometres."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:150, :450]
    light = np.full((2, 5, 150, 450), 60.0)
    for k, planes in enumerate((slice(0, 2), slice(1, 4), slice(0, 5))):
        distance = np.hypot(y - 75, x - 75 - 150 * k)
        light[0, planes] += 500 * (distance < 25)
        light[1, planes] += 350 * (distance < 50)
    images = rng.poisson(light)
    heights = np.array([0.0, 1.0, 2.0, 4.0, 6.0])
    expected = [2.0, 1.0 + 1.5 + 2.0, 1.0 + 1.0 + 1.5 + 2.0 + 2.0]
    found = find_cells(images[0], images[1], heights, MPP)
    assert len(found.outlines) == 3
    order = np.argsort([outline.centroid.x for outline in found.outlines])
    np.testing.assert_allclose(found.measured["depth"].to_numpy()[order], expected, rtol=0.05)
    np.testing.assert_allclose(found.measured["nucleus"], 0.25, atol=0.02)
    np.testing.assert_allclose(found.mean(images[1])[order], [*(60 + 350 * n / 5 for n in (2, 3, 5))], rtol=0.05)
    by_nuclei = find_cells(images[0], None, heights, MPP)
    np.testing.assert_allclose(np.sort(by_nuclei.measured["depth"]), expected, rtol=0.05)
    assert depths(images[1, :1], found.labels, heights[:1], MPP, 3).tolist() == [1.0, 1.0, 1.0]


# --- segmenters of others ---------------------------------------------------------------------------------------------


def whole_blocks(nuclei, cytoplasm, microns_per_pixel):
    """Return squares as cells, whatever the images show; labels are not consecutive."""
    assert nuclei.shape == cytoplasm.shape == SHAPE
    y, x = np.indices(nuclei.shape)
    labels = (10 * (y // 40) + 1000 * (x // 40) + 7).astype(np.uint16)
    labels[(y % 40 < 4) | (x % 40 < 4)] = 0
    return labels


def wrong_shape(nuclei, cytoplasm, microns_per_pixel):
    return np.zeros((3, 3), int)


def wrong_type(nuclei, cytoplasm, microns_per_pixel):
    return nuclei / 2


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Write this file as a module that a run can import."""
    shutil.copy(__file__, tmp_path / "lab_segmenters.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("lab_segmenters", None)


def test_run__takes_the_cells_of_a_named_function(experiment, tmp_path, importable):
    out = tmp_path / "out"
    table = merfish.run(experiment[0], out=out, config=RunConfig(segmenter="lab_segmenters:whole_blocks"), fovs=[0])
    cells = read_cells(out / results.CELLS)
    assert len(cells) == table.n_obs == 100
    np.testing.assert_allclose(cells["area"], (36 * MPP) ** 2, rtol=0.01)
    place = (cells[["center_x", "center_y"]].to_numpy() - open_experiment(experiment[0]).positions[0]) / MPP
    np.testing.assert_allclose(np.sort(np.unique(np.rint(place[:, 0] * 2))), 2 * (40 * np.arange(10) + 21.5))


@pytest.mark.parametrize(
    ("name", "message"), [("wrong_shape", r"of shape \(400, 400\).*got int64 \(3, 3\)"), ("wrong_type", "got float")]
)
def test_run__marks_fields_of_which_a_segmenter_makes_no_labels(experiment, tmp_path, importable, name, message):
    with pytest.raises(InputError, match=message):
        find_cells(np.ones((1, *SHAPE)), None, np.zeros(1), MPP, load_segmenter(f"lab_segmenters:{name}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:segment", "no_such_package:segment cannot be imported"),
        ("merfish.cells:no_such", "no attribute 'no_such'"),
        ("merfish.cells.segmentation:BLOCK", "is not a function, got float"),
    ],
)
def test_run__refuses_a_segmenter_it_cannot_use_before_any_work(experiment, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        merfish.run(experiment[0], out=tmp_path / "out", config=RunConfig(segmenter=name))
    assert not (tmp_path / "out").exists()


def test_find_cells__with_our_own_segmenter_by_name_agrees():
    raw = np.random.default_rng(2).poisson(60, (2, 1, 200, 200)).astype(np.uint16)
    y, x = np.mgrid[:200, :200]
    raw[0, 0] += (400 * (np.hypot(y - 90, x - 110) < 25)).astype(np.uint16)
    raw[1, 0] += (300 * (np.hypot(y - 90, x - 110) < 55)).astype(np.uint16)
    ours, named = (find_cells(raw[0], raw[1], np.zeros(1), MPP, segmenter) for segmenter in (None, segment))
    (a,), (b,) = ours.outlines, named.outlines
    assert a.intersection(b).area / a.union(b).area > 0.98
    pd.testing.assert_frame_equal(ours.measured, named.measured, rtol=0.03)


def test_find_cells__refuses_images_that_hold_nan():
    image = np.ones((2, 30, 30))
    with pytest.raises(InputError, match="cytoplasm: the image contains NaN"):
        find_cells(image, np.where(np.indices(image.shape)[1] == 3, np.nan, image), np.arange(2), MPP)


def test_run__refuses_a_stain_that_is_not_there(experiment, tmp_path):
    with pytest.raises(InputError, match=r"stains: the experiment has no stain 'WGA'; it has DAPI, polyT"):
        merfish.run(experiment[0], out=tmp_path / "out", config=RunConfig(stains=["WGA"]))


# --- spots ------------------------------------------------------------------------------------------------------------


def test_find_molecules__counts_a_spot_of_several_planes_once():
    rng = np.random.default_rng(4)
    n, shape = 60, (4, 200, 200)
    grid = np.indices((8, 8)).reshape(2, -1)[:, :n] * 23.0 + 15
    place = grid + rng.uniform(-3, 3, (2, n))
    z = rng.uniform(0, 3, n)
    image = photons(*place, z, np.ones((n, 1)), np.array([1.35]), np.array([500.0]), shape, Imaging())
    counts = expose(image[0], Imaging(), np.random.SeedSequence(1))
    spots = find_molecules(bandpass(counts, smoothing=0.7, background=2.0))
    assert len(spots) == n
    distance = np.hypot(spots["y"][:, None] - place[0], spots["x"][:, None] - place[1])
    assert distance.min(axis=1).max() < 0.6
    assert np.abs(spots["z"] - z[distance.argmin(axis=1)]).max() < 0.75
    assert not len(find_molecules(bandpass(rng.poisson(100, shape), smoothing=0.7, background=2.0)))


def test_brighter_beside__only_looks_one_plane_away():
    dtype = find_molecules(np.zeros((1, 40, 40), np.float32)).dtype
    spots = np.array([(5, 5, 0, 1.0), (5.5, 5, 1, 2.0), (5, 5, 3, 1.5), (20, 5, 1, 1.0), (20, 5, 2, 1.0)], dtype)
    assert brighter_beside(spots, 1.0).tolist() == [True, False, False, False, True]


# --- embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_embed_run__of_cells_some_of_which_are_empty(done, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("torch_geometric")
    from merfish.embedding import MODEL, embed_run
    from merfish.pipeline import published
    from spatialvae import SpatialVAE

    train = SpatialVAE.train
    monkeypatch.setattr(SpatialVAE, "train", lambda self, *_, progress: train(self, max_steps=20, progress=progress))
    out = shutil.copytree(done, tmp_path / "out")
    with_an_empty_cell(out)
    before = anndata.read_h5ad(out / results.CELL_BY_GENE)
    lines = embed_run(out, 3)
    assert any("1 cell without counts" in line for line in lines)
    table = anndata.read_h5ad(out / results.CELL_BY_GENE)
    assert np.isfinite(table.obsm["X_spatialvae"]).all()
    assert table.obs["spatial_domain"].nunique() <= 3
    assert (table.X != before.X).nnz == 0
    assert list(before.obs.columns) == list(table.obs.columns.drop("spatial_domain"))
    assert published(out)["key"]  # the results are complete
    with pytest.warns(UserWarning, match="1 cell without counts"):
        model = SpatialVAE.load(out / MODEL, table)
    np.testing.assert_allclose(model.get_latent_representation(), table.obsm["X_spatialvae"], atol=1e-4)
    written = (out / results.CELL_BY_GENE).stat().st_mtime_ns
    assert "already embedded" in embed_run(out, 3)[0]
    assert (out / results.CELL_BY_GENE).stat().st_mtime_ns == written


def with_an_empty_cell(out):
    """Remove the molecules of one cell from a run's table, and adapt its record."""
    path = out / results.CELL_BY_GENE
    table = anndata.read_h5ad(path)
    lines = np.ones(table.n_obs)
    lines[3] = 0
    table.X = table.X.multiply(lines[:, None].astype(np.int32)).tocsr()
    table.write_h5ad(path)
    record = json.loads((out / results.RUN).read_text())
    record["results"][results.CELL_BY_GENE] = path.stat().st_size
    (out / results.RUN).write_text(json.dumps(record))


def test_embed_run__says_what_is_missing_or_cannot_be_embedded(done, tmp_path, monkeypatch):
    from merfish import embedding

    monkeypatch.setattr(embedding, "find_spec", lambda name: None if name == "torch" else True)
    with pytest.raises(InputError, match=r"--embed embeds cells and needs torch: pip install 'merfish\[vae\]'"):
        embedding.embed_run(done, 3)


def test_the_command_refuses_domains_without_an_embedding(tmp_path, monkeypatch, capsys):
    from merfish.cli import main

    monkeypatch.setattr("sys.argv", ["merfish", "run", "nowhere", "--out", str(tmp_path / "o"), "--domains", "3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--domains needs --embed" in capsys.readouterr().err


def test_assign__counts_genes_imaged_one_by_one_in_others_cells(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    assign(out, done / results.CELLS)
    before, after = (anndata.read_h5ad(folder / results.CELL_BY_GENE) for folder in (done, out))
    after = after[before.obs_names]
    pd.testing.assert_frame_equal(after.var, before.var)
    assert (after.X != before.X).nnz == 0
    np.testing.assert_allclose(after.layers["expected"].toarray(), before.layers["expected"].toarray(), atol=1e-5)
    single = [pd.read_parquet(folder / results.SEQUENTIAL)["cell_id"].tolist() for folder in (done, out)]
    assert single[0] == single[1]
