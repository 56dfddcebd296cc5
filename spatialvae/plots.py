"""Figures of a trained model. Each function returns a Matplotlib figure without opening a window."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND = 24
MOST_COMPARED = 2000  # cells in a matrix of distances
MOST_EDGES = 60
MOST_DRAWN = 200_000  # cells; more would overlap


def training_curve(history: pd.DataFrame) -> Figure:
    """Lower bound of training cells and evidence of held-out cells, and the divergence of z_cell, by step."""
    figure, (left, right) = _figure(2)
    names = {"elbo_train": "training cells", "evidence_validation": "held-out cells, given their neighbours"}
    for column, label in names.items():
        if column in history:
            left.plot(history["step"], history[column], label=label)
    middle = history[[c for c in names if c in history]].to_numpy(float)
    if len(middle) > 3:  # the first steps would dominate the scale
        left.set_ylim(np.percentile(middle, 8), middle.max() + 0.1 * np.ptp(middle[len(middle) // 2 :]) + 1e-6)
    left.set(xlabel="step", ylabel="nats per cell", title="Evidence lower bound")
    left.legend(frameon=False)
    if "kl_cell_validation" in history:
        right.plot(history["step"], history["kl_cell_validation"])
    right.set(xlabel="step", ylabel="nats per cell", title="Divergence of z_cell from its prior")
    return figure


def latent_map(latent: np.ndarray, labels: np.ndarray | None = None, title: str = "Latent space") -> Figure:
    """First two principal components of ``latent`` (cell, dim), coloured by ``labels`` (cell,)."""
    centred = latent - latent.mean(0)
    axes_of_variance = np.linalg.eigh(centred.T.astype(float) @ centred)[1][:, ::-1]
    where = np.zeros((len(centred), 2))
    where[:, : latent.shape[1]] = centred @ axes_of_variance[:, :2]
    figure, (axes,) = _figure(1)
    _scatter(axes, where, labels)
    axes.set(xlabel="component 1", ylabel="component 2", title=title, xticks=[], yticks=[])
    return figure


def domains_in_space(
    coordinates: np.ndarray, labels: np.ndarray, title: str = "Domains", like: np.ndarray | None = None
) -> Figure:
    """Cells at their ``coordinates`` (cell, 2 or 3; the first two axes are drawn), coloured by ``labels`` (cell,).

    With other labels ``like`` (cell,), labels get the colours of the one-to-one matching to ``like`` that shares the
    most cells (Kuhn 1955).
    """
    figure, (axes,) = _figure(1)
    _scatter(axes, coordinates[:, :2], labels, like)
    axes.set(title=title, aspect="equal", xticks=[], yticks=[])
    axes.invert_yaxis()
    return figure


def number_of_domains(found: pd.DataFrame) -> Figure:
    """Agreement between halves of the cells by number of domains, from ``analysis.stability``; error bars are one
    standard deviation over halvings."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(1)
    axes.errorbar(found["k"], found["agreement"], found["spread"], marker="o", capsize=2)
    if found["by_chance"].notna().any():
        axes.plot(found["k"], found["by_chance"], "--", color="0.5", label="cells at permuted positions")
        axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="domains", ylabel="adjusted Rand index of halves", title="Reproducibility of domains")
    return figure


def latent_distances(latent: np.ndarray, labels: np.ndarray, seed: int = 0, title: str = "Latent space") -> Figure:
    """Distances between cells in latent space, ordered by label, and a two-dimensional embedding of the cells.

    ``latent`` float (cell, dim), ``labels`` (cell,); at most 2,000 random cells are drawn. The embedding is ``latent``
    itself if it has two dimensions, else UMAP (McInnes, Healy & Melville 2018) if umap-learn is installed, else t-SNE.
    """
    from scipy.spatial.distance import cdist

    drawn = np.random.default_rng(seed).permutation(len(latent))[:MOST_COMPARED]
    labels, latent = np.asarray(labels).astype(str)[drawn], latent[drawn]
    names = _in_order(labels)
    code = np.array([names.index(label) for label in labels])
    order = np.argsort(code, kind="stable")
    latent, labels, code = latent[order], labels[order], code[order]
    figure, (left, right) = _figure(2)
    distance = cdist(latent, latent)
    image = left.imshow(
        distance, cmap="viridis", vmax=np.percentile(distance, 99), interpolation="none", rasterized=True
    )
    edges = np.flatnonzero(np.diff(code)) + 0.5
    for edge in edges:
        left.axhline(edge, color="w", lw=0.6)
        left.axvline(edge, color="w", lw=0.6)
    middles = [np.flatnonzero(code == kind).mean() for kind in range(len(names))]
    size = 8 if len(names) <= MAX_LEGEND else 5
    left.set_yticks(middles, names, fontsize=size)
    for text, colour in zip(left.get_yticklabels(), _colours(labels).values(), strict=True):
        text.set_color((0.8 * colour[0], 0.8 * colour[1], 0.8 * colour[2]))  # serves as legend if the map has none
    left.set(xticks=[], title="Distance between cells in latent space")
    figure.colorbar(image, ax=left, shrink=0.7, label="Euclidean distance")
    where, name = _in_the_plane(latent, seed)
    _scatter(right, where, labels)
    right.set(xlabel=f"{name} 1", ylabel=f"{name} 2", title=title, xticks=[], yticks=[])
    return figure


