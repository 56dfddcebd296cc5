from __future__ import annotations

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix

from command import call, call_spatialvae
from merfish.errors import InputError
from merfish.exchange.cosmx import read_cosmx
from merfish.exchange.merscope import read_merscope
from merfish.exchange.plain import read_csv
from merfish.exchange.slideseq import read_slideseq
from merfish.exchange.visium import read_visium
from merfish.exchange.xenium import read_xenium

GENES = ["Gad1", "Slc17a7", "Mbp", "Blank-1"]
N = 40


@pytest.fixture
def truth():
    """Return counts (cell, gene) and positions (cell, 2), in micrometres."""
    rng = np.random.default_rng(0)
    return rng.poisson(3, (N, len(GENES))), rng.uniform(0, 500, (N, 2))


def write_10x(path, counts, names, kinds, barcodes):
    matrix = csc_matrix(counts.T)  # (feature, barcode) by columns, as in 10x Genomics' files
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr", "shape"):
            group[name] = np.asarray(getattr(matrix, name))
        group["barcodes"] = np.array(barcodes, "S")
        group["features/id"] = np.array([f"ENS{k}" for k in range(len(names))], "S")
        group["features/name"] = np.array(names, "S")
        group["features/feature_type"] = np.array(kinds, "S")


def write_xenium(folder, counts, places):
    kinds = ["Gene Expression"] * 3 + ["Negative Control Codeword"]
    ids = [f"abc{k}-1" for k in range(N)]
    write_10x(folder / "cell_feature_matrix.h5", counts, GENES, kinds, ids)
    cells = pd.DataFrame({"cell_id": ids, "x_centroid": places[:, 0], "y_centroid": places[:, 1], "cell_area": 50.0})
    cells.iloc[::-1].to_parquet(folder / "cells.parquet")  # rows need not be in the order of the matrix


def write_visium(folder, counts, places):
    barcodes = [f"ACGT{k}-1" for k in range(N)]
    kinds = ["Gene Expression"] * 3 + ["Blank Codeword"]
    write_10x(folder / "filtered_feature_bc_matrix.h5", counts, GENES, kinds, barcodes)
    (folder / "spatial").mkdir()
    (folder / "spatial" / "scalefactors_json.json").write_text('{"spot_diameter_fullres": 130.0}')
    x, y = places.T * 2  # pixels of 0.5 micrometres
    spots = pd.DataFrame({"b": barcodes, "in": 1, "row": 0, "col": range(N), "y": y, "x": x})
    spots.to_csv(folder / "spatial" / "tissue_positions_list.csv", index=False, header=False)


def write_slideseq(folder, counts, places):
    beads = [f"BEAD{k}" for k in range(N)]
    pd.DataFrame(counts.T, index=pd.Index(GENES, name="GENE"), columns=beads).to_csv(
        folder / "Puck_1.digital_expression.txt.gz", sep="\t"
    )
    table = pd.DataFrame({"barcodes": [*beads, "UNSEEN"], "xcoord": [*(places[:, 0] / 0.65), 0.0]})
    table.assign(ycoord=[*(places[:, 1] / 0.65), 0.0]).to_csv(folder / "BeadLocationsForR.csv", index=False)


