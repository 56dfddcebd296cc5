"""Figures of a trained model. Each function returns a matplotlib Figure that no window holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND = 24
MOST_DRAWN = 200_000  # cells; more hide each other


def training_curve(history: pd.DataFrame) -> Figure:
    """Bound of training cells and evidence of held-out ones, and the divergence of z_cell, by step."""
    figure, (left, right) = _figure(2)
    names = {"elbo_train": "training cells", "evidence_validation": "held-out cells, given their neighbours"}
    for column, label in names.items():
        if column in history:
            left.plot(history["step"], history[column], label=label)
    middle = history[[c for c in names if c in history]].to_numpy(float)
    if len(middle) > 3:  # the first steps would flatten the rest
        left.set_ylim(np.percentile(middle, 8), middle.max() + 0.1 * np.ptp(middle[len(middle) // 2 :]) + 1e-6)
    left.set(xlabel="step", ylabel="nats a cell", title="Evidence lower bound")
    left.legend(frameon=False)
    if "kl_cell_validation" in history:
        right.plot(history["step"], history["kl_cell_validation"])
    right.set(xlabel="step", ylabel="nats a cell", title="Divergence of z_cell from its prior")
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


def domains_in_space(coordinates: np.ndarray, labels: np.ndarray, title: str = "Domains") -> Figure:
    """Cells where they lie, coloured by ``labels``. coordinates (cell, 2 or 3): the first two axes are drawn."""
    figure, (axes,) = _figure(1)
    _scatter(axes, coordinates[:, :2], labels)
    axes.set(title=title, aspect="equal", xticks=[], yticks=[])
    axes.invert_yaxis()
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4.6), layout="constrained", dpi=130)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _scatter(axes: Axes, where: np.ndarray, labels: np.ndarray | None) -> None:
    from matplotlib import colormaps

    if len(where) > MOST_DRAWN:
        drawn = np.random.default_rng(0).choice(len(where), MOST_DRAWN, replace=False)
        where, labels = where[drawn], labels if labels is None else np.asarray(labels)[drawn]
    size = float(np.clip(8000 / max(len(where), 1), 0.5, 14))
    if labels is None:
        axes.scatter(where[:, 0], where[:, 1], s=size, lw=0, color="0.4")
        return
    labels = np.asarray(labels).astype(str)
    names = sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    colours = colormaps["tab20" if len(names) > 10 else "tab10"]
    for i, name in enumerate(names):
        of = labels == name
        axes.scatter(where[of, 0], where[of, 1], s=size, lw=0, color=colours(i % colours.N), label=name)
    if len(names) <= MAX_LEGEND:
        axes.legend(frameon=False, markerscale=(30 / size) ** 0.5, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
