"""Figures and colours of reports, the demonstration and benchmarks; no function changes global state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PIXELS = 1000  # along the longer side of the image of a field; enough for a screen
GENE, BLANK, MUTED = "#2563eb", "#dc2626", "#94a3b8"
# Okabe and Ito's colours, which colour-blind readers can distinguish, and further hues
CATEGORIES = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#7f3c8d",
    "#a5aa99", "#80ba5a", "#e73f74", "#8c613c", "#008695", "#f97b72", "#4b4b8f", "#3969ac",
)  # fmt: skip


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure of width x height inches with one row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def draw_field(ax: Axes, image: np.ndarray, calls: pd.DataFrame, square: tuple[int, int, int]) -> None:
    """Draw a field (y, x) with its molecules as dots, and the outline of a square (top, left, side), pixel."""
    from matplotlib.patches import Rectangle

    top, left, side = square
    # matplotlib needs 40 bytes for each pixel
    step = max(image.shape) // MOST_PIXELS + 1
    height, width = (side - side % step for side in image.shape)
    small = image[:height, :width].reshape(height // step, step, width // step, step).mean(axis=(1, 3))
    ax.imshow(small, cmap="gray", interpolation="antialiased", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    _molecules(ax, calls, 1.5, filled=True)
    ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="#facc15", linewidth=1))
    ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    ax.set_title(f"brightest bit of each pixel, {len(calls):,} molecules", fontsize=9, loc="left")


def draw_detail(ax: Axes, image: np.ndarray, calls: pd.DataFrame, square: tuple[int, int, int]) -> None:
    """Draw a square (top, left, side), pixel, of a field (y, x) with its molecules as circles."""
    top, left, side = square
    ax.imshow(image[top : top + side, left : left + side], cmap="gray", interpolation="nearest",
              extent=(left - 0.5, left + side - 0.5, top + side - 0.5, top - 0.5))  # fmt: skip
    inside = calls["x"].between(left, left + side) & calls["y"].between(top, top + side)
    _molecules(ax, calls[inside], 26, filled=False)
    ax.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
    ax.set_title(f"{side} x {side} px", fontsize=9, loc="left")
    legend = ax.legend(loc="lower right", fontsize=8, framealpha=0.8, facecolor="#0f172a", edgecolor="none")
    for text in legend.get_texts():
        text.set_color("white")


def _molecules(ax: Axes, calls: pd.DataFrame, size: float, filled: bool) -> None:
    for blank, colour, label in ((False, "#38bdf8", "gene"), (True, "#f87171", "blank")):
        chosen = calls[calls["is_blank"] == blank]
        face, width = (colour, 0.0) if filled else ("none", 0.8)
        ax.scatter(
            chosen["x"],
            chosen["y"],
            s=size,
            facecolors=face,
            edgecolors=colour,
            linewidths=width,
            label=label,
            rasterized=True,
        )
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])


def densest_square(calls: pd.DataFrame, shape: tuple[int, ...], side: int = 160) -> tuple[int, int, int]:
    """(top, left, side) of the square of a field with the most molecules; the side has at most ``side`` pixels."""
    crop = min(side, shape[0] // 2, shape[1] // 2)
    if not len(calls):
        return (shape[0] - crop) // 2, (shape[1] - crop) // 2, crop
    edges = [np.arange(0, max(length - crop, 0) + crop + 1, crop) for length in shape[:2]]
    counts, _, _ = np.histogram2d(calls["y"], calls["x"], bins=[np.append(e, e[-1] + crop) for e in edges])
    y, x = np.unravel_index(int(np.argmax(counts)), counts.shape)
    return min(int(y) * crop, shape[0] - crop), min(int(x) * crop, shape[1] - crop), crop


def colours_of(labels: Iterable[object]) -> dict[str, str]:
    """Assign a colour of `CATEGORIES` to each label, in sorted order; numbers are sorted by value."""
    kinds = sorted({str(label) for label in labels}, key=lambda kind: (len(kind) if kind.isdigit() else 0, kind))
    return {kind: CATEGORIES[k % len(CATEGORIES)] for k, kind in enumerate(kinds)}


def matching_colours(found: np.ndarray, true: np.ndarray, colours: Mapping[str, str]) -> dict[str, str]:
    """Colours of found labels (cell,), matched one to one to true labels such that most cells are shared.

    true: (cell,), "" if unknown. colours: of true labels. Found labels without a match get the remaining colours.
    """
    from scipy.optimize import linear_sum_assignment

    kinds, partners = list(colours_of(found)), list(colours)
    known = np.isin(true, partners)
    shared = pd.crosstab(pd.Series(found[known].astype(str)), pd.Series(true[known].astype(str)))
    shared = shared.reindex(index=kinds, columns=partners, fill_value=0)
    matched = {kinds[i]: colours[partners[j]] for i, j in zip(*linear_sum_assignment(-shared.to_numpy()), strict=True)}
    left = [colour for colour in CATEGORIES if colour not in matched.values()] or list(CATEGORIES)
    alone = [kind for kind in kinds if kind not in matched]
    return matched | {kind: left[k % len(left)] for k, kind in enumerate(alone)}


def permuted_control(real: float, permuted: Sequence[float], label: str, title: str) -> Figure:
    """Plot a quantity of the real codebook against a histogram of it for codebooks with permuted bits."""
    figure, (ax,) = new_figure(6.4, 3.2)
    ax.hist(permuted, bins=10, color=MUTED, label=f"{len(permuted)} permuted codebooks")
    ax.axvline(real, color=GENE, linewidth=2.5, label="real codebook")
    ax.set(xlabel=label, ylabel="codebooks", title=title)
    ax.legend(fontsize=8, frameon=False, loc="best")
    return figure


def scatter_counts(measured: np.ndarray, true: np.ndarray, title: str) -> Figure:
    """Scatter plot of measured against true counts, one jittered point for each cell and gene."""
    figure, (ax,) = new_figure(6.4, 4.6)
    rng = np.random.default_rng(0)
    jitter = rng.uniform(-0.3, 0.3, (2, true.size))
    x, y = true.ravel() + jitter[0], measured.ravel() + jitter[1]
    ax.plot(x, y, ".", markersize=2, alpha=0.25, color=GENE, rasterized=True)
    top = float(max(true.max(initial=1), measured.max(initial=1)))
    ax.plot([0, top], [0, top], color=MUTED, linewidth=1)
    ax.set(xlabel="true molecules of a gene in a cell", ylabel="measured", title=title)
    return figure


def labels_by_place(x: np.ndarray, y: np.ndarray, labels: np.ndarray, title: str, colours: Mapping[str, str]) -> Figure:
    """Plot cells (cell,) at their positions, coloured by label; labels without a colour are omitted."""
    figure, (ax,) = new_figure(6.4, 4.6)
    text = np.array([str(label) for label in labels])
    size = float(np.clip(30_000 / max(len(x), 1) ** 1.1, 2, 30))
    for kind, colour in colours.items():
        chosen = text == kind
        ax.scatter(x[chosen], y[chosen], s=size, color=colour, label=kind, linewidths=0, rasterized=len(x) > 500)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9, loc="left")
    ax.spines[:].set_visible(False)
    ax.legend(fontsize=7, frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
