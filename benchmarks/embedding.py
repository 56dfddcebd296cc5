"""Domains found in labelled sections: SpatialVAE beside averages of principal components, same clusterers, same seeds.

    python benchmarks/embedding.py                       # the bundled osmFISH section
    python benchmarks/embedding.py TABLE.h5ad:LABEL ...  # others as well; counts in X, places in obsm["spatial"]
    python benchmarks/embedding.py --peers FOLDER ...    # with what benchmarks/peers/embed.py wrote there

Writes benchmarks/results/embedding.csv (one row a section, method, clusterer and seed) and prints medians over seeds.
Mixtures have one start; leiden (on 15 neighbours, its resolution searched until it gives k clusters) is run if
leidenalg and igraph are installed. Nothing sees the labels but the scores and k.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: a second thread mostly waits

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from merfish import datasets
from spatialvae import SpatialVAE
from spatialvae.graph import knn_graph

RESULT = Path(__file__).parent / "results" / "embedding.csv"
COMPONENTS = 30


def components(table: anndata.AnnData) -> np.ndarray:
    """Principal components (cell, 30) of log counts at median depth."""
    x = np.asarray(table.X.todense() if hasattr(table.X, "todense") else table.X, float)
    depth = x.sum(1, keepdims=True)
    logs = np.log1p(x / depth * np.median(depth))
    return PCA(min(COMPONENTS, min(x.shape) - 1), svd_solver="full").fit_transform(logs)


def mean_of_neighbours(table: anndata.AnnData, seed: int, k: int = 15) -> np.ndarray:
    """Components averaged over the cell and its ``k`` neighbours."""
    near = knn_graph(table.obsm["spatial"], k).index
    y = components(table)
    return np.concatenate([y[:, None], y[near]], 1).mean(1)


def rings(table: anndata.AnnData, seed: int) -> np.ndarray:
    """Components beside their means over neighbours 1-6, 7-18 and 19-36."""
    near = knn_graph(table.obsm["spatial"], 36).index
    y = components(table)
    return np.concatenate([y, *(y[near[:, a:b]].mean(1) for a, b in ((0, 6), (6, 18), (18, 36)))], 1)


def spatialvae_niche(table: anndata.AnnData, seed: int) -> np.ndarray:
    """z_niche, all defaults."""
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, seed=seed)
    model.train(seed=seed, progress=False)
    return model.get_latent_representation(which="niche").astype(float)


def spatialvae_untrained(table: anndata.AnnData, seed: int) -> np.ndarray:
    """z_niche before training: the linear field alone."""
    SpatialVAE.setup_anndata(table)
    return SpatialVAE(table, seed=seed).get_latent_representation(which="niche").astype(float)


def mixture(latent: np.ndarray, k: int, seed: int, covariance: str) -> np.ndarray:
    ridge = 1e-6 * latent.var(0).mean()
    return GaussianMixture(k, covariance_type=covariance, reg_covar=ridge, random_state=seed).fit_predict(latent)


def leiden(latent: np.ndarray, k: int, seed: int) -> np.ndarray:
    import igraph
    import leidenalg

    near = NearestNeighbors(n_neighbors=15).fit(latent).kneighbors(return_distance=False)
    edges = np.c_[np.repeat(np.arange(len(latent)), 15), near.ravel()]
    graph = igraph.Graph(len(latent), edges=edges.tolist()).simplify()
    low, high = 0.005, 4.0
    best: tuple[int, np.ndarray] | None = None
    for _ in range(14):
        resolution = (low * high) ** 0.5
        found = leidenalg.find_partition(
            graph,
            leidenalg.RBConfigurationVertexPartition,
            resolution_parameter=resolution,
            seed=seed,
            n_iterations=2,
        )
        labels = np.array(found.membership)
        clusters = int(labels.max()) + 1
        if best is None or abs(clusters - k) < abs(best[0] - k):
            best = clusters, labels
        if clusters == k:
            break
        low, high = (resolution, high) if clusters < k else (low, resolution)
    assert best is not None
    return best[1]


METHODS: dict[str, Callable[[anndata.AnnData, int], np.ndarray]] = {
    "mean of 15 neighbours": mean_of_neighbours,
    "3 rings": rings,
    "SpatialVAE, untrained": spatialvae_untrained,
    "SpatialVAE": spatialvae_niche,
}


def peers(folder: Path | None, section: str) -> dict[str, Callable[[anndata.AnnData, int], np.ndarray]]:
    """Embeddings that benchmarks/peers/embed.py left in ``folder``, by method."""
    found = sorted({path.stem.split("-")[-2] for path in folder.glob(f"{section}-*.npy")}) if folder else []

    def reader(method: str) -> Callable[[anndata.AnnData, int], np.ndarray]:
        return lambda table, seed: np.load(folder / f"{section}-{method}-{seed}.npy", allow_pickle=False)

    return {method: reader(method) for method in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE.h5ad:LABEL")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder of SECTION-METHOD-SEED.npy")
    options = parser.parse_args()
    sections = {"osmfish": (datasets.osmfish(), "Region")}
    for item in options.tables:
        path, label = item.rsplit(":", 1)
        sections[Path(path).stem] = (anndata.read_h5ad(path), label)
    clusterers: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
        "mixture, tied": lambda latent, k, seed: mixture(latent, k, seed, "tied"),
        "mixture, full": lambda latent, k, seed: mixture(latent, k, seed, "full"),
    }
    if importlib.util.find_spec("leidenalg") and importlib.util.find_spec("igraph"):
        clusterers["leiden"] = leiden
    rows = []
    for section, (table, label) in sections.items():
        truth = table.obs[label].astype(str).to_numpy()
        k = len(set(truth))
        for method, embed in {**METHODS, **peers(options.peers, section)}.items():
            for seed in range(options.seeds):
                started = time.perf_counter()
                try:
                    latent = embed(table, seed)
                except FileNotFoundError:
                    continue  # a peer that was not run with this seed
                seconds = time.perf_counter() - started
                for name, cluster in clusterers.items():
                    found = cluster(latent, k, seed)
                    ari, nmi = adjusted_rand_score(truth, found), normalized_mutual_info_score(truth, found)
                    rows.append((section, method, name, seed, latent.shape[1], ari, nmi, seconds))
    columns = ["section", "method", "clusterer", "seed", "dimensions", "ari", "nmi", "seconds"]
    result = pd.DataFrame(rows, columns=columns)
    RESULT.parent.mkdir(exist_ok=True)
    result.round(4).to_csv(RESULT, index=False)
    wide = result.pivot_table(
        index=["section", "method"], columns="clusterer", values="ari", aggfunc="median", sort=False
    )
    every = result.groupby(["section", "method"], sort=False)
    wide["median"] = every["ari"].median()
    by_seed = result.groupby(["section", "method", "seed"], sort=False)["ari"].median()
    by_seed = by_seed.groupby(["section", "method"], sort=False)
    wide["spread"] = by_seed.max() - by_seed.min()
    wide["nmi"] = every["nmi"].median()
    wide["seconds"] = every["seconds"].median()
    print(wide.round(3).to_string())


if __name__ == "__main__":
    main()
