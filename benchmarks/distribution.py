"""What the fitted distribution is worth: evidence, intervals, imputation, sampled tissue, differential expression and
expression as it was before it was measured.

    python benchmarks/distribution.py DATA                  # all; DATA holds spatial_tables/ and single_cell/
    python benchmarks/distribution.py DATA --only evidence measurement

Simulated tables are those of tests/. Writes benchmarks/results/distribution.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: a second thread mostly waits

import argparse
import sys
from itertools import product
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from heldout_tables import dense, sections, split
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE, checks
from spatialvae.evidence import mean_with_error
from spatialvae.graph import knn_graph

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_spatialvae_differential import simulated
from test_spatialvae_evaluate import estimate
from test_spatialvae_measurement import error, measured_tissue

TABLES = ("bz5", "mop1", "osmfish")
STEPS = 3000
MISSING = 0.2  # share of genes that are imputed
SMOOTHED = 15  # cells
TOLD_APART = ("bz5", "mop1")
LEVEL = 0.9
SAMPLES = 200


def trained(table: anndata.AnnData, seed: int = 0, **options: object) -> SpatialVAE:
    SpatialVAE.setup_anndata(table, spatial_key="spatial" if "spatial" in table.obsm else None)
    model = SpatialVAE(table, seed=seed, **options)
    model.train(max_steps=STEPS, seed=seed, progress=False)
    return model


def evidence(seeds: int = 20) -> str:
    rows = []
    for seed in range(seeds):
        value, of, exact = estimate(None, 5000, seed)
        mean, stated = mean_with_error(value, of)
        rows.append((mean - exact.mean(), stated))
    off, stated = np.array(rows).T
    return f"""## Evidence

Linear-Gaussian model with 8 latent dimensions, 40 cells, 5,000 samples, {seeds} seeds. Estimate less truth, nats a
cell: at most {np.abs(off).max():.5f}, root mean square {np.sqrt((off**2).mean()):.5f}. Stated error:
{stated.mean():.5f}; within two stated errors in {(np.abs(off) < 2 * stated).sum()} of {seeds}.
"""


def held(rank: np.ndarray) -> float:
    return float((np.abs(rank - 0.5) < LEVEL / 2).mean())


def ranks(drawn: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of draws (cell, gene, sample) below each count, ties broken at random: uniform if the draws are right."""
    noise = np.random.default_rng(0).random(counts.shape)
    return (drawn < counts[..., None]).mean(-1) + noise * (drawn == counts[..., None]).mean(-1)


def whole_numbers(drawn: np.ndarray, counts: np.ndarray) -> float:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1, method="inverted_cdf")
    return float(((low <= counts) & (counts <= high)).mean())


def smoothed(rest: anndata.AnnData, held_out: anndata.AnnData, seen: np.ndarray) -> np.ndarray:
    """Mean share of the genes not ``seen`` in the nearest cells of ``rest`` by 20 components of the others."""
    x, y = (dense(table.X) for table in (rest, held_out))
    logs = [np.log1p(a[:, seen] / a[:, seen].sum(1, keepdims=True).clip(1) * 100) for a in (x, y)]
    components = PCA(min(20, seen.sum() - 1), random_state=0).fit(logs[0])
    finder = NearestNeighbors(n_neighbors=SMOOTHED).fit(components.transform(logs[0]))
    near = finder.kneighbors(components.transform(logs[1]), return_distance=False)
    share = x[:, ~seen] / x[:, seen].sum(1, keepdims=True).clip(1)
    return share[near].mean(1) * y[:, seen].sum(1, keepdims=True)


def gene_by_gene(found: np.ndarray, truth: np.ndarray) -> float:
    """Median over genes of the rank correlation over cells."""
    with np.errstate(all="ignore"):
        return float(
            np.nanmedian([spearmanr(found[:, i], truth[:, i])[0] for i in range(truth.shape[1]) if truth[:, i].any()])
        )


def imputed(model: SpatialVAE, name: str, rest: anndata.AnnData, held_out: anndata.AnnData) -> dict[str, object]:
    seen = np.ones(rest.n_vars, bool)
    seen[np.random.default_rng(0).permutation(rest.n_vars)[: round(MISSING * rest.n_vars)]] = False
    reduced, truth = held_out[:, seen].copy(), dense(held_out.X)[:, ~seen]
    found = model.impute(reduced, list(rest.var_names[~seen]), n_samples=100)
    inside = (found.layers["low"] <= truth) & (truth <= found.layers["high"])
    return {
        "table": name,
        "genes imputed": int((~seen).sum()),
        "SpatialVAE": gene_by_gene(found.X, truth),
        f"mean of {SMOOTHED} nearest cells": gene_by_gene(smoothed(rest, held_out, seen), truth),
        "interval of whole numbers holds": float(inside.mean()),
    }


