from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from command import call_spatialvae


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    places, types = rng.uniform(0, 30, (700, 2)), rng.integers(0, 2, 700)
    rate = np.exp(1 + 0.3 * rng.normal(size=(700, 6)) + np.outer(types, [1, 0, 0, 0, 0, 0]))
    path = tmp_path_factory.mktemp("table") / "cells.h5ad"
    anndata.AnnData(
        rng.poisson(rate).astype(np.float32),
        obs=pd.DataFrame({"type": np.array(["p", "q"])[types]}, index=[f"c{i}" for i in range(700)]),
        var=pd.DataFrame(index=list("abcdef")),
        obsm={"spatial": places},
    ).write_h5ad(path)
    return path


def test_neighbours_and_dependence__write_tables_and_figures(monkeypatch, capsys, tmp_path, table):
    assert call_spatialvae(monkeypatch, "neighbours", table, "--labels", "type", "--out", tmp_path) == 0
    couplings = pd.read_csv(tmp_path / "couplings.csv")
    assert set(zip(couplings["label"], couplings["neighbour"], strict=True)) == {("p", "p"), ("p", "q"), ("q", "q")}
    assert "0 of 3 pairs" in capsys.readouterr().out  # types are independent of neighbours
    assert call_spatialvae(monkeypatch, "dependence", table, "--labels", "type", "--out", tmp_path) == 0
    shares = pd.read_csv(tmp_path / "variance.csv").set_index("gene")
    assert shares["type"].idxmax() == "a"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "couplings.csv", "couplings.png", "edges.csv", "edges_without_neighbours.csv", "edges.png",
        "variance.csv", "variance.png", "neighbour_effects.csv", "neighbour_effects.png",
    }  # fmt: skip


def test_report_and_plot__of_a_trained_folder(monkeypatch, capsys, tmp_path, table):
    out, small = tmp_path / "run", tmp_path / "small.h5ad"
    anndata.read_h5ad(table)[:200].copy().write_h5ad(small)
    assert call_spatialvae(monkeypatch, "train", small, "--out", out, "--domains", 3, "--max-epochs", 2) == 0
    assert call_spatialvae(monkeypatch, "neighbours", small, "--labels", "type", "--out", out) == 0
    assert call_spatialvae(monkeypatch, "report", out, "--labels", "type") == 0
    page = (out / "report.html").read_text()
    for heading in ("Training", "Latent space", "Domains", "Niches", "Gene programs", "Neighbouring types"):
        assert f"<h2>{heading}</h2>" in page
    assert "://" not in page  # the page loads nothing from the network
    figure = tmp_path / "latent.png"
    assert call_spatialvae(monkeypatch, "plot", "latent", out / "table.h5ad", "--labels", "type", "--out", figure) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neighbours", "TABLE", "--labels", "none", "--out", "o"], "no column 'none' in obs"),
        (["plot", "latent", "TABLE", "--labels", "type", "--out", "o.png"], "no 'X_spatialvae' in obsm"),
        (["report", "nowhere"], "table.h5ad: no such file"),
    ],
)
def test_bad_input__exits_2_with_one_message(monkeypatch, capsys, tmp_path, table, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call_spatialvae(monkeypatch, *[table if a == "TABLE" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
