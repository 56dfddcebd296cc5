"""Domains in labelled sections: SpatialVAE compared with means of principal components, same clusterers, same seeds.

    python benchmarks/embedding.py                       # the bundled osmFISH section
        python benchmarks/embedding.py TABLE.h5ad:LABEL ...  # other sections; counts in X, positions in obsm["spatial"]
        python benchmarks/embedding.py --peers FOLDER ...    # with the results of benchmarks/peers/embed.py in FOLDER

Writes benchmarks/results/embedding.md and embedding.png. Leiden needs the extra [analysis]:
pip install -c constraints.txt -e '.[vae,analysis]'. Labels are used only for the scores and for k.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second thread

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from clusters import CLUSTERERS
from heldout_tables import dense
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers.embed import DOMAINS
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score
from tables import RESULTS, as_markdown

from merfish import datasets, plots
from spatialvae import SpatialVAE
from spatialvae.graph import knn_graph

COMPONENTS = 30
OURS = "SpatialVAE"
OUR_DOMAINS, OWN = "SpatialVAE.domains", "own"  # a method with a clusterer of its own
Embed = Callable[[anndata.AnnData, int], np.ndarray]


def components(table: anndata.AnnData) -> np.ndarray:
    """Return principal components (cell, 30) of log counts at median depth."""
    x = dense(table.X)
    depth = x.sum(1, keepdims=True)
    logs = np.log1p(x / depth * np.median(depth))
    return PCA(min(COMPONENTS, min(x.shape) - 1), svd_solver="full").fit_transform(logs)


def mean_of_neighbours(table: anndata.AnnData, seed: int, k: int = 15) -> np.ndarray:
    """Average components over the cell and its ``k`` neighbours."""
    near = knn_graph(table.obsm["spatial"], k).index
    y = components(table)
    return np.concatenate([y[:, None], y[near]], 1).mean(1)


def rings(table: anndata.AnnData, seed: int) -> np.ndarray:
    """Concatenate components with their means over neighbours 1-6, 7-18 and 19-36."""
    near = knn_graph(table.obsm["spatial"], 36).index
    y = components(table)
    return np.concatenate([y, *(y[near[:, a:b]].mean(1) for a, b in ((0, 6), (6, 18), (18, 36)))], 1)


def spatialvae_niche(table: anndata.AnnData, seed: int) -> np.ndarray:
    """Return z_niche with all defaults."""
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, seed=seed)
    model.train(seed=seed, progress=False)
    return model.get_latent_representation(which="niche").astype(float)


def spatialvae_untrained(table: anndata.AnnData, seed: int) -> np.ndarray:
    """Return z_niche before training: the linear field alone."""
    SpatialVAE.setup_anndata(table)
    return SpatialVAE(table, seed=seed).get_latent_representation(which="niche").astype(float)


METHODS: dict[str, Embed] = {
    "mean of 15 neighbours": mean_of_neighbours,
    "3 rings": rings,
    "SpatialVAE, untrained": spatialvae_untrained,
    OURS: spatialvae_niche,
}


def embeddings(
    table: anndata.AnnData, section: str, seeds: int, folder: Path | None
) -> Iterator[tuple[str, int, np.ndarray, float]]:
    """Yield method, seed, embedding and seconds of CPU; for peers, from the files of benchmarks/peers/embed.py."""
    for method, embed in METHODS.items():
        for seed in range(seeds):
            started = time.process_time()
            latent = embed(table, seed)
            yield method, seed, latent, time.process_time() - started
    for method in DOMAINS if folder else ():
        for seed in range(seeds):
            path = folder / f"{section}-{method}-{seed}.npy"
            if path.exists():
                yield method, seed, np.load(path, allow_pickle=False).astype(float), np.nan


def own_domains(table: anndata.AnnData, k: int, seed: int) -> np.ndarray:
    """Return the domains of a model with all defaults, but for the encoder of neighbours, which they do not use."""
    SpatialVAE.setup_anndata(table)
    model = SpatialVAE(table, seed=seed, niche_encoder="field")
    model.train(seed=seed, progress=False)
    return model.domains(k, seed=seed)


def runs(table: anndata.AnnData, label: str, section: str, seeds: int, folder: Path | None) -> pd.DataFrame:
    """Return a row for each method, clusterer and seed, with the clusters (column ``found``)."""
    truth = table.obs[label].astype(str).to_numpy()
    k = len(set(truth))
    rows = []

    def add(method: str, clusterer: str, seed: int, dimensions: float, seconds: float, found: np.ndarray) -> None:
        ari, nmi = adjusted_rand_score(truth, found), normalized_mutual_info_score(truth, found)
        rows.append((section, method, clusterer, seed, dimensions, ari, nmi, seconds, found))

    for seed in range(seeds):
        started = time.process_time()
        found = own_domains(table, k, seed)
        add(OUR_DOMAINS, OWN, seed, np.nan, time.process_time() - started, found)
    for method, seed, latent, seconds in embeddings(table, section, seeds, folder):
        for clusterer, cluster in CLUSTERERS.items():
            add(method, clusterer, seed, latent.shape[1], seconds, cluster(latent, k, seed))
    columns = ["section", "method", "clusterer", "seed", "dimensions", "ari", "nmi", "seconds", "found"]
    return pd.DataFrame(rows, columns=columns)


def summary(result: pd.DataFrame, score: str) -> pd.DataFrame:
    """Return medians of a score by clusterer and over all, and the range of the medians over seeds."""
    wide = result.pivot_table(index="method", columns="clusterer", values=score, aggfunc="median", sort=False)
    every = result.groupby("method", sort=False)
    wide["median"] = every[score].median()
    by_seed = result.groupby(["method", "seed"], sort=False)[score].median().groupby("method", sort=False)
    wide["spread"] = by_seed.max() - by_seed.min()
    wide["seeds"] = every["seed"].nunique()
    if score == "ari":
        wide["dimensions"], wide["seconds"] = every["dimensions"].first(), every["seconds"].median().round(1)
    return wide.round(3).fillna("").reset_index()


def in_colours_of(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Renumber ``found`` by the true domains with the largest overlap; -1 for surplus clusters."""
    k = truth.max() + 1
    overlap = confusion_matrix(truth, found, labels=range(max(k, found.max() + 1)))[:k]
    domains, clusters = linear_sum_assignment(-overlap)
    new = np.full(overlap.shape[1], -1)
    new[clusters] = domains
    return new[found]


