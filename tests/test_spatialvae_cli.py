from __future__ import annotations

import json
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from command import call_spatialvae
from spatialvae import SpatialVAE


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "cells.h5ad"
    anndata.AnnData(
        rng.poisson(3, (80, 6)).astype(np.float32),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(80)]),
        var=pd.DataFrame(index=list("abcdef")),
        obsm={"spatial": rng.uniform(0, 9, (80, 2))},
    ).write_h5ad(path)
    return path


def test_train_then_embed__write_whole_results(monkeypatch, capsys, tmp_path, table):
    out = tmp_path / "run"
    train = ["train", table, "--out", out, "--domains", 2, "--max-epochs", 2, "--linear-decoder"]
    assert call_spatialvae(monkeypatch, *train, "--likelihood", "zinb") == 0
    written = {p.name for p in out.iterdir()}
    assert written == {
        "model", "table.h5ad", "history.csv", "run.json", "training.png", "latent.png", "domains.png", "loadings.csv",
    }  # fmt: skip
    first = anndata.read_h5ad(out / "table.h5ad")
    assert first.obsm["X_spatialvae"].shape[1] == len(first.uns["X_spatialvae_names"])
    assert set(first.obs["spatial_domain"]) == {"0", "1"}
    about = json.loads((out / "run.json").read_text())
    assert about["input"]["bytes"] == table.stat().st_size
    assert about["parameters"]["likelihood"] == "zinb"
    assert call_spatialvae(monkeypatch, "embed", table, "--model", out, "--out", tmp_path / "again.h5ad") == 0
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(again.obsm["X_spatialvae"], first.obsm["X_spatialvae"])
    scored = ["evaluate", out / "table.h5ad", "--model", out, "--labels", "spatial_domain", "--samples", 3]
    capsys.readouterr()
    assert call_spatialvae(monkeypatch, *scored) == 0
    assert json.loads(capsys.readouterr().out)["ari"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.h5ad", "--out", "o"], "none.h5ad: no such file"),
        (["train", "TABLE", "--out", "o", "--layer", "nope"], "no layer 'nope'"),
        (["train", __file__, "--out", "o"], "cannot be read as an AnnData file"),
        (["embed", "TABLE", "--model", "nowhere", "--out", "o.h5ad"], "not a saved model"),
    ],
)
def test_bad_input__exits_2_with_one_message(monkeypatch, capsys, tmp_path, table, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call_spatialvae(monkeypatch, *[table if a == "TABLE" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "TABLE"], "File exists"),
        (["--out", "o", "--domains", 81], "--domains is 81; expected at most 80"),
        (["--out", "o", "--seed", -1], "Invalid value for '--seed'"),
    ],
)
def test_train__refuses_before_training(monkeypatch, capsys, tmp_path, table, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SpatialVAE, "train", lambda *_, **__: pytest.fail("it was trained"))
    assert call_spatialvae(monkeypatch, "train", table, *[table if a == "TABLE" else a for a in arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_train__coordinates_in_a_frame(monkeypatch, tmp_path, table):
    adata = anndata.read_h5ad(table)
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])
    adata.write_h5ad(tmp_path / "frame.h5ad")
    out = tmp_path / "run"
    assert call_spatialvae(monkeypatch, "train", tmp_path / "frame.h5ad", "--out", out, "--max-epochs", 1) == 0
    assert call_spatialvae(monkeypatch, "report", out) == 0


def test_import__loads_nothing_heavy_and_prints_nothing():
    code = "import sys, spatialvae, spatialvae.cli; print({'torch', 'anndata', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_two_processes_train_the_model_that_one_trains(table, tmp_path):
    train = ["spatialvae.cli", "train", str(table), "--max-epochs", "3"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for out, command in (("one", [sys.executable, "-m"]), ("two", together)):
        subprocess.run([*command, *train, "--out", str(tmp_path / out)], check=True, capture_output=True, timeout=400)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        # types and the neighbour prior are fitted to the other parameters and amplify rounding errors
        least = 2e-2 if name.startswith("neighbours.") else 1e-3 if name.startswith("type_") else 1e-5
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=least, err_msg=name)
    histories = [pd.read_csv(tmp_path / name / "history.csv")["elbo_train"] for name in ("one", "two")]
    assert histories[0].to_numpy() == pytest.approx(histories[1].to_numpy(), rel=1e-4)
