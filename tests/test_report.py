"""The report of a run: its decisions, sums and files."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import merfish
from command import call
from merfish import InputError, _parquet, plots, results
from merfish.pipeline import folder
from merfish.report import Section, Table, domains, figures, findings, picture, summary, write_report, write_run_report
from merfish.report.molecules import detected_text
from merfish.report.notices import efficiency_line
from merfish.results import DOMAIN, LATENT, LATENT_NAMES
from merfish.simulate import simulate_experiment


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    home = tmp_path_factory.mktemp("report")
    raw = simulate_experiment(home / "tissue", fields=(1, 2), shape=(160, 160), drift=2.0, seed=5)
    merfish.run(raw, out=home / "out")
    return home / "out"


def test_report__loads_nothing_and_stands_alone(done):
    page = (done / results.REPORT).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    targets = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(re.findall(r' id="([^"]+)"', page))
    assert page.count("<svg") == page.count('role="img" aria-label="')
    assert "<th>" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_report__writes_every_picture_as_png_and_its_numbers(done):
    place = done / "report"
    names = {path.stem for path in place.glob("*.png")}
    numbers = {path.stem for path in place.glob("*.csv")}
    assert {"words", "density", "drift", "error_rates", "cells", "seconds", "stains", "map_kept"} <= names
    assert names - numbers == {"detail"}  # its molecules are among those of the field
    kept = pd.read_parquet(done / results.TRANSCRIPTS)
    table = pd.read_csv(place / "fields.csv").set_index("field")
    assert table["kept"].to_dict() == kept["fov"].value_counts().to_dict()
    assert pd.read_csv(place / "density.csv")["molecules"].sum() == (~kept["is_blank"]).sum()
    cells = pd.read_csv(place / "cell_genes.csv")["genes per cell"]
    inside = kept[(kept["cell_id"] >= 0) & ~kept["is_blank"]]
    assert cells.sum() == inside.groupby("cell_id")["gene"].nunique().sum()


def test_report__compares_with_bulk_and_replicates(done, tmp_path, monkeypatch, capsys):
    words = pd.DataFrame(results.read_run(done)["words"])
    bulk = tmp_path / "bulk.csv"
    words[["gene", "n_kept"]].to_csv(bulk, index=False)
    assert call(monkeypatch, "report", done, "--bulk", bulk, "--replicate", done) == 0
    page = (done / results.REPORT).read_text()
    assert "Counts of genes against bulk RNA-seq" in page
    assert "r = 1.000 of log10" in page
    bulk.write_text("gene,value\nGene001,many\n")
    assert call(monkeypatch, "report", done, "--bulk", bulk) == 2
    assert "line 2: expected a gene and a non-negative number, got 'Gene001,many'" in capsys.readouterr().err
    bulk.write_text("Other,1\n")
    with pytest.raises(InputError, match="has no gene of the run"):
        write_run_report(done, bulk=bulk)


def test_report__shows_the_domains_of_an_embedded_run(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    table = anndata.read_h5ad(out / results.CELL_BY_GENE)
    rng = np.random.default_rng(0)
    domain = rng.choice(["0", "1"], table.n_obs)
    table.obs[DOMAIN] = pd.Categorical(domain)
    niche, cell = rng.normal(0, 1, (table.n_obs, 2)), rng.normal(0, 100, (table.n_obs, 3))
    table.obsm[LATENT] = np.hstack([niche, cell]).astype(np.float32)
    table.uns[LATENT_NAMES] = ["niche_0", "niche_1", "cell_0", "cell_1", "cell_2"]
    table.write_h5ad(out / results.CELL_BY_GENE)
    record = results.read_run(out) | {"embedding": {"asked": {}, "found": 2}}
    folder.write_json(out / results.RUN, record)
    page = write_run_report(out).read_text()
    assert f"counts and positions of the {table.n_obs} cells, and 2 domains" in page
    cells = pd.read_csv(out / "report" / "domains.csv", dtype={"domain": str})
    assert cells["domain"].tolist() == domain.tolist()
    np.testing.assert_allclose(cells[["x", "y"]], table.obsm["spatial"][:, :2], rtol=1e-5)
    assert np.ptp(cells["pc1"]) < 10  # contains only the niche dimensions
    genes = table[:, ~table.var["is_blank"]].X.toarray()
    rows = pd.read_csv(out / "report" / "domain_table.csv")
    assert rows["cells"].tolist() == [(domain == "0").sum(), (domain == "1").sum()]
    each = [genes[domain == name].sum(axis=1).mean() for name in "01"]
    np.testing.assert_allclose(rows["molecules of genes per cell"], each)


def test_top_genes__are_those_whose_share_is_raised():
    total = np.array([[100, 100, 0, 3], [300, 100, 100, 0]])
    assert domains.top_genes(total, list("abcd")) == [["b"], ["c", "a"]]  # d has too few molecules


def test_page__shows_names_as_they_are(tmp_path):
    name = r'<b>$\frac"&'
    figure = figures.words_called(np.array([3, 2]), np.array([2, 1]), [name, "blank"], np.array([False, True]))
    section = Section(name, [name], [Table((name,), [(name,), (float("nan"),)])], [picture("words", figure, name)])
    page = write_report(tmp_path / "report.html", name, name, [section]).read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;$\\frac" in page
    assert "<td>–</td>" in page


def spiked(rate, low, high):
    return {"spike_in": {"rate": rate, "low": low, "high": high}, "n_spikes": 100}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (findings.fields_done(100, 0), "pass"),
        (findings.fields_done(99, 1), "warn"),
        (findings.fields_done(1, 1), "fail"),
        (findings.correlation("", 0.95, 100, 0.94), "pass"),
        (findings.correlation("", 0.5, 100, 0.94), "warn"),
        (findings.correlation("", 0.1, 100, 0.94), "fail"),
        (findings.correlation("", 0.1, 5, 0.94), "info"),
        (findings.efficiency({}, {"detection_efficiency": [0.9, 0.8, None, 0.1]}, [False, False, False, True]), "pass"),
        (findings.efficiency({}, {"detection_efficiency": [0.3]}, [False]), "fail"),
        (findings.efficiency(spiked(0.7, 0.6, 0.8), {"detection_efficiency": [0.3]}, [False]), "pass"),
        (findings.efficiency(spiked(0.7, 0.65, 0.75), {"detection_efficiency": [0.9]}, [False]), "warn"),
        (findings.efficiency(spiked(0.3, 0.25, 0.35), {"detection_efficiency": [0.9]}, [False]), "fail"),
        (findings.exact_words({"n_kept": [10, 10], "n_exact": [5, 1]}), "warn"),
        (findings.saturated({"0": {"saturated": [0, 200], "shape": [100, 100]}}, 2), "warn"),
        (findings.saturated({"0": {"saturated": [0, 201], "shape": [100, 100]}}, 1), "fail"),
        (findings.stage({"links": {"used": [True, True]}, "untied": 0})[0], "pass"),
        (findings.stage({"links": {"used": [True, True]}, "untied": 2})[0], "fail"),
    ],
)
def test_findings__hold_figures_against_their_thresholds(found, status):
    assert found.status == status


def test_efficiency__says_how_it_was_measured(done):
    record = results.read_run(done)
    record["figures"] |= spiked(0.7, 0.6, 0.8)
    assert efficiency_line(record)[0].startswith(
        "70% of molecules detected (95% interval 60% to 80%), measured with 100"
    )
    assert "100 molecules were added to the images" in detected_text(record["figures"])
    record["figures"]["spike_in"] = None
    median = np.median(
        [v for v, blank in zip(record["words"]["detection_efficiency"], is_blank(record), strict=True) if not blank]
    )
    assert efficiency_line(record)[0].startswith(f"{median:.0%} of molecules detected in the median gene, from the")
    assert "too high where spots overlap" in detected_text(record["figures"])
    assert "too high" in findings.efficiency(record["figures"], record["words"], is_blank(record)).value


def is_blank(record):
    return record["codebook"]["is_blank"]


def test_error_rates__are_judged_by_their_intervals():
    rates = {"bit": ["a", "b"]}
    for kind in ("lost", "gained"):
        rates |= {kind: [0.05, 0.3], f"{kind}_low": [0.04, 0.1], f"{kind}_high": [0.06, 0.9]}
    assert [found.status for found in findings.error_rates(rates)] == ["pass", "warn"]
    assert findings.error_rates(rates)[0].value == "mean 17.5%, b 30.0%"


@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_sum_molecules__as_one_counts_by_hand(seed, n):
    rng = np.random.default_rng(seed)
    fovs, is_blank = np.array([2, 5, 7]), np.array([False, True, False, False])
    table = pd.DataFrame(
        {
            "fov": rng.choice(fovs, n).astype(np.int32),
            "barcode_id": rng.integers(0, 4, n, dtype=np.int32),
            "cell_id": rng.integers(-1, 3, n),
            "global_x": rng.uniform(10, 20, n),
            "global_y": rng.uniform(-5, 0, n),
        }
    )
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file, row_group_size=50)
    source = pa.BufferReader(file.getvalue())
    found = summary.sum_molecules(source, fovs, is_blank, np.array([10.0, -5.0]), np.array([20.0, 0.0]))
    by_hand = pd.crosstab(table["fov"], table["barcode_id"]).reindex(index=fovs, columns=range(4), fill_value=0)
    np.testing.assert_array_equal(found.counts, by_hand)
    np.testing.assert_array_equal(found.in_cells, [((table["fov"] == f) & (table["cell_id"] >= 0)).sum() for f in fovs])
    assert found.density.sum() == (table["barcode_id"] != 1).sum()
    assert np.all(found.squares.side * np.array(found.density.shape[::-1]) >= [10 - 1e-9, 5 - 1e-9])


@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.integers(1, 90))
def test_parquet__parts_and_places_as_of_the_whole_table(seed, n, most):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"row": np.arange(n), "at_x": rng.uniform(0, 9, n), "at_y": rng.uniform(0, 9, n)})
    file = pa.BufferOutputStream()
    with pq.ParquetWriter(file, pa.Schema.from_pandas(table, preserve_index=False)) as writer:
        for start in range(0, n, 40):
            writer.write_table(pa.Table.from_pandas(table[start : start + 40], preserve_index=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_parquet, "PART", most)
        found = list(_parquet.parts(pa.BufferReader(file.getvalue()), ["row"]))
    assert [row for part in found for row in part["row"].to_pylist()] == list(range(n))
    assert all(len(part) <= max(most, 40) for part in found)
    low, high = rng.uniform(0, 9, (2, 2))
    inside = ((table[["at_x", "at_y"]] >= low) & (table[["at_x", "at_y"]] < high)).all(axis=1)
    near = _parquet.between(pa.BufferReader(file.getvalue()), ["row"], "at", low, high)
    assert near["row"].tolist() == table["row"][inside].tolist()


def test_sum_cells__as_one_counts_by_hand():
    rng = np.random.default_rng(0)
    n, side = 500, 10.0
    cells = pd.DataFrame({name: rng.uniform(0, side, n) for name in ("center_x", "center_y", "volume")})
    cells = cells.assign(n_transcripts=rng.integers(0, 50, n))
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(cells, preserve_index=False), file, row_group_size=70)
    genes, low = rng.integers(0, 9, n, dtype=np.int32), np.zeros(2)
    found = summary.sum_cells(pa.BufferReader(file.getvalue()), genes, low, low + side)
    np.testing.assert_array_equal(found.n_molecules, cells["n_transcripts"])
    np.testing.assert_allclose(found.volume, cells["volume"], rtol=1e-6)
    assert found.squares.side == pytest.approx(side * np.sqrt(2 / n))
    square = (cells[["center_y", "center_x"]] // found.squares.side).astype(int)
    by_hand = cells.groupby([square["center_y"], square["center_x"]])["n_transcripts"].mean()
    filled = np.argwhere(np.isfinite(found.mean_molecules))
    assert filled.tolist() == [list(place) for place in by_hand.index]
    np.testing.assert_allclose(found.mean_molecules[tuple(filled.T)], by_hand)


def test_most_frequent__is_the_code_of_most_cells_in_a_square():
    rng = np.random.default_rng(0)
    squares = summary.Squares(np.array([-3.0, 2.0]), 2.5, (3, 4))
    places, code = rng.uniform([-3, 2], [7, 9.5], (20, 2)), rng.integers(0, 3, 20)
    found = summary.most_frequent(squares, places, code, 3)
    for row, column in np.ndindex(3, 4):
        low = squares.corner + 2.5 * np.array([column, row])
        inside = code[((places >= low) & (places < low + 2.5)).all(axis=1)].tolist()
        assert found[row, column] == (max(sorted(set(inside)), key=inside.count) if inside else -1)
    assert (found == -1).any()


def test_page__shows_the_first_rows_of_a_long_table_and_writes_all(tmp_path):
    rows = [(k,) for k in range(1234)]
    parts = [pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [2, 3]})]
    shown = picture("part", figures.histogram(np.ones(3), "a"), "in parts", lambda: iter(parts))
    section = Section("long", tables=[Table(("k",), rows, name="long")], figures=[shown])
    page = write_report(tmp_path / "report.html", "", "", [section]).read_text()
    assert "The first 1,000 of 1,234 rows; long.csv has all." in page
    assert page.count("<tr>") == 1001
    assert len(pd.read_csv(tmp_path / "report" / "long.csv")) == 1234
    assert pd.read_csv(tmp_path / "report" / "part.csv")["a"].tolist() == [1, 2, 3]


def test_genes_of_cells__leaves_blanks_out(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X/indptr"] = np.array([0, 2, 2, 5])
        file["X/indices"] = np.array([0, 1, 0, 2, 1])
        file["var/is_blank"] = np.array([False, True, False])
    assert summary.genes_of_cells(tmp_path / "a.h5").tolist() == [1, 0, 2]


def test_stage__draws_no_arrows_where_nothing_was_off():
    said = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    links = pd.DataFrame({"a": [0, 0], "b": [1, 2], "used": [True, False]})

    def arrows(change):
        axes = figures.stage(said, said + change, links).axes[0]
        return [child for child in axes.get_children() if type(child).__name__ == "Quiver"], axes.get_title(loc="left")

    assert arrows(0.0) == ([], "all errors are below 1 nm")
    (drawn,), title = arrows(np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
    assert drawn.N == 1
    assert title == "arrows enlarged 20 times; the longest is 2 µm"


def test_matching_colours__gives_found_labels_the_colours_of_their_partners():
    true = np.array(["a", "a", "a", "b", "b", "c", "c", ""])
    found = np.array(["1", "1", "0", "2", "2", "0", "0", "10"])
    colours = plots.colours_of(true[true != ""])
    matched = plots.matching_colours(found, true, colours)
    assert {label: matched[label] for label in "120"} == {"1": colours["a"], "2": colours["b"], "0": colours["c"]}
    assert matched["10"] not in colours.values()
    assert list(plots.colours_of(["10", "2", "1"])) == ["1", "2", "10"]


def test_publication__replaces_the_folder_of_pictures_even_after_a_kill(tmp_path, monkeypatch):
    for place, name in ((tmp_path, "old.png"), (folder.new_stage(tmp_path), "new.png")):
        (place / "report").mkdir()
        (place / "report" / name).write_text(name)
        (place / results.RUN).write_text(name)

    def killed(path, **options):
        rmtree(path, **options)
        if path == tmp_path / "report":
            raise KeyboardInterrupt

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.publish(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / results.RUN).exists()
    with folder.owned(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["new.png"]
    assert (tmp_path / results.RUN).read_text() == "new.png"
