"""Tables that define the held-out cells and counts, for benchmarks/heldout.py."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from merfish import datasets

REMOVED = 0.1  # share of cells that are held out, and of counts that are thinned away
LEAST = 5  # minimum counts of a cell
HELD_OUT = ("bz5", "bz14", "mop1", "cortex", "osmfish", "hypothalamus")  # tables whose held-out cells are evaluated


def prepared(
    counts: np.ndarray, genes: np.ndarray, places: np.ndarray | None, kinds: pd.Series | None
) -> anndata.AnnData:
    """Return a table with obs["held_out"], layers["thinned"] and, if known, obs["kind"]; omits cells without counts."""
    keep = counts.sum(1) >= LEAST
    counts = np.round(counts[keep]).astype(np.int64)
    rng = np.random.default_rng(0)
    held = np.zeros(len(counts), bool)
    held[rng.permutation(len(counts))[: int(REMOVED * len(counts))]] = True
    thinned = rng.binomial(counts, 1 - REMOVED)
    obs = pd.DataFrame({"held_out": held}, index=[f"cell{i}" for i in range(len(counts))])
    if kinds is not None:
        obs["kind"] = kinds.astype(str).to_numpy()[keep]
    table = anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=genes))
    table.layers["thinned"] = sp.csr_matrix(thinned.astype(np.float32))
    if places is not None:
        table.obsm["spatial"] = np.asarray(places, float)[keep]
    return table


def dense(x: np.ndarray | sp.spmatrix) -> np.ndarray:
    return np.asarray(x.todense() if sp.issparse(x) else x, float)


def sections(data: Path) -> dict[str, anndata.AnnData]:
    """Return the tables by name; MERFISH: genes counted as molecules; MOp: those detected in slice 1."""
    read = {
        "hypothalamus": anndata.read_h5ad(data / "spatial_tables" / "merfish_hypothalamus.h5ad"),
        "mop1": anndata.read_h5ad(data / "spatial_tables" / "merfish_mop_slice1.h5ad"),
        "mop10": anndata.read_h5ad(data / "spatial_tables" / "merfish_mop_slice10.h5ad"),
        "osmfish": datasets.osmfish(),
        "bz5": anndata.read_h5ad(data / "spatial_tables" / "starmap_mpfc_BZ5.h5ad"),
        "bz14": anndata.read_h5ad(data / "spatial_tables" / "starmap_mpfc_BZ14.h5ad"),
        "cortex": anndata.read_h5ad(data / "single_cell" / "zeisel_cortex_1464x1000.h5ad"),
    }
    counts = {name: dense(table.layers.get("counts_recovered", table.X)) for name, table in read.items()}
    found = {}
    for name, table in read.items():
        genes = counts["mop1" if name == "mop10" else name].sum(0) > 0
        kinds = table.obs.get({"hypothalamus": "celltype", "osmfish": "ClusterName"}.get(name))
        found[name] = prepared(counts[name][:, genes], table.var_names[genes], table.obsm.get("spatial"), kinds)
    return found


def split(table: anndata.AnnData) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Return the cells for training, and the held-out cells."""
    held = table.obs["held_out"].to_numpy(bool)
    return table[~held].copy(), table[held].copy()