def write_cosmx(folder, counts, places):
    key = pd.DataFrame({"fov": [1, 2] * (N // 2), "cell_ID": np.arange(N) // 2 + 1})
    genes = pd.DataFrame(counts, columns=[*GENES[:3], "NegPrb1"])
    outside = pd.DataFrame([[1, 0, 9, 9, 9, 9]], columns=[*key, *genes])
    pd.concat([outside, pd.concat([key, genes], axis=1)]).to_csv(folder / "S0_exprMat_file.csv", index=False)
    x, y = places.T / 0.12028
    cells = key.assign(Area=100, CenterX_global_px=x, CenterY_global_px=y)
    cells.to_csv(folder / "S0_metadata_file.csv.gz", index=False)


def write_merscope(folder, counts, places):
    ids = 1234567890123456789 + np.arange(N)
    pd.DataFrame(counts, index=pd.Index(ids, name="cell"), columns=GENES).to_csv(folder / "cell_by_gene.csv")
    cells = pd.DataFrame({"fov": 3, "volume": 99.5, "center_x": places[:, 0], "center_y": places[:, 1]})
    cells.set_index(pd.Index(ids, name="EntityID")).to_csv(folder / "cell_metadata.csv")


def write_plain(folder, counts, places):
    pd.DataFrame(counts, columns=GENES).to_csv(folder / "counts.csv", index_label="cell")
    pd.DataFrame(places, columns=["x", "y"]).iloc[::-1].to_csv(folder / "coordinates.csv", index_label="cell")


VENDORS = {
    "xenium": (write_xenium, read_xenium),
    "visium": (write_visium, read_visium),
    "slideseq": (write_slideseq, read_slideseq),
    "cosmx": (write_cosmx, read_cosmx),
    "merscope": (write_merscope, read_merscope),
    "csv": (write_plain, read_csv),
}


@pytest.mark.parametrize("kind", VENDORS)
def test_vendors_folder_to_table_to_model(monkeypatch, tmp_path, truth, kind):

    counts, places = truth
    VENDORS[kind][0](tmp_path, counts, places)
    assert call(monkeypatch, "table", "import", kind, tmp_path, "--out", tmp_path / "table.h5ad") == 0
    table = anndata.read_h5ad(tmp_path / "table.h5ad")
    np.testing.assert_array_equal(table.X.toarray(), counts)
    np.testing.assert_allclose(table.obsm["spatial"], places)
    assert table.var["is_blank"].tolist() == [False, False, False, kind != "slideseq"]
    assert table.uns["spatial_unit"] == "micrometre"
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own
    arguments = ["train", tmp_path / "table.h5ad", "--out", tmp_path / "model", "--max-epochs", "1"]
    assert call_spatialvae(monkeypatch, *arguments) == 0
    assert np.isfinite(anndata.read_h5ad(tmp_path / "model" / "table.h5ad").obsm["X_spatialvae"]).all()


def test_visium_of_all_versions(tmp_path, truth):
    counts, places = truth
    write_visium(tmp_path, counts, places)
    spatial = tmp_path / "spatial"
    first = read_visium(tmp_path)
    spots = pd.read_csv(spatial / "tissue_positions_list.csv", header=None)
    spots.columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    spots.to_csv(spatial / "tissue_positions.csv", index=False)
    np.testing.assert_allclose(read_visium(tmp_path).obsm["spatial"], first.obsm["spatial"])
    spots.to_parquet(spatial / "tissue_positions.parquet")
    (spatial / "scalefactors_json.json").write_text('{"spot_diameter_fullres": 7.3, "microns_per_pixel": 0.25}')
    np.testing.assert_allclose(read_visium(tmp_path).obsm["spatial"], first.obsm["spatial"] / 2)


def spoil(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        (
            "csv",
            lambda f: spoil(f / "counts.csv", "\n3,", "\n3,x"),
            "counts.csv: row 4, column Gad1: expected a",
        ),
        ("csv", lambda f: spoil(f / "counts.csv", "\n2,", "\n2,-"), r"row 3, column Gad1: expected a count, got -"),
        ("csv", lambda f: spoil(f / "coordinates.csv", "\n39,", "\n39,far"), r"column x, row .*got 'far"),
        ("csv", lambda f: spoil(f / "coordinates.csv", "\n39,", "\n38,"), "cell '38' appears twice"),
        ("csv", lambda f: spoil(f / "coordinates.csv", "\n39,", "\n99,"), "1 of the 40 cells of counts.csv"),
        ("csv", lambda f: (f / "counts.csv").unlink(), "no file matches counts.csv.*; the folder has coordinates.csv"),
        ("csv", lambda f: (f / "counts.csv").write_text(""), "counts.csv: cannot be read as a table of counts"),
        ("merscope", lambda f: spoil(f / "cell_metadata.csv", "center_x", "x"), "no column center_x; it has EntityID"),
        ("slideseq", lambda f: (f / "BeadLocationsForR.csv").write_text("a,1,2\n"), "no row or column is a bead"),
        ("xenium", lambda f: (f / "cell_feature_matrix.h5").write_bytes(b"HDF"), "not a feature-barcode matrix"),
        (
            "visium",
            lambda f: (f / "spatial/scalefactors_json.json").write_text("{}"),
            "expected a positive microns_per_pixel or",
        ),
    ],
)
def test_faulty_folders_are_named(tmp_path, truth, kind, fault, message):
    write, read = VENDORS[kind]
    write(tmp_path, *truth)
    fault(tmp_path)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_table_import__writes_nothing_on_bad_input(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "table", "import", "xenium", tmp_path / "none", "--out", tmp_path / "t.h5ad") == 2
    assert "expected a folder with cell_feature_matrix.h5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
