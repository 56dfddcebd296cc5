"""Quality of the fitted distribution: evidence, likelihoods of counts, intervals, imputation, sampled tissue,
differential expression, and expression before measurement errors.

        python benchmarks/distribution.py DATA                  # all; DATA contains spatial_tables/ and single_cell/
    python benchmarks/distribution.py DATA --only evidence measurement
        python benchmarks/distribution.py DATA --peers FOLDER   # also scVI, in a separate environment

FOLDER stores tables and scVI's results. Simulated tables are those of tests/. Writes the requested sections of
benchmarks/results/distribution.md, and keeps the others.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second thread

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from heldout_tables import HELD_OUT, dense, sections, split
from peers import embed
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tables import RESULTS, as_markdown, put_section

from spatialvae import SpatialVAE, checks
from spatialvae.evidence import mean_with_error
from spatialvae.graph import knn_graph

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_spatialvae_differential import simulated
from test_spatialvae_evaluate import estimate
from test_spatialvae_measurement import error, measured_tissue

TABLES = ("bz5", "mop1", "osmfish")
IMPUTED = ("mop1", "osmfish", "hypothalamus")
SEEDS = 5
STEPS = 3000
MISSING = 0.2  # share of genes that are imputed
SMOOTHED = 30  # cells; of 15, 30 and 50 best for the competitor on two sections that are not imputed here
TOLD_APART = ("bz5", "mop1")
LIKELIHOODS = ("nb", "zinb")
LATENT = 10  # dimensions of z where likelihoods are compared, as in benchmarks/heldout.py
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

Linear-Gaussian model with 8 latent dimensions, 40 cells, 5,000 samples, {seeds} seeds. Difference of estimate and
truth, nats per cell: at most {np.abs(off).max():.5f}, root mean square {np.sqrt((off**2).mean()):.5f}. Estimated error:
{stated.mean():.5f}; the difference is within two estimated errors in {(np.abs(off) < 2 * stated).sum()} of {seeds}.
"""


def likelihoods(data: Path, seeds: int = 1) -> str:
    rows, read = [], sections(data)
    for name in HELD_OUT:
        rest, held_out = split(read[name])
        SpatialVAE.setup_anndata(rest, spatial_key="spatial" if "spatial" in rest.obsm else None)
        for likelihood, seed in product(LIKELIHOODS, range(seeds)):
            model = SpatialVAE(rest, LATENT, gene_likelihood=likelihood, seed=seed, niche_encoder="field")
            start = time.process_time()
            model.train(seed=seed, progress=False)
            seconds, steps = time.process_time() - start, int(model.training_log["step"].iloc[-1])
            log_p = model.get_marginal_ll(held_out, 300, seed)
            rows.append((name, likelihood, log_p, seconds, 1e3 * seconds / steps))
            print(*rows[-1], flush=True)
    found = pd.DataFrame(rows, columns=["table", "likelihood", "log p", "training, CPU s", "ms per step"])
    medians = found.groupby(["table", "likelihood"], sort=False).median().reset_index()
    return f"""## Likelihoods of counts

Mean log p(x_i) of held-out cells, nats per cell, without their neighbours, given their total counts; {LATENT} latent
dimensions, 300 importance samples. Training on one core until it stops, without the prediction from neighbours.
Seeds: {seeds}; medians.

{as_markdown(medians)}
"""


def central_share(rank: np.ndarray) -> float:
    return float((np.abs(rank - 0.5) < LEVEL / 2).mean())


