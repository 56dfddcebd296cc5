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
        ax.imshow(image, cmap="gray", interpolation="nearest")
        for blank, colour, label in ((False, "#38bdf8", "gene"), (True, "#f87171", "blank")):
            chosen = calls[calls["is_blank"] == blank]
            face = "none" if ax is detail else colour
            ax.scatter(
                chosen["x"], chosen["y"], s=size, facecolors=face, edgecolors=colour, linewidths=0.8, label=label
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


def drift(shifts: pd.DataFrame) -> Figure:
    """Drift of each round of each field: table with fov, round, dy, dx (pixel) and ok."""
    figure, (ax,) = new_figure(6.4, 3.6)
    length = pd.Series(np.hypot(shifts["dy"].to_numpy(), shifts["dx"].to_numpy()), index=shifts.index)
    for index, (fov, rows) in enumerate(shifts.groupby("fov")):
        colour = CATEGORIES[index % len(CATEGORIES)]
        label = f"field {fov}" if shifts["fov"].nunique() <= 8 else None
        ax.plot(rows["round"], length[rows.index], "o-", color=colour, markersize=4, linewidth=1, label=label)
    failed = shifts[~shifts["ok"].astype(bool)]
    ax.plot(
        failed["round"],
        length[failed.index].fillna(0),
        "x",
        color=BLANK,
        markersize=8,
        label="failed" if len(failed) else None,
    )
    ax.set(xlabel="imaging round", ylabel="drift against round 0 [px]", ylim=(0, None))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def bit_brightness(scale: np.ndarray, background: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> Figure:
    """Height of a molecule's spot in each bit and the level it stands on (bit,), in camera counts after filtering."""
    figure, (ax,) = new_figure(6.4, 3.6)
    kinds = list(dict.fromkeys(colours))
    for kind in kinds:
        chosen = [k for k, colour in enumerate(colours) if colour == kind]
        ax.bar(chosen, np.asarray(scale)[chosen], color=CATEGORIES[kinds.index(kind) % len(CATEGORIES)], label=kind)
    ax.plot(range(len(names)), background, "_", color="black", markersize=9, label="level without spots")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    ax.set(ylabel="height of one molecule [counts]")
    ax.set_ylim(top=1.3 * max(float(np.max(scale)), 1.0))
    ax.legend(fontsize=8, frameon=False, ncols=3, title="colour [nm]" if any(kinds) else None, title_fontsize=8)
    return figure


def error_rates(rates: Mapping[str, Sequence[float]]) -> Figure:
    """1->0 and 0->1 rates of each bit with their intervals (see `merfish.calls.error_model.bit_error_rates`)."""
    figure, (ax,) = new_figure(6.4, 3.6)
    places = np.arange(len(rates["bit"]))
    for kind, label, colour, shift in (("lost", "1→0", GENE, -0.12), ("gained", "0→1", BLANK, 0.12)):
        rate, low, high = (np.array(rates[kind + end], dtype=float) for end in ("", "_low", "_high"))
        ax.errorbar(
            places + shift,
            rate,
            np.maximum([rate - low, high - rate], 0),
            fmt="o",
            markersize=4,
            color=colour,
            label=label,
        )
    ax.set_xticks(places, [str(name) for name in rates["bit"]], rotation=90, fontsize=8)
    ax.set(ylabel="error rate, 95 % interval", ylim=(0, None))
    ax.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def stage(said: np.ndarray, positions: np.ndarray, links: pd.DataFrame) -> Figure:
    """Where the stage said the fields are and how far off it was, (fov, 2) micrometre, and the overlaps that tell.

    links: columns a, b (rows of positions) and used.
    """
    figure, (ax,) = new_figure(6.4, 5)
    for ends, used in zip(links[["a", "b"]].to_numpy(int), links["used"], strict=True):
        ax.plot(*said[ends].T, color=MUTED if used else BLANK, linewidth=1, linestyle="-" if used else ":", zorder=1)
    ax.plot(*said.T, "o", color="black", markersize=3, zorder=2)
    change = positions - said
    lengths = np.hypot(*change.T)
    if lengths.max(initial=0) > 0:
        # the longest arrow spans half the way to the next field
        near = np.hypot(*(said[:, None] - said[None]).T) if len(said) <= 2000 else np.array([[np.ptp(said) / 40]])
        step = float(np.min(near[near > 0], initial=np.inf))
        scale = 2 * lengths.max() / step
        ax.quiver(*said.T, *change.T, color=GENE, angles="xy", scale_units="xy", scale=scale, zorder=3)
        ax.plot(*(said + change / scale).T, " ")  # makes room for the arrows
    ax.set_title(f"the longest arrow is {lengths.max(initial=0):.2f} µm long", fontsize=9, loc="left")
    ax.set_aspect("equal")
    ax.margins(0.1)
    ax.invert_yaxis()
    ax.set(xlabel="x [µm]", ylabel="y [µm]")
    return figure


def words_called(before: np.ndarray, counts: np.ndarray, names: Sequence[str], is_blank: np.ndarray) -> Figure:
    """Molecules of each word (word,), most abundant first, blanks in red; pale: found (before), but not kept."""
    figure, (ax,) = new_figure(11, 3.4)
    order = np.lexsort((-before, -counts))
    colours = np.where(is_blank[order], BLANK, GENE)
    ax.bar(range(len(names)), before[order], color=colours, width=0.85, alpha=0.25)
    ax.bar(range(len(names)), counts[order], color=colours, width=0.85)
    top = order[:8]
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="words, most abundant first", ylabel="molecules", xlim=(-1, len(names)), xticks=[])
    first = ", ".join(f"{names[k]} {counts[k]:,}" for k in top)
    ax.set_title(f"genes blue, blanks red, pale: found but not kept; {first}", fontsize=9, loc="left")
    return figure


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
