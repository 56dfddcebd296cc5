"""Posterior predictive checks: comparison of counts drawn from a model with the counts that it was trained on.

``compared`` compares statistics of genes and of pairs of genes; ``told_apart`` trains a classifier to detect any other
difference (classifier two-sample test, Lopez-Paz & Oquab 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialvae.errors import InputError
from spatialvae.graph import knn_graph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spatialvae.model import SpatialVAE

FOLDS = 5
LEAST_CELLS = 2 * FOLDS
PARTS = 25  # parts of a tissue, each held out as a whole
NEIGHBOURS = 6  # about the number of cells adjacent to a cell in the plane

TITLES = {
    "mean": "mean of a gene",
    "variance": "variance of a gene",
    "zeros": "share of zeros of a gene",
    "genes": "correlation of two genes",
    "neighbours": "correlation of a cell and its neighbours",
}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of counts: ``mean``, ``variance`` and ``zeros``, the share of zeros, (gene,) each; ``genes`` (pair,),
    correlations of the log counts of two genes; ``neighbours`` (gene,), correlations of log counts between a cell and
    the mean of its neighbours, NaN without neighbours."""

    mean: np.ndarray
    variance: np.ndarray
    zeros: np.ndarray
    genes: np.ndarray
    neighbours: np.ndarray


def statistics(counts: np.ndarray, neighbours: sp.csr_array | None = None) -> Statistics:
    """Compute statistics of ``counts`` (cell, gene); ``neighbours`` (cell, cell) is an adjacency matrix of ones."""
    logs = np.log1p(counts)
    near = np.full(counts.shape[1], np.nan)
    if neighbours is not None:
        near = _correlation(logs, _mean_of(logs, neighbours))
    with np.errstate(invalid="ignore", divide="ignore"):  # correlations of genes without counts are NaN
        pairs = np.corrcoef(logs, rowvar=False)[np.triu_indices(counts.shape[1], 1)]
    return Statistics(counts.mean(0), counts.var(0), (counts == 0).mean(0), pairs, near)


def compared(real: Statistics, sampled: Statistics) -> pd.DataFrame:
    """Compare statistics: one row per statistic, with the ``correlation`` of sampled with real values, the ``slope`` of
    sampled on real values (1 if they agree) and the mean absolute ``difference``. Means and variances are compared as
    log10."""
    rows = {}
    for name in TITLES:
        a, b = (np.asarray(getattr(of, name), float) for of in (real, sampled))
        if name in ("mean", "variance"):
            there = (a > 0) & (b > 0)
            a, b = np.log10(a[there]), np.log10(b[there])
        known = np.isfinite(a) & np.isfinite(b)
        if known.sum() > 2:
            a, b = a[known], b[known]
            slope = np.cov(a, b)[0, 1] / max(a.var(ddof=1), 1e-300)
            rows[name] = (np.corrcoef(a, b)[0, 1], slope, np.abs(a - b).mean())
    return pd.DataFrame.from_dict(rows, orient="index", columns=["correlation", "slope", "difference"])


def told_apart(real: np.ndarray, sampled: np.ndarray, places: np.ndarray | None = None, seed: int = 0) -> float:
    """Area under the ROC curve of a gradient-boosting classifier of ``real`` against ``sampled`` counts (cell, gene) on
    held-out cells: 0.5 if they cannot be distinguished, 1 if they always can.

    With ``places`` (cell, axis), the coordinates of both, the features include the means over a cell's neighbours;
    whole parts of the tissue are then held out, because adjacent cells share neighbours.

    Raises InputError for tables of different shapes or with fewer than 10 cells.
    """
    from sklearn.cluster import KMeans
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    n = len(real)
    if real.shape != sampled.shape or n < LEAST_CELLS:
        raise InputError(
            f"shapes {real.shape} and {sampled.shape} cannot be compared; expected the same shape and at least "
            f"{LEAST_CELLS} cells"
        )
    features = [np.log1p(counts).astype(np.float32) for counts in (real, sampled)]
    part = np.random.default_rng(seed).permutation(n)
    if places is not None:
        near = knn_graph(places, NEIGHBOURS).adjacency()
        features = [np.hstack([logs, _mean_of(logs, near)]) for logs in features]
        part = KMeans(min(PARTS, n), n_init=1, random_state=seed).fit_predict(places)
    label = np.repeat([0, 1], n)
    classifier = HistGradientBoostingClassifier(max_iter=100, random_state=seed)
    asked = {"groups": np.tile(part, 2), "cv": GroupKFold(FOLDS), "method": "predict_proba"}
    found = cross_val_predict(classifier, np.concatenate(features), label, **asked)
    return float(roc_auc_score(label, found[:, 1]))


def of_model(model: SpatialVAE, seed: int = 0) -> tuple[Statistics, Statistics, dict[str, float]]:
    """Statistics of a model's table and of a posterior predictive sample of it, and the areas under the ROC curve of
    ``told_apart``: ``auc_cell`` and, with coordinates, ``auc_neighbourhood``. Both tables are held in memory."""
    section = model._read(None)
    real = section.cells.counts.dense(np.arange(section.cells.n_cells))
    sampled = model.posterior_predictive_sample(seed=seed)
    near = None if section.graphs is None else section.graphs.near
    found = {"auc_cell": told_apart(real, sampled, seed=seed)}
    places = section.cells.coordinates
    if places is not None:
        found["auc_neighbourhood"] = told_apart(real, sampled, places, seed)
    return statistics(real, near), statistics(sampled, near), found


def check_plot(real: Statistics, sampled: Statistics) -> Figure:
    """Sampled against real statistics, one panel per statistic, with the line of equality."""
    from matplotlib.figure import Figure

    names = [name for name in TITLES if np.isfinite(getattr(real, name)).any()]
    figure = Figure(figsize=(3.6 * len(names), 3.7), layout="constrained", dpi=130)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        a, b = (np.asarray(getattr(of, name), float) for of in (real, sampled))
        if name in ("mean", "variance"):
            there = (a > 0) & (b > 0)
            a, b = a[there], b[there]
            axes.set(xscale="log", yscale="log")
        known = np.isfinite(a) & np.isfinite(b)
        axes.scatter(a[known], b[known], s=6, lw=0, alpha=0.5, rasterized=True)
        ends = [min(a[known].min(), b[known].min()), max(a[known].max(), b[known].max())]
        axes.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
        axes.set(xlabel="real", ylabel="sampled", title=TITLES[name])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mean_of(values: np.ndarray, neighbours: sp.csr_array) -> np.ndarray:
    degree = np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)
    return (neighbours @ values) / degree[:, None]


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of the columns of ``a`` and ``b``, (gene,); NaN if one of the two is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
