from __future__ import annotations

import json
import re
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import merfish
from merfish import InputError, cli, results
from merfish.cells.counts import read_cells
from merfish.config import RunConfig, read_config
from merfish.demo import run_demo, score_run
from merfish.imaging.opening import open_experiment
from merfish.pipeline import fields, folder
from merfish.pipeline.plan import run_cost
from merfish.pipeline.record import run_summary
from merfish.simulate import simulate_experiment
from merfish.simulate.disturbances import Disturbances, illumination
from merfish.transcripts import COLUMNS, read_transcripts

pytestmark = pytest.mark.usefixtures("short_reports")

TABLES = [results.TRANSCRIPTS, results.ALL_TRANSCRIPTS, results.CELLS, results.CELL_BY_GENE]


@pytest.fixture
def copy(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "copy")


def same_results(a, b):
    for name in TABLES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_run__keeps_its_results_apart_from_the_images(copy):
    with pytest.raises(InputError, match="is the folder of the experiment; choose another folder"):
        merfish.run(copy, out=copy)
    assert not (copy / results.RUN).exists()


def test_run_writes_what_it_promises(done):
    calls, found = (read_transcripts(done / name) for name in TABLES[:2])
    assert calls.dtypes.astype(str).to_dict() == COLUMNS
    assert len(found) > len(calls) > 100
    assert calls["transcript_id"].is_unique
    cells = read_cells(done / results.CELLS)
    assert {"cell_id", "fov", "center_x", "center_y", "volume", "n_transcripts", "geometry"} <= set(cells.columns)
    table = anndata.read_h5ad(done / results.CELL_BY_GENE)
    assert table.X.sum() == (calls["cell_id"] >= 0).sum() == cells["n_transcripts"].sum()
    assert table.obsm["spatial"].shape == (len(cells), 2)
    assert table.var["detection_efficiency"].between(0.3, 1).all()
    record = json.loads((done / results.RUN).read_text())
    assert {"versions", "parameters", "inputs", "figures", "fields", "bit_error_rates", "seconds"} <= set(record)
    figures = record["figures"]
    assert figures["by_blanks"]["low"] <= figures["misidentification_rate"] <= figures["by_blanks"]["high"]
    assert figures["held_out"]["low"] <= 0.05 <= figures["held_out"]["high"]
    assert not [path for path in done.glob("**/.*") if path.name != ".lock"]  # no partially written files


