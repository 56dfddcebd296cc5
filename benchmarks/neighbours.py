"""Information from the neighbours of a cell: log p(x_i | neighbours) - log p(x_i) of held-out cells, by niche_encoder;
and whether posterior regions hold the latents of data drawn from the model.

    python benchmarks/neighbours.py TABLE ... [--seeds N] [--samples N] [--models FOLDER]

TABLE is an AnnData file with counts in X, or in layers["counts_recovered"] if that layer exists, and obsm["spatial"].
FOLDER stores encoder, decoder and field of each table and seed, so that they are trained once. Writes
benchmarks/results/neighbours.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second thread

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from heldout_tables import LEAST, REMOVED, dense, prepared, split
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE, neighbours
from spatialvae.graph import knn_graph
from spatialvae.training import Plan

COMPONENTS, AVERAGED = 20, 15  # of the linear predictor: principal components, neighbours
DRAWS, LEVEL = 200, 0.9  # of counts
LINEAR = "linear Gaussian, 20 principal components"
MIXED = "the same, a mixture of two Gaussians"

# section, method, seed, gain, over field, ranks within, CPU s, log p(y) of the principal components y
Row = tuple[str, str, int, float, float, float, float, float]
Cover = tuple[str, int, float, float]  # section, seed, of z_niche, of z_cell


def trained(name: str, rest: anndata.AnnData, seed: int, models: Path | None) -> SpatialVAE:
    """Return the model with the field alone, from ``models`` if it exists there."""
    folder = None if models is None else models / f"{name}-{seed}"
    if folder is not None and folder.exists():
        return SpatialVAE.load(folder, rest)
    SpatialVAE.setup_anndata(rest)
    model = SpatialVAE(rest, seed=seed, niche_encoder="field")
    model.train(seed=seed, progress=False)
    if folder is not None:
        model.save(folder)
    return model


def of_section(
    name: str, model: SpatialVAE, rest: anndata.AnnData, held: anndata.AnnData, seed: int, samples: int
) -> Iterator[Row]:
    alone = model.get_marginal_ll(held, samples, seed, return_mean=False)
    field = None
    for method in neighbours.ENCODERS:
        began = time.process_time()
        torch.manual_seed(seed)
        model.neighbours = neighbours.prior_for(method, model.module)
        if model.neighbours is not None:
            neighbours.fit(model.neighbours, model.module, model._section, Plan(seed=seed).fitted_to(rest.n_obs))
        took = time.process_time() - began
        given = model.get_marginal_ll(held, samples, seed, given=rest, return_mean=False)
        field = given if field is None else field
        drawn = model.posterior_predictive_sample(held, n_samples=DRAWS, given=rest, seed=seed)
        inside = within(drawn, dense(held.X), seed)
        yield name, method, seed, float((given - alone).mean()), float((given - field).mean()), inside, took, np.nan
    pairs = components_and_neighbours(rest, held)
    for method, parts in ((LINEAR, 1), (MIXED, 2)):
        of_y, of_y_given = alone_and_given(*pairs, parts)
        yield name, method, seed, of_y_given - of_y, np.nan, np.nan, np.nan, of_y


def cover(model: SpatialVAE, table: anndata.AnnData, seed: int) -> tuple[float, float]:
    """Share of z_niche and of z_cell, of cells drawn at the places and with the total counts of ``table``, that lie in
    their central ``LEVEL`` posterior intervals, dimension by dimension."""
    drawn = model.sample_tissue(table.obsm["spatial"], library_size=dense(table.X).sum(1), seed=seed)
    mean, variance = model.get_latent_representation(drawn, return_dist=True)
    inside = np.abs(drawn.obsm["X_spatialvae"] - mean) < norm.ppf((1 + LEVEL) / 2) * np.sqrt(variance)
    n_niche = model.module.shape.n_niche
    return float(inside[:, :n_niche].mean()), float(inside[:, n_niche:].mean())


def first_of_equals(table: anndata.AnnData) -> np.ndarray:
    """Rows (cell,) without cells that repeat both place and counts of an earlier one: a neighbour that is the cell
    itself tells everything. Of osmFISH's 4,839 cells 475 are repeated."""
    return np.sort(np.unique(np.c_[table.obsm["spatial"], dense(table.X)], axis=0, return_index=True)[1])


def within(drawn: np.ndarray, x: np.ndarray, seed: int) -> float:
    """Return the share of counts with a rank among draws (randomised PIT) in the central ``LEVEL``."""
    below = (drawn < x[..., None]).sum(-1)
    tied = (drawn == x[..., None]).sum(-1)
    rank = (below + np.random.default_rng(seed).random(x.shape) * (tied + 1)) / (drawn.shape[-1] + 1)
    return float((np.abs(rank - 0.5) < LEVEL / 2).mean())


