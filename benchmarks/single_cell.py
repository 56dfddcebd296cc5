"""SpatialVAE without positions, scVI and PCA on two published tables of dissociated cells: same cells, same seeds.

    python benchmarks/single_cell.py --data FOLDER [--peers FOLDER] [--seeds 5] [--tables CORTEX HEMATO]

The data FOLDER contains zeisel_cortex_1464x1000.h5ad (CORTEX, 3 types in obs["labels"]) and
haematopoietic_progenitors_6933.h5ad (HEMATO, 4 sorted populations in obs["sample"]), of which 2,000 cells and 1,000
genes are used. scVI runs in a separate environment by benchmarks/peers/embed.py, which installs it. Writes
benchmarks/results/single_cell.md and a picture of each table.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from heldout_tables import dense
from peers import embed
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE, plots
from spatialvae.dependence import log_expression, most_variable

HELD_OUT = 0.2
SAMPLES = 1000
PEERS = ["scVI", "scVI_heldout"]
HEMATO_CELLS, HEMATO_GENES = 2000, 1000


def cortex(folder: Path) -> tuple[anndata.AnnData, str]:
    table = anndata.read_h5ad(folder / "zeisel_cortex_1464x1000.h5ad")
    return anndata.AnnData(dense(table.X).astype(np.float32), obs=table.obs, var=table.var), "labels"


def hemato(folder: Path) -> tuple[anndata.AnnData, str]:
    """Return a fixed sample of cells, and the most variable genes in it."""
    table = anndata.read_h5ad(folder / "haematopoietic_progenitors_6933.h5ad")
    rows = np.sort(np.random.default_rng(0).permutation(table.n_obs)[:HEMATO_CELLS])
    counts = dense(table.X[rows]).astype(np.float32)
    genes = most_variable(counts, HEMATO_GENES)
    return anndata.AnnData(counts[:, genes], obs=table.obs.iloc[rows], var=table.var.iloc[genes]), "sample"


TABLES = {"CORTEX": cortex, "HEMATO": hemato}


def scores(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Score clusters by k-means with the known number, and the labels themselves."""
    found = KMeans(len(set(labels)), n_init=10, random_state=seed).fit_predict(latent)
    return {
        "NMI": normalized_mutual_info_score(labels, found),
        "ARI": adjusted_rand_score(labels, found),
        "silhouette": float(silhouette_score(latent, labels)),
    }


def ours(table: anndata.AnnData, seed: int) -> np.ndarray:
    SpatialVAE.setup_anndata(table, spatial_key=None)
    model = SpatialVAE(table, seed=seed)
    model.train(seed=seed, progress=False)
    return model.get_latent_representation()


def ours_held_out(table: anndata.AnnData, held: np.ndarray, seed: int) -> float:
    train, test = table[~held].copy(), table[held].copy()
    SpatialVAE.setup_anndata(train, spatial_key=None)
    model = SpatialVAE(train, seed=seed)
    model.train(seed=seed, progress=False)
    return model.get_marginal_ll(test, n_mc_samples=SAMPLES, seed=seed)


def run(name: str, table: anndata.AnnData, key: str, peers: Path, seeds: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a row for each method and seed, and our first embedding."""
    labels = table.obs[key].astype(str).to_numpy()
    held = np.zeros(table.n_obs, bool)
    held[np.random.default_rng(0).permutation(table.n_obs)[: int(HELD_OUT * table.n_obs)]] = True
    table.obs["held_out"] = held
    path = peers / f"{name}.h5ad"
    peers.mkdir(parents=True, exist_ok=True)
    table.write_h5ad(path)
    embed.deliver(path, peers, PEERS, seeds, embed.CACHE)
    logs = log_expression(dense(table.X))
    rows: list[dict[str, str | float]] = []
    first = None
    for seed in range(seeds):
        latent = {
            "SpatialVAE": ours(table, seed),
            "scVI": np.load(peers / f"{name}-scVI-{seed}.npy"),
            "PCA": PCA(30, random_state=seed).fit_transform(logs),
        }
        first = latent["SpatialVAE"] if first is None else first
        evidence = {
            "SpatialVAE": ours_held_out(table, held, seed),
            "scVI": float(np.load(peers / f"{name}-scVI_heldout-{seed}.npy").mean()),
            "PCA": np.nan,
        }
        for method, z in latent.items():
            rows.append({"method": method, "held-out log p": evidence[method], **scores(z, labels, seed)})
    assert first is not None
    return pd.DataFrame(rows), first


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over seeds."""
    groups = found.groupby("method", sort=False)
    mean, sd = groups.mean(), groups.std()

    def text(column: str, method: str) -> str:
        d = 1 if column.endswith("log p") else 3
        value = mean.loc[method, column]
        spread = "" if np.isnan(sd.loc[method, column]) else f" ± {sd.loc[method, column]:.{d}f}"
        return "" if np.isnan(value) else f"{value:.{d}f}{spread}"

    return pd.DataFrame([{"method": m, **{c: text(c, m) for c in mean}} for m in mean.index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="folder for tables and results of scVI")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    peers = options.peers or Path(tempfile.mkdtemp())
    warnings.simplefilter("ignore")
    about = (
        "Made by `python benchmarks/single_cell.py --data FOLDER`. SpatialVAE without positions and scVI (defaults of "
        f"both) and 30 principal components of log counts; mean ± standard deviation, {options.seeds} seeds. "
        f"held-out log p: nats per cell, of the {HELD_OUT:.0%} of cells that are held out, given their total "
        f"counts, {SAMPLES:,} importance samples for both models (scVI with NB and early stopping). NMI and ARI: "
        "k-means with the known number of clusters. silhouette: of the labels, Euclidean, in spaces of 30 (ours, PCA) "
        "and 10 (scVI) dimensions."
    )
    page = ["# Dissociated cells", "", about, ""]
    for name in options.tables:
        table, key = TABLES[name](options.data)
        found, latent = run(name, table, key, peers, options.seeds)
        page += [f"## {name}: {table.n_obs:,} cells, {table.n_vars:,} genes", "", as_markdown(summary(found)), ""]
        figure = plots.latent_distances(latent, table.obs[key].astype(str).to_numpy(), title=name)
        figure.savefig(RESULTS / f"single_cell_{name.lower()}.png")
        page += [f"![Distances between cells, ordered by label, and a map](single_cell_{name.lower()}.png)", ""]
        (RESULTS / "single_cell.md").write_text("\n".join(page))
        print("\n".join(page[-6:]), flush=True)


if __name__ == "__main__":
    main()