def call(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_dry_run__finds_files_and_estimates_but_writes_nothing(raw, tmp_path):
    text = call("run", raw, "--out", tmp_path / "new" / "out", "--dry-run", "--fov", "1-3", "--method", "pixels").output
    assert not (tmp_path / "new").exists()
    assert re.search(r"fields +3 of 4 \(fields 1-3\)", text)
    n = sum(path.match("*_00[123]_*.tif") for path in raw.iterdir())
    assert re.search(rf"files +{n}, ", text)
    assert re.search(r"method +pixels", text)


def test_dry_run__refuses_faulty_files_as_the_run_does(copy, tmp_path):
    next(copy.glob("merfish_001_03.tif")).unlink()
    refused = call("run", copy, "--out", tmp_path / "out", "--dry-run").exception
    assert isinstance(refused, InputError)
    assert "field 1: " in str(refused)
    assert "skipped     field 1" in call("run", copy, "--out", tmp_path / "out", "--dry-run", "--keep-going").output


def test_run_cost__grows_as_the_work_does(raw):
    source = open_experiment(raw)

    def cost(side, n, **options):
        given = {"segmented": True, "config": RunConfig(normalization_fields=1), "processes": 1, **options}
        return run_cost(source, (side, side), n, **given)

    ten, twenty, forty = (cost(2048, n).seconds for n in (10, 20, 40))
    assert forty - twenty == pytest.approx(2 * (twenty - ten))
    assert twenty < 2 * ten  # calibration is done only once
    assert cost(2048, 100).seconds == pytest.approx(4 * cost(1024, 100).seconds)
    assert cost(2048, 100).disk == pytest.approx(4 * cost(1024, 100).disk)
    assert cost(2048, 2, segmented=False).seconds < cost(2048, 2).seconds
    assert cost(2048, 2, processes=2).memory == 2 * cost(2048, 2).memory


def test_run_from_the_command_line__says_what_it_does_with_earlier_work(raw, tmp_path):
    out = tmp_path / "out"
    assert call("run", raw, "--out", out, "--fov", "0", "--quiet").output == ""
    text = call("run", raw, "--out", out, "--verbose").output
    assert "1 of 4 fields are already done; decoding the other 3" in text
    assert "field 3: " in text
    assert "nothing to do" in " ".join(call("run", raw, "--out", out).output.split())


def test_run_recovers_the_simulated_truth(done, raw):
    score = score_run(done, raw)
    assert score["recall"] > 0.75
    assert score["precision"] > 0.9
    assert score["cells_found"] > 0.75  # includes slivers at the outer border
    assert score["count_r"] > 0.9


@pytest.mark.draws
def test_run_takes_out_chromatic_shifts(tmp_path):
    raw = simulate_experiment(
        tmp_path / "raw", fields=(1, 2), shape=(256, 256), seed=3, disturbances=Disturbances(chromatic=3.0)
    )
    merfish.run(raw, out=tmp_path / "out")
    maps = pd.read_csv(raw / "truth" / "chromatic.csv", index_col="color")
    true = {color: row.to_numpy().reshape(2, 3) for color, row in maps.iterrows()}
    bent = true[750] @ np.linalg.inv(np.vstack([true[650], [0, 0, 1]]))
    found = json.loads((tmp_path / "out" / results.RUN).read_text())["chromatic"]["750"]
    corners = np.array([[0, 0, 1], [0, 255, 1], [255, 0, 1], [255, 255, 1]]).T
    assert np.hypot(*((np.array(found["map"]) - bent) @ corners)).max() < 0.15
    assert "750" in (tmp_path / "out" / results.REPORT).read_text()
    assert score_run(tmp_path / "out", raw)["recall"] > 0.7


@pytest.mark.draws
def test_run_of_images_as_cameras_make_them(tmp_path):
    """Vignetting, hot pixels and a dead bit are tolerated; a field that is far too bright is excluded."""
    wrong = Disturbances(vignetting=0.5, hot_pixels=50, dead_bit=3, saturated_fov=2)
    raw = simulate_experiment(tmp_path / "raw", fields=(1, 3), shape=(256, 256), seed=4, disturbances=wrong)
    merfish.run(raw, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / results.RUN).read_text())
    assert "saturated" in record["failed"]["2"]
    lines = run_summary(tmp_path / "out")["lines"]
    assert any("excluded from decoding as dead: bit4" in line for line in lines)
    assert all(40 <= light["hot"] <= 50 for light in record["light"].values())
    calls, truth = (
        pd.read_parquet(p) for p in (tmp_path / "out" / results.TRANSCRIPTS, raw / "truth/molecules.parquet")
    )
    seen = truth["global_x"] < calls["global_x"].max()
    assert not calls["is_blank"].mean() > 0.1
    assert len(calls) > 0.6 * seen.sum()
    flat = tmp_path / "flat.npy"
    np.save(flat, illumination((256, 256), 0.5))
    known = RunConfig(flat_fields={"650": str(flat), "750": str(flat)}, dark_level=100.0)
    merfish.run(raw, out=tmp_path / "known", config=known, fovs=[0, 1])
    given = json.loads((tmp_path / "known" / results.RUN).read_text())["light"]["650"]
    assert given["dark"] == 100
    assert given["least"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(InputError, match="no bit has the colour '488'"):
        merfish.run(raw, out=tmp_path / "other", config=RunConfig(flat_fields={"488": str(flat)}))


def test_report_loads_nothing_from_elsewhere(done):
    page = (done / results.REPORT).read_text()
    assert page.count("<svg") >= 5
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_run_resumes_to_the_same_result(raw, done, tmp_path, monkeypatch):
    work, seen = fields.process_field, []

    def interrupted(experiment, fov, *rest):
        if seen:
            raise KeyboardInterrupt
        seen.append(fov)
        return work(experiment, fov, *rest)

    monkeypatch.setattr(fields, "process_field", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merfish.run(raw, out=tmp_path / "out")
    assert not (tmp_path / "out" / results.RUN).exists()
    monkeypatch.setattr(fields, "process_field", lambda e, fov, *rest: seen.append(fov) or work(e, fov, *rest))
    merfish.run(raw, out=tmp_path / "out")
    assert sorted(seen) == [0, 1, 2, 3]  # none twice
    same_results(done, tmp_path / "out")


def test_workers_give_the_same_result(raw, done, tmp_path):
    merfish.run(raw, out=tmp_path / "out", workers=2)
    same_results(done, tmp_path / "out")


def test_run__refuses_a_folder_that_another_run_holds(raw, tmp_path):
    with (
        folder.owned(tmp_path / "out"),
        pytest.raises(InputError, match=r"another run is writing to this folder \(process"),
    ):
        merfish.run(raw, out=tmp_path / "out")


def test_run__names_a_missing_file_before_any_work(copy, tmp_path):
    next(copy.glob("merfish_001_03.tif")).unlink()
    with pytest.raises(InputError, match="field 1: "):
        merfish.run(copy, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.draws
def test_run_keep_going_leaves_out_faulty_fields(copy, tmp_path):
    broken = copy / "merfish_001_03.tif"
    broken.write_bytes(broken.read_bytes()[:1000])
    table = merfish.run(copy, out=tmp_path / "out", keep_going=True)
    assert table.n_obs > 0
    summary = run_summary(tmp_path / "out")
    assert list(summary["failed"]) == ["1"]
    assert set(read_transcripts(tmp_path / "out" / results.TRANSCRIPTS)["fov"]) == {0, 2, 3}


@pytest.mark.draws
def test_run__marks_a_field_whose_rounds_do_not_match(copy, tmp_path):
    import tifffile

    from merfish.imaging.images import read_frames

    rng = np.random.default_rng(0)
    path = copy / "merfish_002_04.tif"
    frames = read_frames(path, [0, 1, 2])
    tifffile.imwrite(path, rng.poisson(100, frames.shape).astype(np.uint16), photometric="minisblack")
    merfish.run(copy, out=tmp_path / "out")
    failed = run_summary(tmp_path / "out")["failed"]
    assert list(failed) == ["2"]
    assert "rounds 4 do not match" in failed["2"]


@pytest.mark.draws
def test_run_of_an_empty_sample_is_empty_and_whole(tmp_path):
    raw = simulate_experiment(tmp_path / "raw", fields=(1, 1), shape=(128, 128), density=0.0)
    table = merfish.run(raw, out=tmp_path / "out")
    assert table.X.sum() == 0
    calls = read_transcripts(tmp_path / "out" / results.TRANSCRIPTS)
    assert calls.dtypes.astype(str).to_dict() == COLUMNS
    assert (tmp_path / "out" / results.REPORT).is_file()


@pytest.mark.draws
def test_run_without_stains_has_no_cells(copy, tmp_path):
    rows = (copy / "data_organization.csv").read_text().splitlines(keepends=True)
    (copy / "data_organization.csv").write_text("".join(row for row in rows if not row.startswith(("DAPI", "polyT"))))
    table = merfish.run(copy, out=tmp_path / "out", fovs=[0])
    assert table.n_obs == 0
    assert (read_transcripts(tmp_path / "out" / results.TRANSCRIPTS)["cell_id"] == -1).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", "colour: no such parameter. Known: method"),
        ("misidentification_rate: 2", "misidentification_rate: .* got 2"),
        ("method: magic", "expected one of spots"),
        ("- a", "expected 'name: value' lines"),
        ("a: [", "cannot read the configuration"),
    ],
)
def test_read_config__rejects(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "run.yaml")


@pytest.mark.draws
def test_the_demo_runs_and_the_real_codebook_stands_clear(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("merfish.demo.EPOCHS", 1)
    page = run_demo(tmp_path / "demo", fields=(2, 2), shape=(256, 256))
    text = page.read_text()
    table = re.search(r">above control</th>.*?</table>", text, re.S)[0]
    assert table.count("<td>yes</td>") == 2
    assert "adjusted Rand index" in capsys.readouterr().out
