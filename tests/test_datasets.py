"""The bundled data."""

from __future__ import annotations

import pytest

from merfish import datasets
from merfish.codebook import read_codebook


def test_merfish_raw__attribution_beside_it():
    folder = datasets.merfish_raw()
    assert "Copyright (c) 2019 Harvard University" in (folder / "LICENSE").read_text()
    assert len(list(folder.glob("test_[01]_[0-7].tif"))) == 16


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("merlin_test", (140, 16)),
        ("140genesData.1", (140, 16)),
        ("140genesData.2", (140, 16)),
        ("1001genesData_MHD2", (1001, 14)),
    ],
)
def test_codebooks__every_one_reads(name, shape):
    assert read_codebook(datasets.codebooks()[name]).words.shape == shape


def test_codebooks__attribution_beside_them():
    paths = datasets.codebooks()
    assert len(paths) == 4
    notes = (paths["merlin_test"].parent / "README.md").read_text()
    assert all(path.name in notes for path in paths.values())


def test_osmfish__cells_genes_regions():
    table = datasets.osmfish()
    assert table.shape == (4839, 33)
    assert table.obs["Region"].nunique() == 11
    assert table.obsm["spatial"].shape == (4839, 2)
