from __future__ import annotations

import gzip

import numpy as np
import pytest

from spatialvae import InputError, SpatialVAE
from spatialvae.datasets import CORTEX_ROWS, read_cortex, read_hemato

COUNTS = np.random.default_rng(0).poisson(4, (5, 3))  # (gene, cell)


def write_cortex(path, rows=CORTEX_ROWS):
    lines = [["", name, *(f"{name}{cell}" for cell in range(3))] for name in rows]
    lines += [["", "", "", "", ""]]
    lines += [[f"Gene{g}", "1", *map(str, row)] for g, row in enumerate(COUNTS)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def test_read_cortex__cells_genes_and_types(tmp_path):
    found = read_cortex(write_cortex(tmp_path / "expression_mRNA_17-Aug-2014.txt"))
    np.testing.assert_array_equal(found.X, COUNTS.T)
    assert list(found.obs["level1class"]) == ["level1class0", "level1class1", "level1class2"]
    assert list(found.obs_names) == ["cell_id0", "cell_id1", "cell_id2"]
    assert list(found.var_names) == [f"Gene{g}" for g in range(5)]
    SpatialVAE.setup_anndata(found, spatial_key=None)


def test_read_cortex__says_where_the_layout_differs(tmp_path):
    with pytest.raises(InputError, match=r"row 2 has .*'well'.*expected 'group #'"):
        read_cortex(write_cortex(tmp_path / "x.txt", ["tissue", "well", *CORTEX_ROWS[2:]]))
    cut = write_cortex(tmp_path / "y.txt")
    cut.write_text(cut.read_text()[:-4])
    with pytest.raises(InputError, match=r"truncated|row 16"):
        read_cortex(cut)


@pytest.fixture
def hemato(tmp_path):
    path = tmp_path / "GSM2388072_basal_bone_marrow.raw_umifm_counts.csv.gz"
    rows = ["cell_id,barcode,library_id,seq_run_id,pass_filter,Gata1,Cd34,Kit"]
    about = [("a", "basal_bm1", 1), ("b", "basal_bm2", 1), ("c", "basal_bm2", 0), ("d", "basal_bm3", 1)]
    rows += [f"{cell},AC-GT,{library},1,{ok},{i},{i + 1},{i + 2}" for i, (cell, library, ok) in enumerate(about)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(rows) + "\n")
    return path


def test_read_hemato__leaves_out_what_the_authors_leave_out(hemato, tmp_path):
    found = read_hemato(hemato)
    assert list(found.obs_names) == ["b", "d"]
    np.testing.assert_array_equal(found.X, [[1, 2, 3], [3, 4, 5]])
    genes, potential = tmp_path / "genes.txt", tmp_path / "bBM.spring_and_pba.csv"
    genes.write_text("Kit\nGata1\nUnknown\n")
    potential.write_text("cell_id,Potential,Pr_Er\nd,0.5,0.1\n")
    found = read_hemato(hemato, genes, potential)
    assert (list(found.obs_names), list(found.var_names)) == (["d"], ["Kit", "Gata1"])
    np.testing.assert_array_equal(found.X, [[5, 3]])
    assert found.obs.loc["d", "Potential"] == 0.5


def test_read_hemato__says_what_is_missing(hemato, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("cell,x\n1,2\n")
    with pytest.raises(InputError, match="no column 'cell_id'"):
        read_hemato(other)
    with pytest.raises(InputError, match="no such file"):
        read_hemato(tmp_path / "none.csv")