def draw_map(ax: Axes, table: anndata.AnnData, kinds: np.ndarray, title: str) -> None:
    """Draw cells in the colours of their domains."""
    x, y = np.asarray(table.obsm["spatial"], float)[:, :2].T
    colours = [plots.CATEGORIES[k % len(plots.CATEGORIES)] if k >= 0 else "#cbd5e1" for k in kinds]
    ax.scatter(x, y, s=12_000 / len(x), c=colours, lw=0)
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    ax.spines[:].set_visible(False)


def draw_scores(ax: Axes, result: pd.DataFrame, methods: list[str]) -> None:
    """Plot the ARI of every clusterer and seed, best method on top, with the median as a bar."""
    clusterers = [*CLUSTERERS, OWN]
    offsets = dict(zip(clusterers, (0.22, 0.0, -0.22, 0.0), strict=True))
    colours = dict(zip(clusterers, ("#2563eb", "#16a34a", "#ea580c", "#7c3aed"), strict=True))
    for place, method in enumerate(reversed(methods)):
        part = result[result["method"] == method]
        for clusterer, offset in offsets.items():
            values = part.loc[part["clusterer"] == clusterer, "ari"]
            name = clusterer if place == 0 else None
            ax.scatter(
                values, np.full(len(values), place + offset), s=14, color=colours[clusterer], alpha=0.6, label=name
            )
        ax.plot([part["ari"].median()] * 2, [place - 0.4, place + 0.4], color="#0f172a", lw=1.5)
    ax.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=8)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith(OURS) else "normal")
    ax.set_xlabel("ARI; bar: median")
    ax.grid(axis="x", color="#e2e8f0")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def picture(sections: dict[str, tuple[anndata.AnnData, str]], result: pd.DataFrame, path: Path) -> None:
    """Draw a row per section: truth, ours, the two best other methods by their median runs, and the ARI of each run."""
    figure = Figure(figsize=(17, 4.2 * len(sections)), layout="constrained")
    grid = figure.add_gridspec(len(sections), 5, width_ratios=(1, 1, 1, 1, 1.5))
    for row, (section, (table, label)) in enumerate(sections.items()):
        part = result[result["section"] == section]
        ranked = part.groupby("method")["ari"].median().sort_values(ascending=False)
        truth = np.unique(table.obs[label].astype(str), return_inverse=True)[1]
        draw_map(figure.add_subplot(grid[row, 0]), table, truth, f"{section}\n{label}")
        for column, method in enumerate(
            [OUR_DOMAINS, *[m for m in ranked.index if not m.startswith(OURS)][:2]], start=1
        ):
            mine = part[part["method"] == method].sort_values("ari", kind="stable")
            run = mine.iloc[len(mine) // 2]
            title = f"{method}\n{run.clusterer}, seed {run.seed}: ARI {run.ari:.2f}"
            draw_map(figure.add_subplot(grid[row, column]), table, in_colours_of(truth, run.found), title)
        ax = figure.add_subplot(grid[row, 4])
        draw_scores(ax, part, list(ranked.index))
        if row == 0:
            ax.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def page(sections: dict[str, tuple[anndata.AnnData, str]], result: pd.DataFrame, peers: bool) -> str:
    """Return the tables of all sections."""
    text = [
        "# Domains in labelled sections\n",
        f"Made by `python benchmarks/embedding.py TABLE.h5ad:LABEL{' --peers FOLDER' if peers else ''}`.\n",
        "Median over seeds for each clusterer, with the true number k: Gaussian mixtures with one initialisation and",
        "tied or full covariances, and Leiden on 15 neighbours at the resolution that gives k clusters. `median`: over",
        "clusterers and seeds. `spread`: range over seeds of the median over clusterers. `SpatialVAE.domains` is the",
        'model\'s own clustering; "SpatialVAE" is the clustering of z_niche. Other tools are run as in',
        "`benchmarks/peers`, which also pins their versions. `seconds`: CPU time of the embedding.\n",
        "BANKSY: lambda 0.8, 15 neighbours, scaled counts. STAGATE: 6 nearest neighbours instead of a radius, whose",
        "default suits another technique. CellCharter: scVI, then means over 3 layers of a Delaunay graph. scVIVA",
        "needs cell types: 20 k-means clusters of scVI's latent space.\n",
        "![sections and scores](embedding.png)\n",
    ]
    for section, (table, label) in sections.items():
        part = result[result["section"] == section]
        k = table.obs[label].nunique()
        text.append(f"## {section}: {table.n_obs:,} cells, {table.n_vars} genes, {k} of `{label}`\n")
        text += [f"ARI\n\n{as_markdown(summary(part, 'ari'))}\n", f"NMI\n\n{as_markdown(summary(part, 'nmi'))}\n"]
    return "\n".join(text)


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
    found = [runs(table, label, name, options.seeds, options.peers) for name, (table, label) in sections.items()]
    result = pd.concat(found, ignore_index=True)
    picture(sections, result, RESULTS / "embedding.png")
    (RESULTS / "embedding.md").write_text(page(sections, result, options.peers is not None))
    print((RESULTS / "embedding.md").read_text())


if __name__ == "__main__":
    main()
