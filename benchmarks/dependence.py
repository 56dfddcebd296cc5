"""Dependence, neighbour effects and Potts models on cases with known answers.

    python benchmarks/dependence.py                          # simulations, and the bundled osmFISH section
        python benchmarks/dependence.py TABLE.h5ad:LABEL[:LAYER] ...   # other tables as well

Writes benchmarks/results/dependence.md. A few minutes on one core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from heldout_tables import dense
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.special import ellipk, logsumexp
from scipy.stats import pearsonr
from tables import RESULTS, as_markdown, put_section

from merfish import datasets
from spatialvae import potts
from spatialvae.dependence import log_expression, neighbour_effects, partial_correlations
from spatialvae.graph import knn_graph

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_spatialvae_dependence import chain, tissue
from test_spatialvae_potts import lattice

TITLE = """# Dependence, neighbours and Potts models

Made by `python benchmarks/dependence.py`, or one part at a time with --only.
"""
SEEDS = 20
RUNS = 100  # without effects: a share of 10 % is known to 3 %


def chains(n: int, depth: float) -> list[dict[str, object]]:
    """Return the share of seeds in which each edge is found, by ordinary correlation and by our method."""
    names = [*"ABCD", *(f"g{i}" for i in range(8))]
    found: dict[str, list[set[frozenset[str]]]] = {"correlation, p < .05 / pairs": []}
    for seed in range(SEEDS):
        counts, graph, blocks = chain(seed, n, depth, alone=8, blocks=50)
        logs, pairs = np.log1p(counts), list(itertools.combinations(range(len(names)), 2))
        joined = {frozenset((names[a], names[b])) for a, b in pairs if pearsonr(logs[:, a], logs[:, b])[1] < 0.05 / 66}
        found["correlation, p < .05 / pairs"].append(joined)
        for method, near in (("partial, without the neighbours", None), ("partial, given the neighbours", graph)):
            edges = partial_correlations(counts, blocks, near, np.ones(n), names, seed=seed)
            pairs_found = zip(edges["gene"], edges["other"], strict=True)
            found.setdefault(method, []).append({frozenset(pair) for pair in pairs_found})
    true = {frozenset("AB"), frozenset("BC")}
    return [
        {
            "cells": n,
            "counts per gene": f"{depth:g}",
            "method": method,
            **{
                f"{a}-{b}": f"{np.mean([frozenset((a, b)) in each for each in edges]):.0%}"
                for a, b in ("AB", "BC", "AC")
            },
            "other wrong edges per run": f"{np.mean([len(each - true - {frozenset('AC')}) for each in edges]):.2f}",
        }
        for method, edges in found.items()
    ]


def coverage() -> dict[str, object]:
    """Check the coverage of 95 % intervals of 5 x 5 couplings, in tissues of 20,000 cells sampled from the model."""
    off, seconds = [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        adjacency = knn_graph(rng.uniform(0, 100, (20_000, 2)), 6).adjacency(symmetric=True)
        matrix = rng.normal(0, 0.25, (5, 5))
        centred = (matrix + matrix.T) / 2
        centred = centred - centred.mean(0) - centred.mean(0)[:, None] + centred.mean()
        fields = np.tile(rng.normal(0, 0.3, 5), (20_000, 1))
        labels = potts.sample_potts((centred + centred.T) / 2, fields, adjacency, 100, seed)
        started = time.perf_counter()
        model = potts.fit_potts(labels, adjacency)
        seconds.append(time.perf_counter() - started)
        off.append(((model.couplings - centred) / model.coupling_errors)[np.triu_indices(5)])
    held = (np.abs(off) < 1.96).mean()
    return {
        "seeds": SEEDS,
        "coverage of 95 % intervals": f"{held:.1%}",
        "sd of error / estimated error": f"{np.std(off):.2f}",
        "fit, s": f"{np.median(seconds):.2f}",
    }


def onsager(beta: float, clusters: bool) -> dict[str, object]:
    """Compare energy and magnetisation of a 64 x 64 torus with Onsager (1944) and Yang (1952)."""
    side, graph = 64, lattice(64, 64, True)
    k = 2 * np.sinh(2 * beta) / np.cosh(2 * beta) ** 2
    energy = -(1 + 2 / np.pi * (2 * np.tanh(2 * beta) ** 2 - 1) * ellipk(k**2)) / np.tanh(2 * beta)
    ordered = beta > np.log(1 + np.sqrt(2)) / 2
    magnetisation = (1 - np.sinh(2 * beta) ** -4) ** 0.125 if ordered else np.nan
    couplings, fields = beta * np.array([[1.0, -1], [-1, 1]]), np.zeros((side**2, 2))
    state, seen = np.zeros(side**2, int), []
    for draw in range(2200):
        state = potts.sample_potts(couplings, fields, graph, 2, draw, state, clusters)
        spin = 1 - 2.0 * state
        if draw >= 200:
            seen.append((-(spin @ (graph @ spin)) / 2 / side**2, abs(spin.mean())))
    u, m = np.mean(seen, 0)
    return {
        "coupling / critical": f"{beta / (np.log(1 + np.sqrt(2)) / 2):.2f}",
        "sampler": "Swendsen-Wang" if clusters else "Gibbs",
        "energy per cell": f"{u:.4f}",
        "Onsager": f"{energy:.4f}",
        "deviation": f"{u / energy - 1:+.2%}",
        "magnetisation": f"{m:.4f}" if ordered else "",
        "exact": f"{magnetisation:.4f}" if ordered else "",
        "deviation ": f"{m / magnetisation - 1:+.2%}" if ordered else "",
    }


def partition(k: int, shape: tuple[int, int]) -> dict[str, object]:
    """Compare log Z by annealing with the sum over all labellings, for 20 models."""
    graph, off, errors = lattice(*shape, torus=False), [], []
    n = graph.shape[0]
    states = np.array(list(itertools.product(range(k), repeat=n)))
    edges = sp.triu(graph).tocoo()
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        matrix = rng.normal(0, 0.5, (k, k))
        couplings, fields = (matrix + matrix.T) / 2 + 0.5 * np.eye(k), rng.normal(0, 0.4, (n, k))
        weight = fields[np.arange(n), states].sum(1) + couplings[states[:, edges.row], states[:, edges.col]].sum(1)
        value, error = potts.log_partition(couplings, fields, graph, seed=seed)
        off.append((value - logsumexp(weight)) / error)
        errors.append(error)
    return {
        "labels": k,
        "lattice": f"{shape[0]} x {shape[1]}",
        "estimated error, nats": f"{np.median(errors):.4f}",
        "within 2 estimated errors": f"{(np.abs(off) < 2).mean():.0%}",
        "mean error / estimated error": f"{np.mean(off):+.2f}",
    }


def shifted(places: np.ndarray, rng: np.random.Generator, types: np.ndarray | None = None) -> np.ndarray:
    """Return for each cell the cell at its position after a shift of the bounding box with periodic boundaries.

    This is the nearest of all cells or, with ``types``, one of the same type in the one-to-one assignment of minimum
    total distance.
    """
    low, size = places.min(0), np.ptp(places, 0)
    moved = low + (places - low + rng.uniform(0.2, 0.8, places.shape[1]) * size) % size
    if types is None:
        return cKDTree(places).query(moved)[1]
    of = np.empty(len(places), int)
    for kind in np.unique(types):
        rows = np.flatnonzero(types == kind)
        of[rows] = rows[linear_sum_assignment(cdist(moved[rows], places[rows]))[1]]
    return of


def without_effects(table: anndata.AnnData, name: str, label: str, layer: str | None) -> dict[str, object]:
    """Count runs that report an effect at an FDR of 10 % without any effect, and effects in the tissue itself."""
    counts = dense(table.X if layer is None else table.layers[layer])
    genes = np.flatnonzero(counts.sum(0) > 0)
    kinds, types = np.unique(table.obs[label].astype(str), return_inverse=True)
    places, expression = np.asarray(table.obsm["spatial"], float)[:, :2], log_expression(counts[:, genes])

    def found(at: np.ndarray, of: np.ndarray) -> tuple[int, int]:
        graph = knn_graph(at, 6).adjacency(symmetric=True)
        effects = neighbour_effects(expression[of], types, graph, at, list(kinds), list(table.var_names[genes]))
        return int((effects["fdr"] < 0.1).sum()), len(effects)

    def runs(number: int, how: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]) -> str:
        any_found = [found(*how(np.random.default_rng(seed)))[0] > 0 for seed in range(number)]
        return f"{np.mean(any_found):.0%} of {number}"

    same = np.arange(len(places))
    true, tests = found(places, same)
    return {
        "section": name,
        "cells": table.n_obs,
        "tests": tests,
        "permuted": runs(RUNS, lambda rng: (places[rng.permutation(len(places))], same)),
        "shifted": runs(RUNS, lambda rng: (places, shifted(places, rng))),
        "shifted within types": runs(SEEDS, lambda rng: (places, shifted(places, rng, types))),
        "found in the tissue": true,
    }


def power(effect: float) -> dict[str, object]:
    """Return how often the effect of one type on one gene of another is found."""
    hits = others = 0
    for seed in range(SEEDS):
        counts, types, graph, places = tissue(seed, effect)
        names = [f"g{i}" for i in range(counts.shape[1])]
        effects = neighbour_effects(log_expression(counts), types, graph, places, list("abc"), names)
        called = effects[effects["fdr"] < 0.1]
        hit = int(((called["type"] == "a") & (called["neighbour"] == "b") & (called["gene"] == "g0")).sum())
        hits, others = hits + hit, others + len(called) - hit
    return {
        "effect per neighbour, log rate": effect,
        "found": f"{hits} of {SEEDS}",
        "others per run": f"{others / SEEDS:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*")
    parser.add_argument("--only", nargs="+", choices=("partial", "neighbours", "potts"), help="parts of the page")
    options = parser.parse_args()
    sections = [("osmFISH (bundled)", datasets.osmfish(), "ClusterName", None)]
    for given in options.tables:
        path, label, *layer = given.split(":")
        sections.append((Path(path).stem, anndata.read_h5ad(path), label, layer[0] if layer else None))
    parts: tuple[tuple[str, str, str, Callable[[], list[dict[str, object]]]], ...] = (
        ("partial", "Partial correlations",
            "A -> B -> C, and a gene of the neighbours that acts on A and on C. Share of 20 seeds in which each edge "
            "is found.",
            lambda: [*chains(2000, 10), *chains(2000, 3), *chains(6000, 10)]),
        ("neighbours", "Neighbour effects: false discoveries",
            "Share of runs that report any effect at an FDR of 10 % in tissues without effects. permuted: coordinates "
            "are permuted among all cells. shifted: each cell gets the expression of the cell that is nearest to its "
            "position after a shift of the tissue with periodic boundaries, so that expression is as smooth as in the "
            "tissue, but independent of the neighbours; within types: the nearest cell of its own type. Last column: "
            "number of effects in the unchanged tissue.",
            lambda: [without_effects(table, name, label, layer) for name, table, label, layer in sections]),
        ("neighbours", "Neighbour effects: power",
            "Simulated tissue of 1,500 cells of 3 types, 12 genes that vary in space, 108 tests; FDR 10 %. others: "
            "effects of other neighbours on the same gene, and on other genes, whose share of the counts decreases.",
            lambda: [power(effect) for effect in (0.05, 0.1, 0.2)]),
        ("potts", "Potts: couplings", "5 labels, 20,000 cells, couplings with standard deviation 0.25, drawn "
            "for each seed.",
            lambda: [coverage()]),
        ("potts", "Ising: 64 x 64 torus",
            "2,000 draws, two sweeps apart, on a finite torus; exact: values of the infinite lattice.",
            lambda: [onsager(beta, clusters) for beta in (0.2, 0.3, 0.38, 0.5, 0.6) for clusters in (False, True)]),
        ("potts", "log Z", "Annealed importance sampling, 500 steps, 100 chains, 20 models each.",
            lambda: [partition(2, (4, 4)), partition(3, (2, 5))]),
    )  # fmt: skip
    for name, title, text, rows in parts:
        if not options.only or name in options.only:
            section = f"## {title}\n\n{text}\n\n{as_markdown(pd.DataFrame(rows()))}\n"
            print(section, flush=True)
            put_section(RESULTS / "dependence.md", TITLE, section)


if __name__ == "__main__":
    main()
