from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import center_of_mass

import reference
from merfish.cells.counts import assign_cells, read_cells
from merfish.codebook import Codebook, mhd4_codebook, read_codebook
from merfish.errors import InputError
from merfish.simulate import Disturbances, Imaging, score_calls, simulate_experiment, simulate_stack
from merfish.simulate._kernels import add_spot
from merfish.simulate.disturbances import draw_chromatic, illumination
from merfish.simulate.optics import draw_photons, expose

BOOK = mhd4_codebook([f"G{k}" for k in range(130)])
SILENT = Imaging(
    lost=0.0, gained=0.0, background=0.0, read_noise=0.0, molecule_spread=0.0, bit_spread=0.0, bit_ratio=1.0
)


def shown_bits(table: pd.DataFrame, n_bits: int = 16) -> np.ndarray:
    return (table["shown"].to_numpy()[:, None] >> np.arange(n_bits, dtype=np.uint64)) & np.uint64(1)


# --- optics and camera
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("y", "x"), [(10.0, 12.0), (10.3, 11.6), (-0.4, 5.2), (23.9, -2.0), (60.0, 5.0)])
def test_add_spot__is_the_integral_of_the_gaussian(y, x):
    image = np.zeros((24, 26), np.float32)
    add_spot(image, y, x, 1000.0, 1.3)
    np.testing.assert_allclose(image, reference.spot(image.shape, y, x, 1000.0, 1.3, 1.3), atol=0.01)
    image[:] = 0
    add_spot(image, y, x, 1000.0, 1.2, 2.25)
    np.testing.assert_allclose(image, reference.spot(image.shape, y, x, 1000.0, 1.8, 0.8), atol=0.01)


@pytest.mark.parametrize("expected", [0.0, 0.5, 15.9, 16.1, 100.0, 5000.0])
def test_draw_photons__has_the_moments_of_poisson(expected):
    n = 400_000
    drawn = draw_photons(np.full(n, expected), np.random.default_rng(0)).astype(float)
    assert drawn.mean() == pytest.approx(expected, abs=5 * np.sqrt(expected / n))
    assert drawn.var() == pytest.approx(expected, rel=0.015)
    if expected:
        skewness = ((drawn - expected) ** 3).mean() / expected**1.5
        assert skewness == pytest.approx(expected**-0.5, abs=0.03)


def test_expose__is_offset_gain_and_read_noise_and_saturates():
    light = np.stack([np.full((300, 300), 400.0), np.full((300, 300), 1e6)])
    counts = expose(light, Imaging(camera_offset=100, camera_gain=2, read_noise=3), np.random.SeedSequence(1))
    assert counts.dtype == np.uint16
    assert counts[0].mean() == pytest.approx(900, abs=1)
    assert counts[0].std() == pytest.approx(np.sqrt(4 * 400 + 9), rel=0.01)
    assert (counts[1] == 65535).all()


# --- one stack
# ------------------------------------------------------------------------------------------------


def test_simulate_stack__same_seed_same_bytes():
    first, truth = simulate_stack(BOOK, (64, 80), seed=3)
    again, truth_again = simulate_stack(BOOK, (64, 80), seed=3)
    other, _ = simulate_stack(BOOK, (64, 80), seed=4)
    assert first.shape == (16, 64, 80)
    assert first.dtype == np.uint16
    np.testing.assert_array_equal(first, again)
    pd.testing.assert_frame_equal(truth, truth_again)
    assert (first != other).any()


def test_simulate_stack__truth_has_the_stated_errors_and_density():
    _, truth = simulate_stack(BOOK, (700, 700), density=0.02, seed=1)
    words, shown = BOOK.words[truth["barcode_id"]].astype(bool), shown_bits(truth).astype(bool)
    assert (~shown[words]).mean() == pytest.approx(0.10, abs=0.006)
    assert shown[~words].mean() == pytest.approx(0.04, abs=0.003)
    assert len(truth) / 700**2 == pytest.approx(0.02, rel=0.05)
    assert not truth["is_blank"].any()
    assert not BOOK.is_blank[truth["barcode_id"]].any()
    assert np.log(truth["brightness"]).std() == pytest.approx(0.3, rel=0.05)
    assert truth[["x", "y"]].min().min() >= -0.5
    assert truth[["x", "y"]].max().max() < 699.5


