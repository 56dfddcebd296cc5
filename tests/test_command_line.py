from __future__ import annotations

import json
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import tifffile
import typer
from typer.testing import CliRunner

import merfish
import spatialvae.cli
from command import call
from merfish import cli, mhd4_codebook, simulate_stack, write_codebook
from merfish._files import whole_file
from merfish._jit import compilation_said
from merfish.config import RunConfig, read_config
from merfish.errors import InputError
from merfish.transcripts import read_transcripts


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "codebook.csv"
    write_codebook(mhd4_codebook([f"g{k}" for k in range(120)]), path)
    return path


def test_codebook_commands(monkeypatch, tmp_path, capsys):
    (tmp_path / "genes.csv").write_text("gene,expression\nACTB,100\nMALAT1,500\nCD4,1\n")
    assert call(monkeypatch, "codebook", "make", tmp_path / "genes.csv", "--out", tmp_path / "b.csv") == 0
    assert "3 genes and 137 blanks" in capsys.readouterr().out
    assert call(monkeypatch, "codebook", "check", tmp_path / "b.csv") == 0
    assert "minimum distance  4: corrects 1, detects 2" in capsys.readouterr().out
    assert call(monkeypatch, "codebook", "show", tmp_path / "b.csv") == 0
    assert capsys.readouterr().out.count("\n") == 140


def test_codebook_check_of_a_faulty_book_names_its_rows(monkeypatch, tmp_path, capsys):
    (tmp_path / "b.csv").write_text("name,id,barcode\nA,,110011\nB,,110011\nA,,001111\n")
    assert call(monkeypatch, "codebook", "check", tmp_path / "b.csv") == 2
    out, err = capsys.readouterr()
    assert "words             3" in out
    assert "name 'A' appears 2 times: words 1, 3" in err
    assert "110011 is given to A, B" in err


@pytest.mark.parametrize("command", ["check", "show"])
def test_codebook_commands_send_no_control_characters(monkeypatch, tmp_path, capsys, command):
    book = tmp_path / "b\x1b[31m.csv"
    book.write_text("bit_names,a\x9b2J,b\nname,id,barcode\n\x1b]0;me\x07,,10\n\x1b]0;me\x07,,01\n")
    assert call(monkeypatch, "codebook", command, book) == 2
    book.write_text("bit_names,a,b\nname,id,barcode\nA\u202eB,,10\nC,,10\n")
    assert call(monkeypatch, "codebook", command, book) == 2
    written = "".join(capsys.readouterr())
    assert r"b\x1b[31m.csv" in written
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", written)


@pytest.mark.parametrize(
    "text",
    ["1-0", "0-99999999999", "99999999999", "²", "0,²", "", "1,,2", "1,", "3-", "-3", "1-2-3", "１", "0-1000000"],
)
def test_parse_fovs__refuses(text):
    with pytest.raises(InputError, match=r"--fov .* expected"):
        cli.parse_fovs(text)


def test_parse_fovs__lists_and_ranges():
    assert cli.parse_fovs(" 7, 0-2 ,1") == [0, 1, 2, 7]


