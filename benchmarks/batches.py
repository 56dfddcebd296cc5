"""Transfer of cell types between batches, with and without `batch_key`, compared with scVI.

    python benchmarks/batches.py [DATA] [--peers FOLDER] [--seeds N]

DATA is the folder of real data, from which two STARmap sections are read. In addition, tissues of three batches are
simulated. With unequal compositions, types are frequent in some batches and rare in others. Writes
benchmarks/results/batches.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second thread

import argparse
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from peers.embed import CACHE, deliver
from sklearn.neighbors import NearestNeighbors
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE

BATCHES, CELLS, GENES, TYPES = 3, 700, 120, 10  # of a simulated tissue; cells per batch
EFFECT = 0.5  # standard deviation of the batch effect on log shares of genes
KEPT = 0.15  # fraction of cells kept of types that are made rare in a real section
NEIGHBOURS = 15
OURS, WITHOUT, PEER = "SpatialVAE", "SpatialVAE without batch_key", "scVI"

Row = dict[str, str | int | float]


def simulated(seed: int, unequal: bool) -> anndata.AnnData:
    """Simulate batches with obs["batch"], obs["type"] and four domains each; negative binomial counts, 60 per cell."""
    rng = np.random.default_rng(seed)
    profile = rng.dirichlet(np.ones(GENES)) * np.exp(rng.normal(0, 1, (TYPES, GENES)))
    parts = []
    for batch in range(BATCHES):
        frequency = rng.dirichlet(np.full(TYPES, 0.4)) if unequal else np.full(TYPES, 1 / TYPES)
        places = rng.uniform(0, 100, (CELLS, 2))
        in_domain = rng.dirichlet(6 * frequency + 0.02, 4)[(places[:, 0] // 25).astype(int)]
        kind = (rng.random((CELLS, 1)) > in_domain.cumsum(1)).sum(1).clip(0, TYPES - 1)
        share = profile[kind] * np.exp(rng.normal(0, EFFECT, GENES))
        depth = rng.gamma(4, 60 / 4, CELLS) / share.sum(1)
        counts = rng.poisson(depth[:, None] * share * rng.gamma(3, 1 / 3, (CELLS, GENES)))
        obs = pd.DataFrame({"batch": f"batch{batch}", "type": kind.astype(str)})
        obs.index = [f"{batch}-{i}" for i in range(CELLS)]
        parts.append(anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, obsm={"spatial": places}))
    return anndata.concat(parts)


def starmap(folder: Path, seed: int, unequal: bool) -> anndata.AnnData:
    """Read sections BZ5 and BZ14 as two batches.

    unequal: thin out a random half of the types in one section, and the other half in the other.
    """
    both = {
        name: anndata.read_h5ad(folder / "spatial_tables" / f"starmap_mpfc_{name}.h5ad") for name in ("BZ5", "BZ14")
    }
    joined = anndata.concat(both, label="batch", index_unique="-")
    obs = joined.obs[["batch"]].astype(str).assign(type=joined.obs["c"].astype(str))
    table = anndata.AnnData(sp.csr_matrix(joined.X), obs, obsm={"spatial": joined.obsm["spatial"]})
    if not unequal:
        return table
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(obs["type"].unique())
    frequent = obs["type"].isin(kinds[::2]).to_numpy() == (obs["batch"] == "BZ5").to_numpy()
    return table[frequent | (rng.random(len(obs)) < KEPT)].copy()


def scores(latent: np.ndarray, table: anndata.AnnData) -> dict[str, float]:
    """Return three scores of an embedding.

    right: share of cells whose type is the most frequent one among their 15 nearest cells in other batches. weighted:
    the same, if each of these counts with the inverse frequency of its type in other batches. mixing: share of cells of
    other batches among the 15 nearest of all cells, relative to their share in the table.
    """
    batch, kind = table.obs["batch"].to_numpy(), np.unique(table.obs["type"], return_inverse=True)[1]
    right, weighted = np.zeros((2, len(batch)), bool)
    for here in (batch == name for name in np.unique(batch)):
        near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(latent[~here]).kneighbors(latent[here])[1]
        votes = np.eye(kind.max() + 1)[kind[~here]][near].sum(1)
        right[here] = votes.argmax(1) == kind[here]
        frequency = np.bincount(kind[~here], minlength=votes.shape[1])
        weighted[here] = (votes / np.maximum(frequency, 1)).argmax(1) == kind[here]
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(latent).kneighbors(return_distance=False)
    others = (batch[near] != batch[:, None]).mean()
    by_chance = 1 - (np.unique(batch, return_counts=True)[1] ** 2).sum() / len(batch) ** 2
    return {"right": right.mean(), "weighted": weighted.mean(), "mixing": others / by_chance}


def embedded(table: anndata.AnnData, batch_key: str | None, seed: int) -> np.ndarray:
    """Return z_cell; neighbours are always sought within sections."""
    SpatialVAE.setup_anndata(table, sample_key="batch", batch_key=batch_key)
    model = SpatialVAE(table, seed=seed, niche_encoder="field")
    model.train(seed=seed, progress=False)
    return model.get_latent_representation(which="cell")


def rows_of(name: str, table: anndata.AnnData, seed: int, peers: Path | None, cache: Path) -> Iterator[Row]:
    """Return a row for each method."""
    table = table[np.asarray(table.X.sum(1)).ravel() > 0].copy()
    latents = {OURS: embedded(table, "batch", seed), WITHOUT: embedded(table, None, seed)}
    if peers is not None:
        path = peers / f"{name.replace(' ', '_')}_{seed}.h5ad"
        peers.mkdir(parents=True, exist_ok=True)
        table.write_h5ad(path)
        deliver(path, peers, ["scVI_batches"], 1, cache)
        latents[PEER] = np.load(peers / f"{path.stem}-scVI_batches-0.npy", allow_pickle=False)
    for method, latent in latents.items():
        yield {"table": name, "seed": seed, "method": method, **scores(latent, table)}


def page(rows: pd.DataFrame, seeds: int, command: str) -> str:
    every = rows.groupby(["table", "method"], sort=False)
    right, weighted, mixing = (
        as_markdown(every[score].mean().unstack(sort=False).round(3).reset_index())
        for score in ("right", "weighted", "mixing")
    )
    each = rows.pivot_table(index=["table", "seed"], columns="method", values="right", sort=False).round(3)
    return f"""# Batches