def test_simulate_stack__light_stands_where_truth_says():
    stack, truth = simulate_stack(BOOK, (128, 128), density=0.0008, seed=6, imaging=SILENT)
    assert stack.dtype == np.uint16
    errors = []
    for row in truth.itertuples():
        x, y = round(row.x), round(row.y)
        alone = (np.hypot(truth["x"] - row.x, truth["y"] - row.y) < 14).sum() == 1
        if not (alone and 8 <= x < 120 and 8 <= y < 120):
            continue
        for bit in range(16):
            patch = stack[bit, y - 6 : y + 7, x - 6 : x + 7] - 100.0
            if BOOK.words[row.barcode_id, bit]:
                cy, cx = center_of_mass(patch)
                errors.append((cy + y - 6 - row.y, cx + x - 6 - row.x))
                assert 2 * np.pi * 400 * 1.2**2 * 0.9 < patch.sum() < 2 * np.pi * 400 * 1.5**2 * 1.1
            else:
                assert abs(patch).max() == 0
    assert len(errors) > 15
    assert np.abs(errors).max() < 0.15


def test_simulate_stack__planes_blur_what_is_out_of_focus():
    stack, truth = simulate_stack(BOOK, (96, 96), density=0.0004, seed=2, n_planes=3, imaging=SILENT)
    assert stack.shape == (16, 3, 96, 96)
    brightest = []
    for row in truth[truth["x"].between(10, 85) & truth["y"].between(10, 85)].itertuples():
        on = BOOK.words[row.barcode_id] == 1
        y, x = round(row.y), round(row.x)
        profile = stack[on, :, y - 2 : y + 3, x - 2 : x + 3].max(axis=(2, 3)).sum(axis=0)
        brightest.append(np.argmax(profile) == np.clip(round(row.z), 0, 2))
    assert np.mean(brightest) > 0.8


def test_simulate_stack__rejects_books_and_numbers_it_cannot_use():
    blanks = Codebook(("Blank-1",), ("",), np.array([[1, 1, 0]]), ("a", "b", "c"))
    with pytest.raises(InputError, match="blanks"):
        simulate_stack(blanks)
    for wrong in ({"shape": (0, 5)}, {"density": -1.0}, {"n_planes": 0}):
        with pytest.raises(InputError, match="positive"):
            simulate_stack(BOOK, **wrong)


def test_simulate_stack__no_molecules_is_a_valid_stack():
    stack, truth = simulate_stack(BOOK, (40, 40), density=0.0)
    assert stack.shape == (16, 40, 40)
    assert len(truth) == 0
    assert np.isnan(score_calls(truth, truth)["recall"])


# --- scoring
# --------------------------------------------------------------------------------------------------


def table(*rows):
    return pd.DataFrame(rows, columns=["barcode_id", "x", "y"])


def test_score_calls__counts_each_molecule_once():
    truth = table((0, 10, 10), (0, 13, 10), (1, 40, 40), (2, 60, 60))
    calls = table((0, 10.5, 10), (0, 10.1, 10), (1, 40, 41.5), (3, 60, 60), (2, 60, 62.1))
    score = score_calls(calls, truth)
    assert score["recall"] == pytest.approx(2 / 4)
    assert score["precision"] == pytest.approx(2 / 5)
    assert score["median_error"] == pytest.approx(0.8)
    assert (score["bias_x"], score["bias_y"]) == (pytest.approx(0.05), pytest.approx(0.75))


def test_score_calls__margin_hurts_neither_side():
    truth = table((0, 9.4, 30), (0, 9.6, 60), (1, 50, 50))
    calls = table((0, 9.6, 30), (0, 9.4, 60), (1, 50, 50))  # each partner lies on the other side of the margin's edge
    score = score_calls(calls, truth, shape=(100, 100))
    assert (score["recall"], score["precision"]) == (1.0, 1.0)
    assert (score["n_truth"], score["n_calls"]) == (2, 2)


def test_score_calls__random_calls_score_low():
    rng = np.random.default_rng(0)
    _, truth = simulate_stack(BOOK, (256, 256), seed=5)
    calls = truth.assign(barcode_id=rng.permutation(truth["barcode_id"]))
    assert score_calls(calls, truth, shape=(256, 256))["precision"] < 0.1
    assert score_calls(truth, truth, shape=(256, 256))["recall"] == 1.0