@pytest.mark.parametrize("text", ["4", "4x", "²x2", "999999999x1", "4x4x4"])
def test_parse_pair__refuses(text):
    with pytest.raises(InputError, match=r"--fields .* expected two numbers"):
        cli.parse_pair("--fields", text)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_decode_a_file(monkeypatch, tmp_path, book, suffix):
    stack, _ = simulate_stack(mhd4_codebook([f"g{k}" for k in range(120)]), shape=(128, 128), density=0.004)
    path = tmp_path / f"stack{suffix}"
    if suffix == ".npy":
        np.save(path, stack)
    else:
        tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    assert call(monkeypatch, "decode", path, "--codebook", book, "--out", tmp_path / "out") == 0
    calls = read_transcripts(tmp_path / "out" / "transcripts.parquet")
    assert len(calls) > 30
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["inputs"][path.name]["bytes"] == path.stat().st_size
    assert record["parameters"]["method"] == "spots"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "{tmp}/none.npy", "--codebook", "{book}", "--out", "{tmp}/out"], "none.npy"),
        (
            ["decode", "{tmp}/short.npy", "--codebook", "{book}", "--out", "{tmp}/out"],
            "15 bits, but the codebook has 16",
        ),
        (["run", "{tmp}/nowhere", "--out", "{tmp}/out"], "nowhere"),
        (["run", "{tmp}", "--out", "{tmp}/out", "--fov", "1;2"], "expected numbers and ranges"),
        (["run", "{tmp}", "--out", "{tmp}/out", "--workers", "2", "--scheduler", "tcp://x"], "cannot be combined"),
        (["report", "{tmp}"], "run.json"),
        (["simulate", "{tmp}", "--fields", "4"], "expected two numbers such as 4x4"),
        (["codebook", "show", "{tmp}"], "codebook"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(monkeypatch, tmp_path, capsys, book, arguments, message):
    np.save(tmp_path / "short.npy", np.zeros((15, 8, 8), np.uint16))
    assert call(monkeypatch, *(text.format(tmp=tmp_path, book=book) for text in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["merfish", "merfish.cli", "spatialvae"])
def test_import_is_light_and_silent(name):
    heavy = "{'numba', 'torch', 'anndata', 'matplotlib', 'skimage', 'torch_geometric', 'sklearn'}"
    code = (
        f"import sys, threading, {name}; assert threading.active_count() == 1; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_merfish_never_imports_torch():
    code = "import sys, merfish.pipeline, merfish.report, merfish.demo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_whole_file_leaves_the_old_and_no_litter_when_writing_fails(tmp_path):
    def half_way():
        with whole_file(tmp_path / "a") as part:
            part.write_text("half")
            raise ZeroDivisionError

    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError):
        half_way()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_whole_file_replaces_a_folder_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with whole_file(tmp_path / "a") as part:
        part.mkdir()
        (part / "new").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def commands(app):
    """Return name and click command of every command of a command line."""
    group = typer.main.get_command(app)
    stack = [((), group)]
    while stack:
        path, command = stack.pop()
        yield list(path), command
        stack += [((*path, name), child) for name, child in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("app", [cli.app, spatialvae.cli.app], ids=["merfish", "spatialvae"])
def test_help_shows_every_word_and_unit(app):
    for path, command in commands(app):
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
        for text in (command.help or "", *(getattr(p, "help", None) or "" for p in command.params)):
            for word in text.split():
                assert word.strip("`*") in shown, (path, text)


@pytest.mark.parametrize(("app", "name"), [(cli.app, "merfish"), (spatialvae.cli.app, "spatialvae")])
def test_version_says_what_results_depend_on(app, name):
    lines = CliRunner().invoke(app, ["--version"]).output.splitlines()
    assert lines[0].startswith(f"{name} {merfish.__version__}")
    assert lines[1].startswith("Python 3.")
    assert f"numpy {np.__version__}" in lines


def test_config__is_written_once_and_read_as_the_defaults(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "config", "--out", tmp_path / "run.yaml") == 0
    assert read_config(tmp_path / "run.yaml") == RunConfig()
    (tmp_path / "run.yaml").write_text("method: pixels\n")
    assert call(monkeypatch, "config", "--out", tmp_path / "run.yaml") == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert read_config(tmp_path / "run.yaml", method="hamming").method == "hamming"
    assert call(monkeypatch, "config") == 0
    text = capsys.readouterr().out
    for name, field in RunConfig.model_fields.items():
        assert field.description
        assert re.search(rf"^(# )?{name}: ", text, re.M)


def test_compilation_is_said_once():
    said = []
    with compilation_said(said.append):
        for value in (1, 1.0):
            numba.njit(lambda x: x + 1)(value)
    assert len(said) == 1
    numba.njit(lambda x: x + 2)(1)
    assert len(said) == 1


@pytest.mark.parametrize("given", [["{}"], ["--out", "{}"], ["--out={}"]])
def test_demo_and_simulate__take_the_folder_as_argument_or_option(monkeypatch, tmp_path, given):
    asked = []
    monkeypatch.setattr("merfish.demo.run_demo", asked.append)
    monkeypatch.setattr("merfish.simulate.simulate_experiment", lambda out, **_: asked.append(out))
    folder = [text.format(tmp_path / "a") for text in given]
    assert call(monkeypatch, "demo", *folder) == call(monkeypatch, "simulate", *folder, "--fields", "2x2") == 0
    assert asked == [tmp_path / "a"] * 2