def tables(data: Path) -> str:
    cells, genes, told = [], [], []
    for name, table in sections(data).items():
        if name not in TABLES:
            continue
        rest, held_out = split(table)
        model = trained(rest)
        drawn = model.posterior_predictive_sample(held_out, n_samples=SAMPLES, given=rest)
        counts = dense(held_out.X)
        cells.append(
            {
                "table": name,
                "cells": held_out.n_obs,
                "ranks within": held(ranks(drawn, counts)),
                "interval of whole numbers holds": whole_numbers(drawn, counts),
            }
        )
        genes.append(imputed(model, name, rest, held_out))
        if name in TOLD_APART:
            told += of_tissue(model, name, rest)
    return f"""## Intervals of held-out cells

90 % intervals of {SAMPLES} draws of the counts of cells held out, given their places, total counts and the other cells'
counts ({STEPS:,} steps). "ranks within": of counts among draws with ties broken at random, which is {LEVEL:.0%} for
draws from the truth; intervals of whole numbers hold more, since counts are small.

{as_markdown(pd.DataFrame(cells))}

## Imputed genes

{MISSING:.0%} of the genes of the cells held out, from their other genes and places: median over genes of Spearman's
correlation with the counts, which are noisy themselves. One seed.

{as_markdown(pd.DataFrame(genes))}

## Real or sampled

Area under the ROC curve of gradient boosting on the logs of counts of a cell ("cell") and of it and the mean of its 6
neighbours ("neighbourhood"), on parts of the tissue that it has not seen; 0.5 is best. Sampled on the places of the
training cells with their total counts. "posterior": the same cells again. "slope of neighbours": of the correlation of
genes between a cell and its neighbours, sampled by real; 1 is best.

{as_markdown(pd.DataFrame(told))}
"""


def of_tissue(model: SpatialVAE, name: str, rest: anndata.AnnData) -> list[dict[str, object]]:
    real, where = dense(rest.X), np.asarray(rest.obsm["spatial"])
    rng, near = np.random.default_rng(0), knn_graph(where, checks.NEIGHBOURS).adjacency()
    size = real.sum(1)
    drawn = {
        "tissue, cells of the model": dense(model.sample_tissue(where, library_size=size).X),
        "tissue, types of the table": dense(model.sample_tissue(where, library_size=size, cells="table").X),
        "posterior": model.posterior_predictive_sample().astype(float),
        "each gene's marginal": rng.permuted(real, axis=0),
    }
    rows = []
    for what, counts in drawn.items():
        table = checks.compared(checks.statistics(real, near), checks.statistics(counts, near))
        rows.append(
            {
                "table": name,
                "sampled": what,
                "AUC, cell": checks.told_apart(real, counts),
                "AUC, neighbourhood": checks.told_apart(real, counts, where),
                "slope of gene pairs": float(table.loc["genes", "slope"]),
                "slope of neighbours": float(table.loc["neighbours", "slope"]),
            }
        )
    return rows


def differential(seeds: int = 5) -> str:
    tally = {None: np.zeros(3), 40: np.zeros(3)}  # called, wrong, real; by cells a group, None for all
    for seed in range(seeds):
        table, truth = simulated(seed, n=600, genes=200)
        model = trained(table, seed)
        kinds, rng = table.obs["kind"].to_numpy(), np.random.default_rng(0)
        for size, (one, two) in product(tally, (("0", "1"), ("1", "2"))):
            groups = [np.sort(rng.permutation(np.flatnonzero(kinds == kind))[:size]) for kind in (one, two)]
            found = model.differential_expression(idx1=groups[0], idx2=groups[1], all_stats=False)
            differs = np.abs(truth[int(one)] - truth[int(two)]) >= 0.25
            yes = found["is_de_fdr_0.05"].to_numpy(bool)
            tally[size] += [yes.sum(), (yes & ~differs).sum(), differs.sum()]
    rows = [
        {
            "cells a group": size or "about 200",
            "called": int(called),
            "wrong": wrong / called,
            "found": (called - wrong) / real,
        }
        for size, (called, wrong, real) in tally.items()
    ]
    return f"""## Differential expression

Simulated counts of 3 types of cells, 200 genes of which about 40 % differ by 0.25 in log2 or more, {seeds} seeds, two
pairs of types each. Target: 5 % wrong.

{as_markdown(pd.DataFrame(rows))}
"""


def measurement(seeds: int = 3) -> str:
    rows = []
    for seed in range(seeds):
        table = measured_tissue(seed=seed)
        there, efficiency, wrong = table.layers["there"], *(table.var[c].to_numpy() for c in table.var)
        ours, plain = (
            trained(table, seed, measurement=known).get_normalized_expression(library_size="latent", return_numpy=True)
            for known in (True, False)
        )
        rows.append(
            {
                "seed": seed,
                "measurement=True": error(ours, there),
                "plain": error(plain, there),
                "plain / efficiency": error(plain / efficiency, there),
                "plain, wrong calls taken away, / efficiency": error(plain * (1 - wrong) / efficiency, there),
                "counts / efficiency": error(table.X / efficiency, there),
            }
        )
    return f"""## Expression as it was before it was measured

Simulated tissue of 800 cells and 40 genes, efficiencies of 0.3 to 0.9, 20 % wrong calls that fall on genes unevenly:
root mean square error, over cells and genes, of square roots of the molecules that were there.

{as_markdown(pd.DataFrame(rows))}
"""


FIGURES = ("evidence", "tables", "differential", "measurement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
    asked = parser.parse_args()
    made = {
        "evidence": evidence,
        "tables": lambda: tables(asked.data),
        "differential": differential,
        "measurement": measurement,
    }
    only = "" if asked.only == FIGURES else f" --only {' '.join(asked.only)}"
    parts = [f"# The fitted distribution\n\nMade by `python benchmarks/distribution.py DATA{only}`.\n"]
    for name in asked.only:
        parts.append(made[name]())
        print(parts[-1], flush=True)
    (RESULTS / "distribution.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