# --- a whole experiment
# ---------------------------------------------------------------------------------------

SMALL = {"fields": (2, 2), "shape": (160, 192), "genes": 40, "seed": 7}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return simulate_experiment(tmp_path_factory.mktemp("simulated") / "experiment", **SMALL)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_simulate_experiment__same_seed_same_bytes(experiment, tmp_path):
    again = simulate_experiment(tmp_path / "again", **SMALL)
    assert digests(again) == digests(experiment)
    other = simulate_experiment(tmp_path / "other", **{**SMALL, "seed": 8})
    assert digests(other).keys() == digests(experiment).keys()
    assert digests(other)["merfish_000_00.tif"] != digests(experiment)["merfish_000_00.tif"]


def test_simulate_experiment__writes_what_its_tables_say(experiment):
    channels = pd.read_csv(experiment / "data_organization.csv")
    book = read_codebook(experiment / "codebook.csv")
    positions = np.loadtxt(experiment / "positions.csv", delimiter=",")
    microscope = json.loads((experiment / "microscope.json").read_text())
    assert positions.shape == (4, 2)
    assert microscope["image_dimensions"] == [192, 160]
    assert sorted(channels["bitNumber"].dropna()) == list(range(1, book.n_bits + 1))
    assert set(channels["channelName"][channels["bitNumber"].isna()]) == {"DAPI", "polyT"}
    for row in channels.itertuples():
        for fov in range(4):
            image = tifffile.imread(experiment / f"{row.imageType}_{fov:03d}_{row.imagingRound:02d}.tif")
            assert image.shape == (3, 160, 192)
            assert image.dtype == np.uint16
            assert len({row.frame, row.fiducialFrame} & set(range(3))) == 2
    assert len(list(experiment.glob("*.tif"))) == 4 * 9


def share_shining(folder):
    """Return the share of molecules visible where the truth puts them: position, stage error, drift, chromatic map."""
    channels = pd.read_csv(folder / "data_organization.csv")
    molecules = pd.read_parquet(folder / "truth" / "molecules.parquet")
    fields = pd.read_csv(folder / "truth" / "fields.csv")
    drift = pd.read_csv(folder / "truth" / "drift.csv").set_index(["fov", "round"])
    chromatic = pd.read_csv(folder / "truth" / "chromatic.csv", index_col="color")
    bits = shown_bits(molecules)
    shares = []
    for bit in (0, 7, 10, 15):
        row = channels[channels["bitNumber"] == bit + 1].iloc[0]
        yy, yx, y1, xy, xx, x1 = chromatic.loc[row.color]
        for field in fields.itertuples():
            image = tifffile.imread(folder / f"merfish_{field.fov:03d}_{row.imagingRound:02d}.tif")[row.frame]
            dy, dx = drift.loc[(field.fov, row.imagingRound)]
            y, x = (molecules["global_y"] - field.y) / 0.108 + dy, (molecules["global_x"] - field.x) / 0.108 + dx
            y, x = np.round(yy * y + yx * x + y1).astype(int), np.round(xy * y + xx * x + x1).astype(int)
            here = (bits[:, bit] == 1) & (x >= 0) & (x < image.shape[1]) & (y >= 0) & (y < image.shape[0])
            assert here.sum() > 10
            shares.append(np.mean(image[y[here], x[here]] > np.median(image) + 60))
    return np.mean(shares)


def test_simulate_experiment__fields_show_truth_moved_by_drift(experiment):
    drift = pd.read_csv(experiment / "truth" / "drift.csv").set_index(["fov", "round"])
    assert (drift.loc[(slice(None), 0), :] == 0).all(axis=None)
    assert 4 < drift.abs().max().max() <= 5
    assert share_shining(experiment) > 0.95
    fields = pd.read_csv(experiment / "truth" / "fields.csv")
    np.testing.assert_allclose(fields[["x", "y"]], np.loadtxt(experiment / "positions.csv", delimiter=","), atol=1e-4)