def ranks(drawn: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the share of draws (cell, gene, sample) below each count, ties broken at random; uniform if calibrated."""
    noise = np.random.default_rng(0).random(counts.shape)
    return (drawn < counts[..., None]).mean(-1) + noise * (drawn == counts[..., None]).mean(-1)


def integer_coverage(drawn: np.ndarray, counts: np.ndarray) -> float:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1, method="inverted_cdf")
    return float(((low <= counts) & (counts <= high)).mean())


def with_panels(table: anndata.AnnData, seeds: int) -> anndata.AnnData:
    """Return ``table`` with the genes in the panel of each seed, in var["panel_SEED"]."""
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(table.n_vars)
        table.var[f"panel_{seed}"] = ~np.isin(np.arange(table.n_vars), order[: round(MISSING * table.n_vars)])
    return table


def components(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 20 principal components of the logs of ``x`` for counts ``x`` and ``y`` (cell, gene)."""
    logs = [np.log1p(a / a.sum(1, keepdims=True).clip(1) * 100) for a in (x, y)]
    fitted = PCA(min(20, x.shape[1] - 1), random_state=0).fit(logs[0])
    return fitted.transform(logs[0]), fitted.transform(logs[1])


def smoothed(x: np.ndarray, y: np.ndarray, panel: np.ndarray, latent: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Predict counts in ``y`` of genes outside the ``panel``.

    Uses their mean share in the cells of ``x`` (cell, gene) with the nearest ``latent`` (of ``x`` and of ``y``).
    """
    near = NearestNeighbors(n_neighbors=SMOOTHED).fit(latent[0]).kneighbors(latent[1], return_distance=False)
    share = x[:, ~panel] / x[:, panel].sum(1, keepdims=True).clip(1)
    return share[near].mean(1) * y[:, panel].sum(1, keepdims=True)


def gene_by_gene(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the median over genes of the rank correlation over cells."""
    with np.errstate(all="ignore"):
        return float(
            np.nanmedian([spearmanr(found[:, i], truth[:, i])[0] for i in range(truth.shape[1]) if truth[:, i].any()])
        )


def imputed(table: anndata.AnnData, name: str, seed: int, peers: Path | None) -> dict[str, object]:
    """Predict the genes outside the panel of ``seed`` in the held-out cells, by each method."""
    held, panel = table.obs["held_out"].to_numpy(bool), table.var[f"panel_{seed}"].to_numpy(bool)
    rest, held_out = split(table)
    model = trained(rest, seed, niche_encoder="field")
    reduced, truth, missing = held_out[:, panel].copy(), dense(held_out.X)[:, ~panel], list(table.var_names[~panel])
    found = model.impute(reduced, missing, n_samples=SAMPLES // 4)
    drawn = model.posterior_predictive_sample(reduced, n_samples=SAMPLES // 2, gene_list=missing)
    x, y = dense(rest.X), dense(held_out.X)
    nearest = {f"{SMOOTHED} nearest, PCA": components(x[:, panel], y[:, panel])}
    if peers:
        latent = np.load(peers / f"{name}-scVI_panel-{seed}.npy")
        nearest[f"{SMOOTHED} nearest, scVI"] = latent[~held], latent[held]
    return {
        "SpatialVAE": gene_by_gene(found.X, truth),
        **{method: gene_by_gene(smoothed(x, y, panel, latent), truth) for method, latent in nearest.items()},
        "coverage by rank": central_share(ranks(drawn, truth)),
        "coverage of integer intervals": integer_coverage(drawn, truth),
    }


def imputation(data: Path, peers: Path | None, seeds: int) -> str:
    rows, read = [], sections(data)
    for name in IMPUTED:
        table = with_panels(read[name], SEEDS)
        if peers:
            peers.mkdir(parents=True, exist_ok=True)
            table.write_h5ad(peers / f"{name}.h5ad")
            embed.deliver(peers / f"{name}.h5ad", peers, ["scVI_panel"], seeds, embed.CACHE)
        found = pd.DataFrame([imputed(table, name, seed, peers) for seed in range(seeds)])
        rows.append({"table": name, "genes imputed": round(MISSING * table.n_vars)} | found.mean().to_dict())
        print(found, flush=True)
    return f"""## Imputed genes

{MISSING:.0%} of the genes of held-out cells are predicted from their other genes and from neighbouring cells: median
over genes of Spearman's correlation with the counts, which are noisy themselves; mean of {seeds} seeds, each with other
genes. "nearest": the mean of the {SMOOTHED} nearest training cells in 20 principal components, or in scVI's latent
space, of the remaining genes. Expected counts are means over {SAMPLES // 4} draws of the latents. Coverage as above,
among {SAMPLES // 2} draws.

{as_markdown(pd.DataFrame(rows))}
"""


def intervals(data: Path) -> str:
    rows = []
    for name, table in sections(data).items():
        if name not in TABLES:
            continue
        rest, held_out = split(table)
        drawn = trained(rest).posterior_predictive_sample(held_out, n_samples=SAMPLES, given=rest)
        counts = dense(held_out.X)
        rows.append(
            {
                "table": name,
                "cells": held_out.n_obs,
                "coverage by rank": central_share(ranks(drawn, counts)),
                "coverage of integer intervals": integer_coverage(drawn, counts),
            }
        )
    return f"""## Intervals of held-out cells

90 % intervals of {SAMPLES} draws of the counts of held-out cells, given their positions, total counts and the counts of
the other cells ({STEPS:,} training steps). "coverage by rank": share of counts whose rank among the draws, with ties
broken at random, lies in the central {LEVEL:.0%}; it is {LEVEL:.0%} for draws from the true distribution. Integer
intervals cover more, because counts are small.

{as_markdown(pd.DataFrame(rows))}
"""


def tissue(data: Path) -> str:
    rows = []
    for name, table in sections(data).items():
        if name in TOLD_APART:
            rest = split(table)[0]
            model = trained(rest, niche_encoder="field")
            rows += [{"table": name} | row for row in of_tissue(model, rest) + of_marginals(rest)]
            print(pd.DataFrame(rows), flush=True)
    return f"""## Detection of sampled counts

Area under the ROC curve of a gradient-boosting classifier of real against sampled cells, in held-out parts of the
tissue; 0.5 is best. Its features are the log counts of a cell ("cell"), or these and the mean of its 6 neighbours
("neighbourhood"). Counts are sampled at the positions of the training cells:

- "posterior": for the same cells
- "new cells, cells of the table": niches are drawn from the field given the counts of the table; each new cell has the
  z_cell and the total count of a cell of the table in a similar niche
- "new tissue, cells of the table": the cells of the table in a new arrangement, in which neighbours are on average as
  similar as in the table. Real and sampled tissue then have the same composition: a type that is more frequent in one
  part of the sampled tissue is less frequent in the others, so that the area in held-out parts can be below 0.5
- "new tissue, cells of the model": niches are drawn from the field alone, and z_cell from the niches, so that the
  composition differs, too
- "each gene's counts, permuted" and "each gene's NB, by moments": genes are independent

Slopes are those of sampled on real correlations, of two genes ("slope of gene pairs") or of a gene in a cell and its
neighbours ("slope of neighbours"); 1 is best.

{as_markdown(pd.DataFrame(rows))}
"""


def of_tissue(model: SpatialVAE, rest: anndata.AnnData) -> list[dict[str, object]]:
    where = np.asarray(rest.obsm["spatial"])
    made = {
        "posterior": model.posterior_predictive_sample().astype(float),
        "new cells, cells of the table": dense(model.sample_tissue(where, cells="table", given=rest).X),
        "new tissue, cells of the table": dense(model.sample_tissue(where, cells="table").X),
        "new tissue, cells of the model": dense(model.sample_tissue(where).X),
    }
    return [{"sampled": what} | beside_real(counts, rest) for what, counts in made.items()]


def of_marginals(rest: anndata.AnnData) -> list[dict[str, object]]:
    """Permute the counts of each gene, and draw from the negative binomial that fits them best."""
    real, rng = dense(rest.X), np.random.default_rng(0)
    mean, variance = real.mean(0), real.var(0)
    theta = mean**2 / np.maximum(variance - mean, 1e-6 * mean)
    fitted = rng.poisson(rng.gamma(theta, mean / theta, real.shape)).astype(float)
    made = {"each gene's counts, permuted": rng.permuted(real, axis=0), "each gene's NB, by moments": fitted}
    return [{"sampled": what} | beside_real(counts, rest) for what, counts in made.items()]


def beside_real(counts: np.ndarray, rest: anndata.AnnData) -> dict[str, object]:
    real, where = dense(rest.X), np.asarray(rest.obsm["spatial"])
    near = knn_graph(where, checks.NEIGHBOURS).adjacency()
    table = checks.compared(checks.statistics(real, near), checks.statistics(counts, near))
    return {
        "AUC, cell": checks.told_apart(real, counts),
        "AUC, neighbourhood": checks.told_apart(real, counts, where),
        "slope of gene pairs": float(table.loc["genes", "slope"]),
        "slope of neighbours": float(table.loc["neighbours", "slope"]),
    }


def compared_groups(seed: int) -> tuple[anndata.AnnData, list[tuple[int | None, np.ndarray]]]:
    """Simulate a table with the cells of comparison I in obs["one_I"] and obs["two_I"].

    Also returns for each comparison the number of cells in a group, None for all of a type, and which genes differ.
    """
    table, truth = simulated(seed, n=600, genes=200)
    kinds, rng, compared = table.obs["kind"].to_numpy(), np.random.default_rng(0), []
    for i, (size, pair) in enumerate(product((None, 40), ((0, 1), (1, 2)))):
        for side, kind in zip(("one", "two"), pair, strict=True):
            rows = rng.permutation(np.flatnonzero(kinds == str(kind)))[:size]
            table.obs[f"{side}_{i}"] = np.isin(np.arange(table.n_obs), rows)
        compared.append((size, np.abs(truth[pair[0]] - truth[pair[1]]) >= 0.25))
    return table, compared


def differential(peers: Path | None, seeds: int) -> str:
    tally: dict[tuple[str, int | None], np.ndarray] = {}  # called, wrong, real
    for seed in range(seeds):
        table, compared = compared_groups(seed)
        model, calls = trained(table, seed), {}
        calls["SpatialVAE"] = [
            model.differential_expression(
                idx1=table.obs[f"one_{i}"].to_numpy(), idx2=table.obs[f"two_{i}"].to_numpy(), all_stats=False
            )["is_de_fdr_0.05"].to_numpy(bool)
            for i in range(len(compared))
        ]
        if peers:
            peers.mkdir(parents=True, exist_ok=True)
            table.write_h5ad(peers / f"de{seed}.h5ad")
            embed.deliver(peers / f"de{seed}.h5ad", peers, ["scVI_de"], 1, embed.CACHE)
            calls["scVI"] = list(np.load(peers / f"de{seed}-scVI_de-0.npy"))
        for method, called in calls.items():
            for (size, differs), yes in zip(compared, called, strict=True):
                counted = tally.setdefault((method, size), np.zeros(3))
                counted += [yes.sum(), (yes & ~differs).sum(), differs.sum()]
    rows = [
        {
            "method": method,
            "cells per group": size or "about 200",
            "called": int(called),
            "wrong": wrong / max(called, 1),
            "found": (called - wrong) / real,
        }
        for (method, size), (called, wrong, real) in tally.items()
    ]
    return f"""## Differential expression

Simulated counts of 3 types of cells, 200 genes of which about 40 % differ by 0.25 in log2 or more. Seeds: {seeds}; two
pairs of types each. "wrong": share of the genes called that do not differ; the target is 5 %. "found": share of the
genes that differ that are called. scVI: defaults with NB, mode "change", delta 0.25.

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
                "plain, wrong calls subtracted, / efficiency": error(plain * (1 - wrong) / efficiency, there),
                "counts / efficiency": error(table.X / efficiency, there),
            }
        )
    return f"""## Expression before measurement errors

Simulated tissue of 800 cells and 40 genes, efficiencies of 0.3 to 0.9, 20 % wrong calls that are unevenly
distributed over genes: root mean square error, over cells and genes, of the square root of the true number of
molecules.

{as_markdown(pd.DataFrame(rows))}
"""


TITLE = """# The fitted distribution

Made by `python benchmarks/distribution.py DATA --peers FOLDER`, or one section at a time with --only.
"""
FIGURES = ("evidence", "likelihoods", "intervals", "imputation", "tissue", "differential", "measurement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", type=Path, help="folder for tables and results of scVI")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of imputation and of differential expression")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
    asked = parser.parse_args()
    made = {
        "evidence": evidence,
        "likelihoods": lambda: likelihoods(asked.data),
        "intervals": lambda: intervals(asked.data),
        "imputation": lambda: imputation(asked.data, asked.peers, asked.seeds),
        "tissue": lambda: tissue(asked.data),
        "differential": lambda: differential(asked.peers, asked.seeds),
        "measurement": measurement,
    }
    for name in asked.only:
        section = made[name]()
        print(section, flush=True)
        put_section(RESULTS / "distribution.md", TITLE, section)


if __name__ == "__main__":
    main()