def couplings(table: pd.DataFrame, title: str = "Couplings of neighbouring types") -> Figure:
    """Matrix of the couplings of ``potts.interactions``: red for attraction, blue for repulsion; dots mark an FDR below
    5 %."""
    names = _in_order(np.unique(table[["label", "neighbour"]]))
    matrix, found = np.zeros((len(names), len(names))), np.zeros((len(names), len(names)), bool)
    for row in table.to_dict("records"):
        a, b = names.index(row["label"]), names.index(row["neighbour"])
        matrix[a, b] = matrix[b, a] = row["coupling"]
        found[a, b] = found[b, a] = row["fdr"] < 0.05
    figure, (axes,) = _figure(1, max(1, len(names) / 18))
    most = max(float(np.percentile(np.abs(matrix), 98)), 1e-6)
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
    down, across = np.nonzero(found)
    axes.scatter(across, down, s=6, color="k", lw=0)
    size = 9 if len(names) <= MAX_LEGEND else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.7, label="coupling, nats per edge")
    return figure


def dependence_graph(given: pd.DataFrame, alone: pd.DataFrame) -> Figure:
    """Graph of the edges between genes, of ``dependence.partial_correlations``: conditional on the neighbours (red
    positive, blue negative), or only without them (grey). The 60 strongest edges of each table are drawn."""
    given, alone = given.head(MOST_EDGES), alone.head(MOST_EDGES)
    ends = pd.concat([given, alone])[["gene", "other"]]
    names = _along_edges(ends.to_numpy())
    angle = {name: 2 * np.pi * i / max(len(names), 1) for i, name in enumerate(names)}
    figure, (axes,) = _figure(1, 1.25)
    kept = {frozenset(pair) for pair in given[["gene", "other"]].to_numpy()}
    others = [row for row in alone.to_dict("records") if frozenset((row["gene"], row["other"])) not in kept]
    for rows, style in ((others, 0.6), (given.to_dict("records"), 0.0)):
        for row in rows:
            colour = "0.75" if style else ("tab:red" if row["partial_correlation"] > 0 else "tab:blue")
            at = np.array([angle[row["gene"]], angle[row["other"]]])
            axes.plot(np.cos(at), np.sin(at), color=colour, lw=0.6 + 4 * abs(row["partial_correlation"]), alpha=0.8)
    for name, place in angle.items():
        turn = float(np.degrees(place))
        left = bool(np.cos(place) < 0)
        axes.text(
            1.04 * np.cos(place),
            1.04 * np.sin(place),
            name,
            rotation=turn + 180 if left else turn,
            rotation_mode="anchor",
            ha="right" if left else "left",
            va="center",
            fontsize=8 if len(names) <= 40 else 6,
        )
    axes.plot([], [], color="tab:red", label="positive, given the neighbours")
    axes.plot([], [], color="tab:blue", label="negative, given the neighbours")
    axes.plot([], [], color="0.75", label="only without the neighbours")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    axes.set_title("Conditional dependence between genes")
    axes.axis("off")
    return figure


def variance_bars(shares: pd.DataFrame, most: int = 30) -> Figure:
    """Bars of ``dependence.variance_shares``, for the genes of which niche and neighbours explain the largest share."""
    order = (shares["niche"] + shares["neighbours"]).sort_values(ascending=False).index[:most][::-1]
    shares = shares.loc[order]
    figure, (axes,) = _figure(1, max(len(shares) / 25, 0.8))
    start = np.zeros(len(shares))
    for name, colour, label in (
        ("type", "0.6", "its type"),
        ("niche", "tab:green", "its niche, in addition"),
        ("neighbours", "tab:orange", "its neighbours' genes, in addition"),
    ):
        axes.barh(shares["gene"], shares[name], left=start, color=colour, label=label)
        start = start + shares[name].to_numpy()
    axes.set(xlabel="share of the variance of log counts in held-out cells", ylim=(-0.6, len(shares) - 0.4))
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title("Sources of variation of gene expression", pad=24)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def effects(table: pd.DataFrame, most: int = 25) -> Figure:
    """The first rows of ``dependence.neighbour_effects`` with 95 % intervals; filled markers at an FDR below 10 %."""
    rows = table.head(most).iloc[::-1]
    figure, (axes,) = _figure(1, max(len(rows) / 22, 0.6))
    error = np.abs(rows["effect"] / rows["t"].replace(0, np.nan))
    place = np.arange(len(rows))
    axes.errorbar(rows["effect"], place, xerr=1.96 * error, fmt="none", ecolor="0.6", lw=1)
    found = (rows["fdr"] < 0.1).to_numpy()
    for of, face in ((found, "tab:red"), (~found, "w")):
        axes.scatter(rows["effect"][of], place[of], color=face, edgecolor="tab:red", zorder=3, s=22)
    texts = [f"{row['gene']} in {row['type']}, beside {row['neighbour']}" for row in rows.to_dict("records")]
    axes.set_yticks(place, texts, fontsize=7)
    axes.axvline(0, color="0.3", lw=0.8)
    axes.set(xlabel="change of log counts")
    figure.suptitle("Change per additional neighbour, 95 % intervals (filled: FDR below 10 %)", fontsize=11)
    return figure