def test_simulate_experiment__fields_show_truth_moved_by_all_that_disturbs(tmp_path):
    moved = Disturbances(stage_error=2.0, chromatic=12.0)
    folder = simulate_experiment(tmp_path / "e", drift=20.0, disturbances=moved, **SMALL)
    assert share_shining(folder) > 0.95
    chromatic = tmp_path / "e" / "truth" / "chromatic.csv"
    pd.read_csv(chromatic).assign(yy=1, yx=0, y1=0, xy=0, xx=1, x1=0).to_csv(chromatic, index=False)
    assert share_shining(folder) < 0.9  # without the map many are missed, so the test can fail


def test_simulate_experiment__loose_beads_leave_their_place(tmp_path):
    folder = simulate_experiment(
        tmp_path / "e", fields=(1, 1), shape=(256, 256), drift=0.0, disturbances=Disturbances(loose_beads=0.4), seed=1
    )
    first, later = (tifffile.imread(folder / f"merfish_000_{r:02d}.tif")[2].astype(float) for r in (0, 5))
    bright = first > 1500
    assert 0.25 < (later[bright] < 500).mean() < 0.6


def test_simulate_experiment__beads_move_by_the_stated_drift(experiment):
    drift = pd.read_csv(experiment / "truth" / "drift.csv").set_index(["fov", "round"])
    still = np.minimum(tifffile.imread(experiment / "merfish_001_00.tif")[2].astype(float), 1000)
    for imaging_round in (3, 8):
        kind = "stains" if imaging_round == 8 else "merfish"
        moved = np.minimum(tifffile.imread(experiment / f"{kind}_001_{imaging_round:02d}.tif")[2].astype(float), 1000)
        spectrum = np.fft.fft2(still - np.median(still)).conj() * np.fft.fft2(moved - np.median(moved))
        peak = np.unravel_index(np.argmax(np.fft.ifft2(spectrum).real), still.shape)
        found = [(p + n // 2) % n - n // 2 for p, n in zip(peak, still.shape, strict=True)]
        np.testing.assert_allclose(found, drift.loc[(1, imaging_round)], atol=1.0)


def test_simulate_experiment__truth_agrees_with_itself(experiment):
    import anndata

    molecules = pd.read_parquet(experiment / "truth" / "molecules.parquet")
    cells = read_cells(experiment / "truth" / "cells.parquet")
    counts = anndata.read_h5ad(experiment / "truth" / "cell_by_gene.h5ad")
    inside = molecules["cell_id"] >= 0
    found = assign_cells(molecules["global_x"], molecules["global_y"], cells["geometry"], cells["cell_id"])
    np.testing.assert_array_equal(found, molecules["cell_id"])
    assert 0 < (~inside).mean() < 0.1
    assert counts.X.sum() == inside.sum()
    assert list(counts.obs["cell_id"]) == list(cells["cell_id"])
    assert set(counts.obs["domain"]) == {0, 1, 2}
    assert counts.obs.groupby("domain")["cell_type"].nunique().min() >= 2
    np.testing.assert_allclose(counts.obsm["spatial"], cells[["center_x", "center_y"]])
    assert cells["area"].between(0, 120).all()
    assert not molecules["is_blank"].any()


def test_simulate_experiment__planes_and_another_codebook(tmp_path):
    words = np.eye(5, dtype=np.uint8)[[0, 1, 2, 3, 4]] | np.eye(5, dtype=np.uint8)[[1, 2, 3, 4, 0]]
    book = Codebook(("A", "B", "C", "D", "Blank-1"), ("",) * 5, words, tuple("abcde"))
    folder = simulate_experiment(tmp_path / "e", codebook=book, fields=(1, 1), shape=(128, 128), planes=3)
    channels = pd.read_csv(folder / "data_organization.csv")
    assert channels["zPos"][0] == "[3 1.5 0]"  # 650 is imaged from the top down
    assert channels["zPos"][1] == "[0 1.5 3]"
    frames = {r: len(tifffile.imread(folder / f"merfish_000_{r:02d}.tif")) for r in range(3)}
    assert frames == {0: 7, 1: 7, 2: 4}  # the fifth bit is alone in its round
    assert len(tifffile.imread(folder / "stains_000_03.tif")) == 7
    molecules = pd.read_parquet(folder / "truth" / "molecules.parquet")
    assert set(molecules["gene"]) == set("ABCD")
    bit, image = 1, tifffile.imread(folder / "merfish_000_00.tif")
    at = molecules[molecules["global_x"].between(252, 262) & molecules["global_y"].between(-118, -108)]
    at = at[shown_bits(at, 5)[:, bit] == 1]
    frame = [json.loads(channels["frame"][bit].replace(" ", ","))[round(z / 1.5)] for z in at["global_z"]]
    focus = np.abs(at["global_z"] / 1.5 - np.round(at["global_z"] / 1.5)) < 0.2
    y, x = np.round((at["global_y"] + 120) / 0.108).astype(int), np.round((at["global_x"] - 250) / 0.108).astype(int)
    assert focus.sum() > 5
    assert (image[frame, y, x][focus] > np.median(image) + 60).mean() > 0.9


def test_simulate_experiment__writes_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        simulate_experiment(tmp_path / "full", **SMALL)
    for wrong in ({"fields": (0, 1)}, {"shape": (8, 8)}, {"density": -1.0}, {"planes": 0}, {"drift": -1.0}):
        with pytest.raises(InputError, match="expected at least"):
            simulate_experiment(tmp_path / "new", **{**SMALL, **wrong})
    monkeypatch.setattr("merfish.simulate.experiment._write_truth", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulate_experiment(tmp_path / "new", fields=(1, 1), shape=(64, 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


# --- disturbances
# ---------------------------------------------------------------------------------------------


def test_draw_chromatic__is_largest_at_a_corner():
    maps = draw_chromatic(2, (512, 400), 3.0, np.random.default_rng(0))
    grid = np.stack([*np.meshgrid([0, 255.5, 511], [0, 199.5, 399], indexing="ij"), np.ones((3, 3))])
    shift = np.linalg.norm(np.tensordot(maps, grid, axes=1) - grid[:2], axis=1)
    assert shift[0].max() == pytest.approx(3.0)
    assert shift[1].max() == pytest.approx(1.5)
    assert shift[0, 1, 1] < 1.5
    np.testing.assert_array_equal(draw_chromatic(1, (5, 5), 0.0, np.random.default_rng(0))[0], np.eye(2, 3))


def test_illumination__falls_to_the_corners():
    light = illumination((101, 51), 0.5)
    assert light[50, 25] == 1.0
    assert light[0, 0] == light[-1, -1] == 0.5


def test_simulate_experiment__disturbances_do_what_they_say(tmp_path):
    plain = {"fields": (1, 2), "shape": (160, 160), "drift": 0.0, "seed": 2}
    none = simulate_experiment(tmp_path / "none", **plain)
    wrong = Disturbances(
        dead_bit=3, hot_pixels=20, bleaching=0.1, saturated_fov=1, autofluorescence=300.0, stage_error=2.0
    )
    bad = simulate_experiment(tmp_path / "bad", disturbances=wrong, **plain)

    def frame(folder, name, number):
        return tifffile.imread(folder / name)[number].astype(float)

    dead, alive = (frame(folder, "merfish_000_01.tif", 1) for folder in (bad, none))  # bit 4 is 650 of round 1
    hot = dead > 1500
    assert hot.sum() == 20
    assert dead[~hot].max() < 300 < alive.max()
    assert all((frame(bad, f"merfish_000_{r:02d}.tif", f)[hot] > 1500).all() for r in range(8) for f in range(3))
    assert (frame(bad, "merfish_001_00.tif", 0) > 60_000).mean() > 0.02
    beads = [np.median(frame(folder, "merfish_000_00.tif", 2)) for folder in (none, bad)]
    assert beads[1] > beads[0] + 150
    fields = pd.read_csv(bad / "truth" / "fields.csv")
    assert 0.2 < np.abs(fields[["x", "y"]] - np.loadtxt(bad / "positions.csv", delimiter=",")).max().max() < 10


def test_imaging__bleaching_dims_later_rounds(tmp_path):
    steady = replace(Imaging(), bit_ratio=1.0)
    folder = simulate_experiment(
        tmp_path / "e", fields=(1, 1), shape=(192, 192), imaging=steady, disturbances=Disturbances(bleaching=0.2)
    )
    first, last = (
        np.sort(tifffile.imread(folder / f"merfish_000_{r:02d}.tif")[0], axis=None)[-60:].mean() - 200 for r in (0, 7)
    )
    assert last / first == pytest.approx(0.8**7, rel=0.3)
