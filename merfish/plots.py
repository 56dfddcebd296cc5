"""Pictures of a run; each function returns a Matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

GENE, BLANK, MUTED = "#2563eb", "#dc2626", "#94a3b8"
# Okabe and Ito's colours, told apart by colour-blind readers, then further hues
CATEGORIES = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9",
    "#f0e442", "#7f3c8d", "#a5aa99", "#80ba5a", "#3969ac",
)  # fmt: skip


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of width x height inches with one row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def overview(image: np.ndarray, calls: pd.DataFrame, crop: int = 160) -> Figure:
    """One field: the brightest bit of each pixel (y, x), and the molecules called, whole and enlarged.

    calls: transcript table of the field. crop: side in pixels of the enlarged square, put where calls are densest.
    """
    figure, (whole, detail) = new_figure(11, 5.4, 2)
    height, width = image.shape
    crop = min(crop, height // 2, width // 2)
    top, left = _densest(calls, image.shape, crop)
    for ax, size in ((whole, 1.5), (detail, 26)):
        ax.imshow(image, cmap="gray", interpolation="antialiased" if ax is whole else "nearest")
        for blank, colour, label in ((False, "#38bdf8", "gene"), (True, "#f87171", "blank")):
            chosen = calls[calls["is_blank"] == blank]
            face = "none" if ax is detail else colour
            ax.scatter(
                chosen["x"],
                chosen["y"],
                s=size,
                facecolors=face,
                edgecolors=colour,
                linewidths=0.8 if ax is detail else 0,
                label=label,
                rasterized=True,
            )
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    whole.add_patch(_square(left, top, crop))
    whole.set_title(f"brightest bit of each pixel, {len(calls):,} molecules", fontsize=10)
    detail.set(xlim=(left - 0.5, left + crop - 0.5), ylim=(top + crop - 0.5, top - 0.5))
    detail.set_title(f"the square of {crop} px", fontsize=10)
    detail.legend(loc="lower right", fontsize=8, framealpha=0.8)
    return figure


def _densest(calls: pd.DataFrame, shape: tuple[int, ...], crop: int) -> tuple[int, int]:
    if not len(calls):
        return (shape[0] - crop) // 2, (shape[1] - crop) // 2
    edges = [np.arange(0, max(length - crop, 0) + crop + 1, crop) for length in shape[:2]]
    counts, _, _ = np.histogram2d(calls["y"], calls["x"], bins=[np.append(e, e[-1] + crop) for e in edges])
    y, x = np.unravel_index(int(np.argmax(counts)), counts.shape)
    return min(int(y) * crop, shape[0] - crop), min(int(x) * crop, shape[1] - crop)


def _square(left: int, top: int, side: int) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), side, side, fill=False, edgecolor="#facc15", linewidth=1)


def cells(geometry: np.ndarray, labels: Sequence[str] | None = None, title: str = "") -> Figure:
    """Cell outlines (shapely polygons, micrometre), coloured by a label when given."""
    import shapely
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    figure, (ax,) = new_figure(6.6, 6)
    kinds = sorted({str(label) for label in labels}, key=lambda k: (len(k), k)) if labels is not None else []
    rings, faces = [], []
    for index, shape in enumerate(geometry):
        for part in shapely.get_parts(shape):
            rings.append(shapely.get_coordinates(part.exterior))
            faces.append(
                CATEGORIES[kinds.index(str(labels[index])) % len(CATEGORIES)] if labels is not None else "#dbeafe"
            )
    ax.add_collection(PolyCollection(rings, facecolors=faces, edgecolors="#334155", linewidths=0.4, alpha=0.9))
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set(xlabel="x [µm]", ylabel="y [µm]", title=title)
    if 0 < len(kinds) <= 20:
        handles = [Patch(color=CATEGORIES[i % len(CATEGORIES)], label=kind) for i, kind in enumerate(kinds)]
        ax.legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def permuted_control(real: float, permuted: Sequence[float], label: str, title: str) -> Figure:
    """One number for the real codebook against the same number for codebooks with permuted bits."""
    figure, (ax,) = new_figure(5.2, 2.8)
    ax.hist(permuted, bins=10, color=MUTED, label=f"{len(permuted)} permuted codebooks")
    ax.axvline(real, color=GENE, linewidth=2.5, label="real codebook")
    ax.set(xlabel=label, ylabel="codebooks", title=title)
    ax.legend(fontsize=8, frameon=False, loc="upper center")
    return figure


def scatter_counts(measured: np.ndarray, true: np.ndarray, title: str) -> Figure:
    """Counts of each cell and gene, measured against true, one point an entry, jittered."""
    figure, (ax,) = new_figure(4.6, 4.4)
    rng = np.random.default_rng(0)
    jitter = rng.uniform(-0.3, 0.3, (2, true.size))
    ax.plot(true.ravel() + jitter[0], measured.ravel() + jitter[1], ".", markersize=2, alpha=0.25, color=GENE)
    top = float(max(true.max(initial=1), measured.max(initial=1)))
    ax.plot([0, top], [0, top], color=MUTED, linewidth=1)
    ax.set(xlabel="true molecules of a gene in a cell", ylabel="measured", title=title)
    return figure


def labels_by_place(x: np.ndarray, y: np.ndarray, panels: Mapping[str, Sequence[str] | np.ndarray]) -> Figure:
    """Cells at their places (micrometre), one panel for each way to label them."""
    figure, axes = new_figure(5.4 * len(panels), 5.2, len(panels))
    for ax, (title, labels) in zip(axes, panels.items(), strict=True):
        text = np.array([str(label) for label in labels])
        for index, kind in enumerate(sorted(set(text), key=lambda k: (len(k), k))):
            chosen = text == kind
            colour = CATEGORIES[index % len(CATEGORIES)]
            ax.scatter(x[chosen], y[chosen], s=max(2, 30_000 / len(x) ** 1.1), color=colour, label=kind, linewidths=0)
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.legend(fontsize=7, frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