def programs_map(programs: pd.DataFrame, most: int = 40) -> Figure:
    """Heat map of ``interpret.latent_programs`` (gene, dimension), for the genes that change most, grouped by
    dimension."""
    change = programs.abs()
    programs = programs.loc[change.max(axis=1).sort_values(ascending=False).index[:most]]
    order = np.lexsort((-programs.abs().to_numpy().max(1), programs.abs().to_numpy().argmax(1)))
    programs = programs.iloc[order]
    figure, (axes,) = _figure(1, max(len(programs) / 28, 0.8))
    highest = max(float(programs.abs().to_numpy().max()), 1e-6)
    image = axes.imshow(programs, cmap="RdBu_r", vmin=-highest, vmax=highest, aspect="auto")
    axes.set_xticks(range(programs.shape[1]), list(programs.columns), rotation=90, fontsize=8)
    axes.set_yticks(range(len(programs)), list(programs.index), fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6, label="change of log share per unit")
    axes.set_title("Gene programs of z_cell")
    return figure


def _along_edges(edges: np.ndarray) -> list[str]:
    """Names in the order of a depth-first search along ``edges`` (edge, 2), so that connected names are close."""
    near: dict[str, list[str]] = {}
    for a, b in edges:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    found: dict[str, None] = {}
    for start in sorted(near, key=lambda name: len(near[name])):
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = None
                waiting += sorted(set(near[name]), reverse=True)
    return list(found)


def _in_the_plane(latent: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    if latent.shape[1] <= 2:
        return np.pad(latent, ((0, 0), (0, 2 - latent.shape[1]))), "latent"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # umap warns if TensorFlow, which is not used, is missing
            from umap import UMAP
    except ImportError:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(latent) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(latent), "t-SNE"
    return UMAP(random_state=seed, n_jobs=1).fit_transform(latent), "UMAP"


def _in_order(labels: np.ndarray) -> list[str]:
    """Each label once: numbers by value, then names."""
    return sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def _figure(panels: int, scale: float = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels * scale, 4.6 * scale), layout="constrained", dpi=130)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _colours(labels: np.ndarray, like: np.ndarray | None = None) -> dict[str, tuple[float, ...]]:
    """A colour for each label, or that of the label among ``like`` (cell,) that it is matched to; grey if unmatched."""
    from matplotlib import colormaps
    from scipy.optimize import linear_sum_assignment

    names = _in_order(labels)
    if like is None:
        colours = colormaps["tab20" if len(names) > 10 else "tab10"]
        return {name: colours(i % colours.N) for i, name in enumerate(names)}
    others = _in_order(like)
    both = np.array([[((labels == a) & (like == b)).sum() for b in others] for a in names])
    of, fits = linear_sum_assignment(-both)
    known, matched = _colours(like), dict(zip(of.tolist(), fits.tolist(), strict=True))
    greys = iter(np.linspace(0.2, 0.8, len(names)))
    return {name: known[others[matched[i]]] if i in matched else (next(greys),) * 3 for i, name in enumerate(names)}


def _scatter(axes: Axes, where: np.ndarray, labels: np.ndarray | None, like: np.ndarray | None = None) -> None:
    colours = {} if labels is None else _colours(np.asarray(labels).astype(str), like)
    if len(where) > MOST_DRAWN:
        drawn = np.random.default_rng(0).choice(len(where), MOST_DRAWN, replace=False)
        where, labels = where[drawn], labels if labels is None else np.asarray(labels)[drawn]
    size = float(np.clip(8000 / max(len(where), 1), 0.5, 14))
    if labels is None:
        axes.scatter(where[:, 0], where[:, 1], s=size, lw=0, color="0.4")
        return
    labels = np.asarray(labels).astype(str)
    for name, colour in colours.items():
        of = labels == name
        axes.scatter(where[of, 0], where[of, 1], s=size, lw=0, color=colour, label=name)
    if len(colours) <= MAX_LEGEND:
        axes.legend(frameon=False, markerscale=(30 / size) ** 0.5, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
