"""Runs into a folder whose state has changed: other inputs, other workers, damage, kills, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import tifffile
import works
from hypothesis import given
from hypothesis import strategies as st

import merfish
from command import call
from merfish import InputError, cli, results
from merfish._files import Packed, pack, read_json_packed
from merfish.config import RunConfig
from merfish.pipeline import cluster, fields, folder, single
from merfish.pipeline.cluster import Failure, run_map_on
from merfish.pipeline.record import run_summary
from merfish.pipeline.status import status_lines
from merfish.pipeline.survey import spread_order
from merfish.simulate import simulate_experiment

pytestmark = pytest.mark.usefixtures("short_reports")

TABLES = (results.TRANSCRIPTS, results.ALL_TRANSCRIPTS, results.CELLS, results.CELL_BY_GENE)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return simulate_experiment(
        tmp_path_factory.mktemp("raw") / "tissue", fields=(1, 3), shape=(160, 160), drift=2.0, seed=5
    )


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    merfish.run(raw, out=out)
    return out


@pytest.fixture
def experiment(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "raw")


@pytest.fixture
def out(done, tmp_path):
    return shutil.copytree(done, tmp_path / "out")


def contents(out):
    return {name: (out / name).read_bytes() for name in TABLES}


def calls_of(out):
    return pd.read_parquet(out / results.TRANSCRIPTS)


def log_of(out):
    return (out / results.LOG).read_text()


# --- what results depend on -----------------------------------------------------------------------------------


def rename_gene(experiment):
    path = experiment / "codebook.csv"
    path.write_text(path.read_text().replace("Gene001", "Other", 1))
    return "codebook"


def swap_words(experiment):
    path = experiment / "codebook.csv"
    lines = path.read_text().splitlines()
    first, second = (line.split(",") for line in lines[1:3])
    lines[1:3] = [",".join([*first[:2], *second[2:]]), ",".join([*second[:2], *first[2:]])]
    path.write_text("\n".join(lines) + "\n")
    return "codebook"


def other_pixel_size(experiment):
    path = experiment / "microscope.json"
    scope = json.loads(path.read_text())
    path.write_text(json.dumps(scope | {"microns_per_pixel": scope["microns_per_pixel"] * 1.1}))
    return "microscope"


def flip(experiment):
    path = experiment / "microscope.json"
    scope = json.loads(path.read_text())
    path.write_text(json.dumps(scope | {"flip_horizontal": not scope.get("flip_horizontal")}))
    return "microscope"


def other_image(experiment):
    path = sorted(experiment.glob("merfish_002_*.tif"))[2]
    images = tifffile.imread(path)
    images[:2] = images[:2, ::-1]
    tifffile.imwrite(path, images, photometric="minisblack")
    return "images"


def swap_fields(experiment):
    for one in sorted(experiment.glob("*_000*.tif")):
        other = one.with_name(one.name.replace("_000", "_002"))
        aside = one.with_suffix(".aside")
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
    return "images"


def other_positions(experiment):
    path = experiment / "positions.csv"
    places = [line.split(",") for line in path.read_text().split()]
    path.write_text("".join(f"{float(x) + 5},{y}\n" for x, y in places))
    return ""


@pytest.mark.parametrize(
    "change", [rename_gene, swap_words, other_pixel_size, flip, other_image, swap_fields, other_positions]
)
def test_run_again__after_a_change_equals_a_fresh_run(experiment, out, tmp_path, change):
    shutil.rmtree(out / results.FIELDS / "fov_0001")  # one field is missing, the others are done
    why = change(experiment)
    merfish.run(experiment, out=out)
    merfish.run(experiment, out=tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    if why:
        assert f"recomputed ({why}" in log_of(out) or f", {why}" in log_of(out)


def test_run_again__other_parameters_make_again_what_depends_on_them(raw, out, tmp_path):
    before = (out / results.FIELDS / "fov_0000" / folder.RECORD).stat().st_mtime_ns
    merfish.run(raw, out=out, config=RunConfig(misidentification_rate=0.2))
    assert len(calls_of(out)) > len(calls_of(out)[lambda table: table["probability"] > 0.9])
    assert (out / results.FIELDS / "fov_0000" / folder.RECORD).stat().st_mtime_ns == before
    merfish.run(raw, out=out, config=RunConfig(method="pixels"))
    assert "fields 0-2: recomputed (calibration, parameters)" in log_of(out)
    merfish.run(raw, out=tmp_path / "fresh", config=RunConfig(method="pixels"))
    assert contents(out) == contents(tmp_path / "fresh")


def test_run_again__does_nothing_if_nothing_changed(raw, out):
    before = (out / results.RUN).stat().st_mtime_ns
    merfish.run(raw, out=out)
    assert (out / results.RUN).stat().st_mtime_ns == before
    assert "nothing to do" in log_of(out)


def test_run__a_subset_first_then_all_equals_all_at_once(raw, done, tmp_path):
    merfish.run(raw, out=tmp_path / "out", fovs=[0])
    assert set(calls_of(tmp_path / "out")["fov"]) == {0}
    merfish.run(raw, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(done)


def test_run__a_subset_never_replaces_the_results_of_all(raw, experiment, done, out):
    merfish.run(raw, out=out, fovs=[0])
    assert contents(out) == contents(done)
    rename_gene(experiment)
    with pytest.raises(InputError, match=r"holds results of 3 fields.*would replace them"):
        merfish.run(experiment, out=out, fovs=[0])
    assert contents(out) == contents(done)


def test_run__an_image_that_arrives_later_counts(experiment, done, tmp_path):
    late = sorted(experiment.glob("merfish_001_*.tif"))[0]
    late.rename(tmp_path / "late.tif")
    merfish.run(experiment, out=tmp_path / "out", keep_going=True)
    assert list(run_summary(tmp_path / "out")["failed"]) == ["1"]
    (tmp_path / "late.tif").rename(late)
    merfish.run(experiment, out=tmp_path / "out", keep_going=True)
    assert contents(tmp_path / "out") == contents(done)


def test_decode_and_run_keep_out_of_each_other_s_folders(raw, done, tmp_path):
    stack, book = tmp_path / "stack.npy", raw / "codebook.csv"
    np.save(stack, np.random.default_rng(0).poisson(100, (16, 64, 64)).astype(np.uint16))
    options = {"method": "spots", "preprocess": True, "misidentification_rate": 0.05}
    before = contents(done)
    with pytest.raises(InputError, match="holds a run of a whole experiment"):
        single.decode_file(stack, book, done, **options)
    assert contents(done) == before
    single.decode_file(stack, book, tmp_path / "one", **options)
    with pytest.raises(InputError, match="not of a run"):
        merfish.run(raw, out=tmp_path / "one")


# --- calibration ----------------------------------------------------------------------------------------------


def darken(experiment, fovs):
    """Make fields without molecules: noise in the bits, unchanged beads."""
    rng = np.random.default_rng(0)
    for path in (path for fov in fovs for path in experiment.glob(f"merfish_{fov:03d}_*.tif")):
        images = tifffile.imread(path)
        images[:2] = rng.poisson(100, images[:2].shape)
        tifffile.imwrite(path, images, photometric="minisblack")


@pytest.mark.draws
def test_calibration__fields_count_for_what_they_show(experiment, tmp_path):
    first = spread_order((0, 1, 2))[0]
    darken(experiment, [first])
    merfish.run(experiment, out=tmp_path / "out", config=RunConfig(normalization_fields=1))
    surveyed = results.read_run(tmp_path / "out")["calibration"]["surveyed"]
    assert "spots in the median bit" in surveyed[str(first)]
    assert sum(reason == "" for reason in surveyed.values()) == 1
    assert set(calls_of(tmp_path / "out")["fov"]) == {0, 1, 2} - {first}


@pytest.mark.draws
def test_calibration__where_no_field_shows_molecules_it_is_said_and_not_kept(experiment, raw, done, tmp_path):
    darken(experiment, [0, 1, 2])
    merfish.run(experiment, out=tmp_path / "out")
    summary = run_summary(tmp_path / "out")
    assert any("no field shows molecules" in line and "field 1: " in line for line in summary["lines"])
    assert "no field shows molecules" in (tmp_path / "out" / results.REPORT).read_text()
    assert not len(calls_of(tmp_path / "out"))
    merfish.run(raw, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(done)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_spread_order__holds_every_field_once_and_begins_spread(n):
    order = spread_order(tuple(range(n)))
    assert sorted(order) == list(range(n))
    assert np.diff(sorted(order[:6])).max(initial=1) <= max(n // 3, 1)


@pytest.mark.draws
def test_run_without_blanks__keeps_the_posterior(experiment, tmp_path):
    path = experiment / "codebook.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "blank" not in line.lower()) + "\n")
    merfish.run(experiment, out=tmp_path / "out")
    found = pd.read_parquet(tmp_path / "out" / results.ALL_TRANSCRIPTS)
    kept = calls_of(tmp_path / "out")
    assert found["probability"].between(0, 1).all()
    assert 0.2 * len(found) < len(kept) < len(found)
    assert kept["probability"].mean() == pytest.approx(0.95, abs=0.03)
    assert any("has no blanks" in line for line in run_summary(tmp_path / "out")["lines"])
    assert "has no blanks" in (tmp_path / "out" / results.REPORT).read_text()


# --- images of one field that are unlike the others' ------------------------------------------------------------


@pytest.mark.draws
def test_run__flags_a_bit_that_shows_nothing_in_one_field(experiment, tmp_path):
    path = experiment / "merfish_001_02.tif"
    images = tifffile.imread(path)
    images[0] = 0
    tifffile.imwrite(path, images, photometric="minisblack")
    merfish.run(experiment, out=tmp_path / "out")
    lines = run_summary(tmp_path / "out")["lines"]
    assert [
        line for line in lines if line.startswith("field 1: ") and "no image: all pixels have the same value" in line
    ]
    assert "no image: all pixels have the same value" in (tmp_path / "out" / results.REPORT).read_text()


def test_run__of_a_healthy_experiment_flags_nothing(done):
    assert results.read_run(done)["quality"]["fov"] == []


def test_run__a_stain_that_is_asked_for_and_not_there_is_an_error(raw, tmp_path):
    with pytest.raises(InputError, match="nuclei_stain: the experiment has no stain 'DAPY'"):
        merfish.run(raw, out=tmp_path / "out", config=RunConfig(nuclei_stain="DAPY"))
    assert not (tmp_path / "out").exists()


@pytest.mark.draws
def test_run__with_a_codebook_of_other_images_ends_with_a_message(experiment, tmp_path, monkeypatch, capsys):
    path = experiment / "codebook.csv"
    book = merfish.read_codebook(path)
    order = np.random.default_rng(0).permutation(book.n_bits)
    merfish.write_codebook(book.permuted(order), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([",".join(["name", "id", *(f"bit{k}" for k in range(1, 17))]), *lines[1:]]) + "\n")
    assert call(monkeypatch, "run", experiment, "--out", tmp_path / "out") == cli.FAILED_FIELDS
    assert "the images do not fit the codebook" in capsys.readouterr().err
    assert not (tmp_path / "out" / results.RUN).exists()
    merfish.run(experiment, out=tmp_path / "out", config=RunConfig(misidentification_rate=1.0))
    assert not results.read_run(tmp_path / "out")["codebook_fit"]["fits"]


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("calls.parquet", "flipped"),
        ("calls.parquet", "cut"),
        ("outlines.parquet", "gone"),
        ("tally.npz", "flipped"),
        ("record.json", "flipped"),
        ("record.json", "gone"),
    ],
)
def test_run_again__makes_damaged_records_again(raw, done, out, name, damage):
    (out / results.RUN).unlink()
    path = out / results.FIELDS / "fov_0001" / name
    spoil(path, damage)
    merfish.run(raw, out=out)
    assert contents(out) == contents(done)
    assert "field 1: recomputed (damaged on disk)" in log_of(out)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_run_again__makes_a_damaged_calibration_again(raw, done, out, damage):
    spoil(out / results.FIELDS / folder.CALIBRATION, damage)
    merfish.run(raw, out=out)
    assert contents(out) == contents(done)


def spoil(path, damage):
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:middle])
    else:
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])


def test_run_again__replaces_results_that_are_not_whole(raw, done, out):
    (out / results.CELLS).unlink()
    merfish.run(raw, out=out)
    assert contents(out) == contents(done)


def test_report__of_a_damaged_record_is_one_message(done, out):
    for text in ("{", "[]", '{"figures": 1}'):
        (out / results.RUN).write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            results.read_run(out)


def test_write_json__a_line_an_entry_reads_as_it_was(tmp_path):
    fields = {fov: {"n": fov, "names": ["a", None], "none": {}} for fov in range(3)}
    packed = Packed({fov: pack(said) for fov, said in fields.items()})
    assert packed == fields
    record = {"fields": packed, "none": {}, "rate": float("nan"), "deep": {"er": {"est": [1, {"a": 2}]}}}
    folder.write_json(tmp_path / "a.json", record)
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert '  "1": {"n": 1, "names": ["a", null], "none": {}},' in lines
    by_name = {str(fov): said for fov, said in fields.items()}
    assert json.loads("".join(lines)) == {**record, "fields": by_name, "rate": None}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["fields", "other", 'a"b']), JSON), st.sampled_from([None, 1]), st.data())
def test_read_json_packed__reads_what_json_reads(tmp_path_factory, value, indent, data):
    path = tmp_path_factory.getbasetemp() / "packed.json"
    text = json.dumps(value, indent=indent)
    path.write_text(text)
    found = read_json_packed(path, "fields")
    assert found == value
    assert isinstance(found.get("fields"), Packed) == isinstance(value.get("fields"), dict)
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(InputError, match=r"packed\.json"):
        read_json_packed(path, "fields")


def test_run_json_is_json(done):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((done / results.RUN).read_text(), parse_constant=refuse)


@pytest.mark.parametrize("kept", range(1, 7))
def test_publication__killed_at_any_moment_is_finished_by_the_next_command(tmp_path, monkeypatch, kept):
    for place, text in ((tmp_path, "old"), (folder.new_stage(tmp_path), "new")):
        for name in (*TABLES, results.RUN):
            (place / name).write_text(text)

    class Killed(BaseException):
        pass

    moves, replace = [], os.replace

    def counted(path, target):
        moves.append(target)
        if len(moves) > kept:
            raise Killed
        replace(path, target)

    monkeypatch.setattr("pathlib.Path.replace", lambda path, target: counted(path, target))
    with suppress(Killed):
        folder.publish(tmp_path)
    monkeypatch.undo()
    texts = {name: (tmp_path / name).read_text() for name in TABLES}
    if (tmp_path / results.RUN).exists():
        assert set(texts.values()) == {(tmp_path / results.RUN).read_text()}
    with folder.owned(tmp_path):
        pass
    assert {(tmp_path / name).read_text() for name in (*TABLES, results.RUN)} == {"new"}


def test_run__killed_leaves_no_litter_after_the_next_run(raw, done, out):
    (out / results.FIELDS / ".fov_0001.abcdef12" / "fov_0001").mkdir(parents=True)
    (out / ".run.json.abcdef12").mkdir()
    (out / results.FIELDS / ".work").mkdir()
    merfish.run(raw, out=out)
    assert [path.name for path in out.rglob(".*")] == [".lock"]


# --- fields that fail -----------------------------------------------------------------------------------------


def test_run__a_mistake_of_the_program_in_one_field_is_listed_and_the_rest_goes_on(raw, tmp_path, monkeypatch):
    work = fields.process_field

    def mistaken(experiment, fov, *rest):
        if fov == 1:
            raise ZeroDivisionError("a mistake")
        return work(experiment, fov, *rest)

    monkeypatch.setattr(fields, "process_field", mistaken)
    merfish.run(raw, out=tmp_path / "out")
    assert run_summary(tmp_path / "out")["failed"] == {"1": "ZeroDivisionError: a mistake"}
    assert "in mistaken" in log_of(tmp_path / "out")  # the traceback
    assert set(calls_of(tmp_path / "out")["fov"]) == {0, 2}
    assert "field 1 failed: ZeroDivisionError: a mistake" in status_lines(tmp_path / "out")


def test_run__a_full_disk_ends_the_run_with_one_error(raw, done, tmp_path, monkeypatch):
    work = fields.process_field

    def full(experiment, fov, *rest):
        if fov == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return work(experiment, fov, *rest)

    monkeypatch.setattr(fields, "process_field", full)
    with pytest.raises(OSError, match="no space left"):
        merfish.run(raw, out=tmp_path / "out")
    assert not (tmp_path / "out" / results.RUN).exists()
    monkeypatch.undo()
    merfish.run(raw, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(done)


def test_run_keep_going__with_every_field_faulty_is_an_error(experiment, tmp_path):
    for path in experiment.glob("merfish_*_03.tif"):
        path.unlink()
    with pytest.raises(InputError, match="3 of 27 files cannot be used"):
        merfish.run(experiment, out=tmp_path / "out", keep_going=True)


def test_run__without_any_field_that_can_be_used_names_them(experiment, tmp_path):
    rng = np.random.default_rng(0)
    for path in experiment.glob("merfish_*_03.tif"):
        noise = rng.poisson(100, tifffile.imread(path).shape).astype(np.uint16)
        tifffile.imwrite(path, noise, photometric="minisblack")
    with pytest.raises(InputError, match=r"no field can be used for calibration\. field 1: rounds 3 do not"):
        merfish.run(experiment, out=tmp_path / "out")


# --- workers --------------------------------------------------------------------------------------------------


def test_processes__a_worker_that_dies_costs_one_field_at_most(tmp_path):
    with run_map_on(workers=2) as run_map:
        assert dict(run_map(works.square, range(5))) == {k: k**2 for k in range(5)}
        found = dict(run_map(works.faulty, range(6)))
        assert found[1] == Failure("bad data")
        assert found[2] == Failure("its worker died 3 times (killed, or out of memory)")
        assert found[3].reason == "ZeroDivisionError: a mistake"
        assert "works.py" in found[3].traceback
        assert [found[k] for k in (0, 4, 5)] == [0, 4, 5]
        assert dict(run_map(works.DiesOnce(tmp_path), range(4))) == {k: k for k in range(4)}


def test_dask__gives_the_same_bytes_and_outlives_what_fields_do(raw, done, tmp_path):
    from distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as local:
        merfish.run(raw, out=tmp_path / "out", scheduler=local.scheduler_address)
        with run_map_on(scheduler=local.scheduler_address) as run_map:
            found = dict(run_map(works.faulty, [0, 1, 3, 4]))
    assert contents(tmp_path / "out") == contents(done)
    assert found[1] == Failure("bad data")
    assert (found[0], found[4]) == (0, 4)


def test_scheduler__that_does_not_answer_is_one_message(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    for address in ("nonsense", "tcp://127.0.0.1:9", "tcp://"):
        with pytest.raises(InputError, match="no Dask scheduler answers"):
            merfish.run(raw, out=tmp_path / "out", scheduler=address)


@pytest.mark.parametrize("options", [[], ["--workers", "2"]])
def test_interrupted__ends_with_one_line_and_goes_on(raw, done, tmp_path, options):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "merfish.cli", "run", str(raw), "--out", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / results.FIELDS / "fov_0000").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = errors.strip().splitlines()
    kept = f"decoded fields are kept in {out}; run the same command again to continue"
    assert line in [f"error: interrupted; {n} {kept}" for n in (1, 2, 3)]
    merfish.run(raw, out=out)
    assert contents(out) == contents(done)