def components_and_neighbours(rest: anndata.AnnData, held: anndata.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Return principal components of log counts, and their averages over the nearest cells of ``rest``, side by side,
    (cell, 2 ``COMPONENTS``), of ``rest`` and of ``held``."""
    scale = np.median(dense(rest.X).sum(1))
    logs = [np.log1p(scale * dense(t.X) / dense(t.X).sum(1, keepdims=True)) for t in (rest, held)]
    pca = PCA(COMPONENTS, random_state=0).fit(logs[0])
    y, other = (pca.transform(log) for log in logs)
    near = knn_graph(rest.obsm["spatial"], AVERAGED).index
    distance = np.linalg.norm(held.obsm["spatial"][:, None] - rest.obsm["spatial"][None], axis=-1)
    return np.c_[y, y[near].mean(1)], np.c_[other, y[np.argsort(distance, 1)[:, :AVERAGED]].mean(1)]


def alone_and_given(rest: np.ndarray, held: np.ndarray, parts: int) -> tuple[float, float]:
    """Return the means of log p(y) and log p(y | a) of held-out cells, y and a being the two halves of the columns.

    y and a are jointly a mixture of ``parts`` Gaussians; with one, the mean of y given a is linear in a.
    """
    fitted = GaussianMixture(parts, n_init=3, random_state=0).fit(rest)

    def log_density(columns: slice) -> np.ndarray:
        each = zip(fitted.means_, fitted.covariances_, strict=True)
        logs = [
            multivariate_normal(mean[columns], cov[columns, columns]).logpdf(held[:, columns]) for mean, cov in each
        ]
        return logsumexp(np.log(fitted.weights_)[:, None] + logs, 0)

    given = log_density(slice(None)) - log_density(slice(COMPONENTS, None))
    return float(log_density(slice(COMPONENTS)).mean()), float(given.mean())


def page(rows: pd.DataFrame, covers: pd.DataFrame, seeds: int, samples: int, command: str) -> str:
    def wide(value: str, digits: int) -> str:
        part = rows.dropna(subset=value)
        table = part.pivot_table(index="method", columns="section", values=value, sort=False)
        table["mean"] = table.mean(1)
        return as_markdown(table.map(lambda v: f"{v:.{digits}f}").reset_index())

    held = covers.groupby("section", sort=False)[["z_niche", "z_cell"]].mean().round(3).reset_index()
    return f"""# Information from neighbours

Made by `{command}`.

Seeds: {seeds}; where there are several, their mean. {REMOVED:.0%} of the cells with at least {LEAST} counts are held
out; {samples} importance samples. Cells that repeat place and counts of another, 475 of osmFISH, are left out.

- "field": a Gaussian field and cell types whose frequencies depend on it; "gatv2", "sage", "gin": also messages from 15
  neighbours. All share encoder, decoder and field of one training.

## Gain of the neighbours

log p(x_i | neighbours) - log p(x_i), nats a cell, both under the model with its types. The linear predictor has 20
principal components y of log counts and the mean of 15 neighbours. A single Gaussian fits y badly, which increases its
gain: a mixture of two Gaussians has a higher log p(y), and gains less from the same mean of neighbours.

{wide("gain", 2)}

log p(y), nats a cell:

{wide("log p(y)", 2)}

## Over the field

{wide("over field", 2)}

## Intervals of held-out counts

Share of held-out counts, given neighbours and total counts, whose randomised rank among {DRAWS} draws is in the central
{LEVEL:.0%}; {LEVEL} is right.

{wide("within", 3)}

## Cover of posterior regions

Share of latents in their {LEVEL:.0%} posterior intervals (`get_latent_representation(return_dist=True)`), dimension by
dimension, of one tissue drawn from each trained model (`sample_tissue`) at the places of its table and with its total
counts; {LEVEL} is right.

{as_markdown(held)}

## CPU seconds to fit

Types and messages, without encoder, decoder and field, on a machine under other load.

{wide("seconds", 1)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100, help="importance samples")
    parser.add_argument("--models", type=Path, help="folder of trained models")
    options = parser.parse_args()
    rows: list[Row] = []
    covers: list[Cover] = []
    for seed, path in product(range(options.seeds), options.tables):
        read = anndata.read_h5ad(path)
        counts = dense(read.layers.get("counts_recovered", read.X))
        seen = counts.sum(0) > 0
        table = prepared(counts[:, seen], read.var_names[seen], read.obsm["spatial"], None)
        table = table[first_of_equals(table)].copy()
        rest, held = split(table)
        model = trained(path.stem, rest, seed, options.models)
        covers.append((path.stem, seed, *cover(model, rest, seed)))
        print(*covers[-1], flush=True)
        for row in of_section(path.stem, model, rest, held, seed, options.samples):
            rows.append(row)
            print(*row, flush=True)
    columns = ["section", "method", "seed", "gain", "over field", "within", "seconds", "log p(y)"]
    names = " ".join(path.name for path in options.tables)
    command = f"python benchmarks/neighbours.py {names} --seeds {options.seeds} --samples {options.samples}"
    shares = pd.DataFrame(covers, columns=["section", "seed", "z_niche", "z_cell"])
    text = page(pd.DataFrame(rows, columns=columns), shares, options.seeds, options.samples, command)
    (RESULTS / "neighbours.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
