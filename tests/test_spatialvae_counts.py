from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import sparse_dataset

from command import call_spatialvae
from spatialvae import InputError, SpatialVAE, counts
from spatialvae.cli.files import read_table

FORMATS = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(counts, "ENTRIES", 64)


def table(kind="csr", n=70, genes=6, wrong=None):
    rng = np.random.default_rng(0)
    x = rng.poisson(2, (n, genes)).astype(np.float32)
    x[:, 0] += 1
    x[11, 3] = 300
    if wrong is not None:
        x[wrong] = 0.5
    return anndata.AnnData(
        FORMATS[kind](x),
        obs=pd.DataFrame({"section": pd.Categorical(["a", "b"] * (n // 2))}, index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame({"long": [f"gene {i}" for i in range(genes)]}, index=[f"g{i}" for i in range(genes)]),
        obsm={"spatial": rng.uniform(0, 9, (n, 2)), "other": rng.normal(size=(n, 3))},
        layers={"counts": FORMATS[kind](x)},
        uns={"note": {"by": "hand"}},
    )


def embedding(adata, layer=None):
    SpatialVAE.setup_anndata(adata, layer=layer, spatial_key=None)
    return SpatialVAE(adata).get_latent_representation().tobytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", FORMATS)
def test_backed_table__gives_the_bytes_of_one_in_memory(kind, tmp_path):
    path = tmp_path / "cells.h5ad"
    table(kind).write_h5ad(path)
    expected = embedding(table("csr"))
    assert embedding(anndata.read_h5ad(path, backed="r")) == expected
    with h5py.File(path) as file:
        item = file["layers/counts"]
        whole = table(kind)
        lazy = anndata.AnnData(
            obs=whole.obs,
            var=whole.var,
            obsm=dict(whole.obsm),
            layers={"lazy": item if kind == "dense" else sparse_dataset(item)},
        )
        assert embedding(lazy, "lazy") == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", FORMATS)
def test_read_counts__holds_the_matrix_in_the_smallest_integers(kind):
    x = table(kind).X
    columns = np.array([5, 0, 3])
    found = counts.read_counts(x, columns, "X")
    dense = np.asarray(x if kind == "dense" else x.toarray())[:, columns]
    np.testing.assert_array_equal(found.dense(np.arange(70)), dense)
    np.testing.assert_array_equal(sp.vstack([block for _, block in found.blocks()]).toarray(), dense)
    np.testing.assert_array_equal(found.depth, dense.sum(1))
    assert (found.indices.dtype, found.data.dtype) == (np.uint8, np.uint16)


def test_read_counts__adds_up_entries_given_twice_and_leaves_the_caller_s_matrix():
    twice = sp.csr_matrix(([1.0, 2, 0, 4], [1, 1, 0, 0], [0, 2, 4]), shape=(2, 2))
    np.testing.assert_array_equal(counts.read_counts(twice, np.arange(2), "X").dense(np.arange(2)), [[0, 3], [4, 0]])
    assert twice.nnz == 4


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", FORMATS)
def test_backed_table__names_a_wrong_count_far_down(kind, tmp_path):
    table(kind, wrong=(61, 4)).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    SpatialVAE.setup_anndata(backed)
    with pytest.raises(InputError, match=r"row 61, column 4 is 0\.5"):
        SpatialVAE(backed)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_backed_table__leaves_no_temporary_file(tmp_path, monkeypatch):
    in_memory = table()
    in_memory.write_h5ad(tmp_path / "cells.h5ad")
    SpatialVAE.setup_anndata(in_memory)
    SpatialVAE(in_memory)  # torch-geometric writes generated code to a temporary file once
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def mapped():
        return str(tmp_path / "temporary") in Path("/proc/self/maps").read_text()

    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    SpatialVAE.setup_anndata(backed)
    model = SpatialVAE(backed)
    assert mapped()
    assert list((tmp_path / "temporary").iterdir()) == []
    del model
    gc.collect()
    assert not mapped()


def test_command_line__adds_to_a_copy_of_the_table(monkeypatch, tmp_path):
    given = table("csc")
    given.raw = given.copy()
    given.obsp["pairs"] = sp.eye_array(given.n_obs, format="csr")
    given.write_h5ad(tmp_path / "cells.h5ad")
    command = ["train", "cells.h5ad", "--out", "run", "--layer", "counts", "--domains", "2", "--max-epochs", "1"]
    monkeypatch.chdir(tmp_path)
    assert call_spatialvae(monkeypatch, *command) == 0
    found = anndata.read_h5ad(tmp_path / "run" / "table.h5ad")
    assert set(found.obsm) == {"spatial", "other", "X_spatialvae", "spatial_domain_probability"}
    assert set(found.uns) == {"note", "_spatialvae", "X_spatialvae_names"}
    assert list(found.obs) == ["section", "spatial_domain"]
    with h5py.File("cells.h5ad") as before, h5py.File("run/table.h5ad") as after:
        datasets = []
        before.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
        assert "raw/X/data" in datasets
        for name in datasets:
            np.testing.assert_array_equal(after[name][()], before[name][()], err_msg=name)


@pytest.mark.parametrize("fault", ["indices", "pointers", "data"])
def test_damaged_table__is_refused_before_anything_follows_its_indices(fault, tmp_path):
    path = tmp_path / "cells.h5ad"
    table().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if fault == "data":
            kept = file["X/data"][:-5]
            del file["X/data"]
            file["X/data"] = kept
        else:
            file["X/indices" if fault == "indices" else "X/indptr"][7] = 10**6
    for adata in (read_table(path), anndata.read_h5ad(path)):
        SpatialVAE.setup_anndata(adata)
        with pytest.raises(InputError, match="X is damaged"):
            SpatialVAE(adata)


def test_column_sums__of_many_values_are_those_of_double_precision():
    block = sp.csr_array(np.full((100_000, 2), np.float32(1.386)))
    np.testing.assert_allclose(counts.column_sums(block), 1e5 * float(np.float32(1.386)), rtol=1e-12)