Made by `{command}`.

Share of cells that have the most frequent type of their {NEIGHBOURS} nearest cells in other batches, in z_cell; mean
over {seeds} seeds of table and training. Simulated: {BATCHES} batches of {CELLS} cells, {GENES} genes, {TYPES} types,
effects of a batch on log shares of genes with a standard deviation of {EFFECT}. STARmap: sections BZ5 and BZ14; where
compositions are unequal, the cells of half of the types are thinned to {KEPT:.0%} in one, those of the others in the
other. scVI is used with its defaults and with the batch.

{right}

The same if each of the {NEIGHBOURS} cells counts with the inverse frequency of its type in other batches: otherwise,
the better batches overlap, the more cells are assigned to the types that are frequent in other batches.

{weighted}

Share of cells of other batches among the {NEIGHBOURS} nearest of all cells, relative to their share in the table:

{mixing}

The first score for each seed:

{as_markdown(each.reset_index())}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--peers", type=Path, help="folder for scVI's embeddings")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of environments")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[Row] = []
    for unequal in (False, True):
        kind = "unequal" if unequal else "equal"
        for seed in range(options.seeds):
            tables = {f"simulated, {kind}": simulated(seed, unequal)}
            if options.data is not None:
                tables[f"STARmap, {kind}"] = starmap(options.data, seed, unequal)
            for name, table in tables.items():
                rows += rows_of(name, table, seed, options.peers, options.cache)
                print(*rows[-3:], sep="\n", flush=True)
    given = ["DATA"] * (options.data is not None) + ["--peers FOLDER"] * (options.peers is not None)
    command = " ".join(["python benchmarks/batches.py", *given, f"--seeds {options.seeds}"])
    text = page(pd.DataFrame(rows), options.seeds, command)
    (RESULTS / "batches.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
