"""Figures of the report; each function returns a Matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from merfish.plots import BLANK, CATEGORIES, GENE, MUTED, draw_detail, draw_field, new_figure
from merfish.report.summary import Squares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MANY = 500  # fields or points; more are drawn as pixels, fewer as vectors
MANY_CORNERS = 20_000  # corners of outlines; more are drawn as pixels
LEAST_OFF = 1e-3  # micrometres; smaller errors get no arrow
ENLARGED = (1, 2, 5, 10, 20, 50, 100)  # factors by which arrows may be enlarged
MOST_NAMED, NAME_SIZE = 5, (0.15, 0.04)  # genes named in a figure; width and height of a name, as fractions of the axes
SMALL, NORMAL, WIDE, LEAST_HEIGHT = 4.0, 6.4, 11.0, 2.0  # inches: widths of figures, minimum height of a map


def map_figure(width: float, extent: np.ndarray) -> tuple[Figure, Axes]:
    """Return axes for positions in micrometres, with the aspect ratio of a section of ``extent`` (x, y)."""
    aspect = extent[1] / max(extent[0], 1e-9)
    figure, (ax,) = new_figure(width, float(np.clip(0.68 * width * aspect + 0.6, LEAST_HEIGHT, 1.2 * width)))
    ax.set_aspect("equal")
    ax.set(xlabel="x [µm]", ylabel="y [µm]")
    ax.ticklabel_format(useOffset=False)
    ax.locator_params(axis="y", nbins=5)
    if aspect < 2:
        ax.locator_params(axis="x", nbins=5)
    else:  # the numbers are wider than the distance between them
        ax.tick_params(axis="x", labelrotation=90)
        ax.locator_params(axis="x", nbins=1)
    return figure, ax


def _colours_beside(ax: Axes, drawn: ScalarMappable, label: str) -> None:
    """Add a colour bar as high as the map."""
    from matplotlib.ticker import MaxNLocator

    # a number of ticks that depends on the height would change the width, and so the height, at every layout
    beside = ax.inset_axes((1.04, 0, 0.045, 1))
    ax.figure.colorbar(drawn, cax=beside, label=label, ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))
    beside.ticklabel_format(useOffset=False)


def field_map(
    positions: np.ndarray, size: tuple[float, float], values: np.ndarray, failed: np.ndarray, label: str
) -> Figure:
    """Map a value of each field (field,); positions (field, 2) of their corners and size (x, y) in micrometres.

    failed: positions of fields without values, drawn as crosses.
    """
    from matplotlib.collections import PolyCollection

    everything = np.concatenate([positions, failed])
    figure, ax = map_figure(SMALL, np.ptp(everything, axis=0) + size)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    known = np.isfinite(values)
    tiles = PolyCollection(
        list(positions[known][:, None] + square),
        array=values[known],
        cmap="viridis",
        edgecolors="white" if len(positions) <= MANY else "none",
        linewidths=0.5,
        rasterized=len(positions) > MANY,
    )
    ax.add_collection(tiles)
    ax.plot(*(failed + np.array(size) / 2).T, "x", color=BLANK, markersize=7, markeredgewidth=2)
    ax.update_datalim(np.concatenate([everything, everything + size]))
    ax.autoscale_view()
    ax.invert_yaxis()
    if known.any():
        _colours_beside(ax, tiles, label)
    return figure


def square_map(values: np.ndarray, squares: Squares, label: str, colours: str, width: float) -> Figure:
    """Map values (y, x) of squares, NaN for no value; colours: name of a colour map."""
    figure, ax = map_figure(width, _extent(squares))
    shown = values[np.isfinite(values) & (values > 0)]
    top = float(np.percentile(shown, 99)) if len(shown) else 1.0
    _colours_beside(ax, _draw_squares(ax, values, squares, cmap=colours, vmin=0, vmax=top), label)
    return figure


def _extent(squares: Squares) -> np.ndarray:
    """Return (x, y) of a grid, in micrometres."""
    return squares.side * np.array(squares.shape[::-1])


def _draw_squares(ax: Axes, values: np.ndarray, squares: Squares, **options: Any) -> AxesImage:
    """Draw an image of squares (y, x) or (y, x, channel) at their positions on the stage."""
    (left, top), (right, bottom) = squares.corner, squares.corner + _extent(squares)
    return ax.imshow(values, extent=(left, right, bottom, top), interpolation="nearest", **options)


def density_map(density: np.ndarray, squares: Squares) -> Figure:
    """Map molecules per square micrometre; density: (y, x) counts in squares."""
    return square_map(density / squares.side**2, squares, "molecules of genes / µm²", "magma", SMALL)


def field_image(image: np.ndarray, calls: pd.DataFrame, square: tuple[int, int, int]) -> Figure:
    """Draw a field (y, x) and its molecules, see `merfish.plots.draw_field`."""
    figure, (ax,) = new_figure(SMALL, SMALL * image.shape[0] / image.shape[1] + 0.3)
    draw_field(ax, image, calls, square)
    return figure


def field_detail(image: np.ndarray, calls: pd.DataFrame, square: tuple[int, int, int]) -> Figure:
    """Draw a square of a field and its molecules, see `merfish.plots.draw_detail`."""
    figure, (ax,) = new_figure(SMALL, SMALL + 0.3)
    draw_detail(ax, image, calls, square)
    return figure


def cell_map(geometry: np.ndarray, values: np.ndarray, label: str) -> Figure:
    """Draw outlines of cells (shapely, micrometres), coloured by a value (cell,)."""
    rings, cell = _rings(geometry)
    figure, ax = map_figure(NORMAL, np.ptp(np.concatenate(rings), axis=0))
    drawn = _draw_outlines(ax, rings, array=values[cell], cmap="viridis", clim=(0, float(np.percentile(values, 99))))
    _colours_beside(ax, drawn, label)
    return figure


def domain_map(geometry: np.ndarray, domain: np.ndarray, colours: Mapping[str, str]) -> Figure:
    """Draw outlines of cells (shapely, micrometres) in the colours of their domains, text (cell,)."""
    rings, cell = _rings(geometry)
    figure, ax = map_figure(NORMAL, np.ptp(np.concatenate(rings), axis=0))
    _draw_outlines(ax, rings, facecolors=np.array([colours[name] for name in domain])[cell])
    _domains_beside(ax, colours)
    return figure


def domain_squares(found: np.ndarray, squares: Squares, colours: Mapping[str, str]) -> Figure:
    """Draw squares in the colours of domains, int (y, x) in the order of ``colours``; -1 for squares without cells."""
    from matplotlib.colors import to_rgba_array

    figure, ax = map_figure(NORMAL, _extent(squares))
    _draw_squares(ax, to_rgba_array([*colours.values(), "none"])[found], squares)
    _domains_beside(ax, colours)
    return figure


def _rings(geometry: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return outer rings (point, 2) of polygons of one or more parts, and the row of the polygon of each ring."""
    import shapely

    parts, row = shapely.get_parts(geometry, return_index=True)
    return [shapely.get_coordinates(ring) for ring in shapely.get_exterior_ring(parts)], row


def _many(rings: Sequence[np.ndarray]) -> bool:
    return sum(map(len, rings)) > MANY_CORNERS


def _draw_outlines(ax: Axes, rings: list[np.ndarray], **colours: Any) -> PolyCollection:
    from matplotlib.collections import PolyCollection

    collection = PolyCollection(rings, edgecolors="#64748b", linewidths=0.3, rasterized=_many(rings), **colours)
    ax.add_collection(collection)
    ax.autoscale_view()
    ax.invert_yaxis()
    return collection


def embedding_plane(plane: np.ndarray, domain: np.ndarray, colours: Mapping[str, str]) -> Figure:
    """Plot cells in two dimensions of their embedding (cell, 2), in the colours of their domains, text (cell,)."""
    figure, (ax,) = new_figure(NORMAL, 4.6)
    faces = [colours[name] for name in domain]
    x, y = plane.T
    area = float(np.clip(160_000 / max(len(plane), 1), 0.4, 16))  # of a dot, square points
    ax.scatter(x, y, c=faces, s=area, linewidths=0, rasterized=len(plane) > MANY)
    ax.set(xlabel="principal component 1", ylabel="principal component 2", xticks=[], yticks=[])
    _domains_beside(ax, colours)
    return figure


def _domains_beside(ax: Axes, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    ax.legend(
        handles=handles, title="domain", fontsize=8, title_fontsize=8, frameon=False, loc="upper left",
        bbox_to_anchor=(1, 1), ncols=1 + len(handles) // 20,
    )  # fmt: skip


def stains_under_outlines(stains: np.ndarray, names: Sequence[str], rings: Sequence[np.ndarray]) -> Figure:
    """Draw stains of a field, uint8 (stain, y, x), in blue and green, under outlines (point, 2) in their pixels."""
    from matplotlib.collections import LineCollection

    figure, (ax,) = new_figure(NORMAL, NORMAL * stains.shape[1] / stains.shape[2] + 0.3)
    picture = np.zeros((*stains.shape[1:], 3))
    for stain, colour in zip(stains, ((0.25, 0.45, 1.0), (0.1, 0.75, 0.3)), strict=False):
        picture += stain[..., None] / 255 * np.array(colour)
    ax.imshow(np.clip(picture, 0, 1), interpolation="nearest")
    ax.add_collection(LineCollection(rings, colors="#fde047", linewidths=0.8, rasterized=_many(rings)))
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[], xlim=(-0.5, stains.shape[2] - 0.5), ylim=(stains.shape[1] - 0.5, -0.5))
    colours = " and ".join(f"{name} {colour}" for name, colour in zip(names, ("blue", "green"), strict=False))
    ax.set_title(f"{colours}, outlines yellow", fontsize=9, loc="left", parse_math=False)
    return figure


def histogram(values: np.ndarray, label: str, counted: str = "cells") -> Figure:
    """Draw a histogram of values up to their 99.5th percentile, with the median."""
    figure, (ax,) = new_figure(SMALL, 2.8)
    values = values[np.isfinite(values)]
    if len(values):
        low, top = float(values.min()), float(np.percentile(values, 99.5))
        n_bars = min(40, max(int(np.sqrt(len(values))), 5))
        bins: int | list[float] = n_bars
        if not np.any(values % 1):  # for counts, the same number of integers in each bar
            width = max(int(np.ceil((top - low) / n_bars)), 1)
            bins = np.arange(low - 0.5, top + width, width).tolist()
        ax.hist(values[values <= top], bins=bins, color=GENE)
        middle = float(np.median(values))
        ax.axvline(middle, color="black", linewidth=1.2)
        ax.set_title(f"median {middle:,.3g}", fontsize=9, loc="left")
    ax.set(xlabel=label, ylabel=counted)
    ax.locator_params(nbins=5)
    return figure


def correlation(x: np.ndarray, y: np.ndarray, names: Sequence[str], labels: tuple[str, str], r: float) -> Figure:
    """Plot values of genes (gene,) against others on logarithmic axes; names genes farthest from the median ratio."""
    figure, (ax,) = new_figure(NORMAL, 4.6)
    both = np.flatnonzero((x > 0) & (y > 0))
    ax.loglog(x[both], y[both], ".", color=GENE, markersize=6, alpha=0.7, rasterized=len(both) > MANY)
    if len(both):
        ratio = np.log10(y[both] / x[both])
        middle = np.median(ratio)
        ends = np.array([x[both].min(), x[both].max()])
        ax.loglog(ends, ends * 10**middle, color=MUTED, linewidth=1)
        places = np.log10(np.column_stack([x, y])[both])
        for k in both[_legible(np.argsort(-np.abs(ratio - middle)), places)]:
            ax.annotate(names[k], (x[k], y[k]), fontsize=7, xytext=(3, 3), textcoords="offset points", parse_math=False)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_title(f"r = {r:.3f} of log10, {len(both)} genes", fontsize=9, loc="left")
    return figure


def _legible(wanted: np.ndarray, places: np.ndarray) -> list[int]:
    """Return the first points in the order ``wanted`` whose names do not overlap; places: (point, 2)."""
    apart = np.ptp(places, axis=0) * NAME_SIZE
    named: list[int] = []
    for k in wanted:
        if len(named) < MOST_NAMED and not (np.abs(places[named] - places[k]) < apart).all(axis=1).any():
            named.append(int(k))
    return named


def seconds_of_steps(seconds: Mapping[str, float]) -> Figure:
    """Plot the time of each step."""
    figure, (ax,) = new_figure(WIDE, 0.26 * len(seconds) + 0.7)
    places = np.arange(len(seconds))
    ax.barh(places, list(seconds.values()), color=GENE, height=0.7)
    for place, value in zip(places, seconds.values(), strict=True):
        ax.annotate(f"{value:,.1f}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(places, list(seconds), fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel="seconds")
    return figure


def drift(shifts: pd.DataFrame) -> Figure:
    """Plot the drift of each round: each field, and the median; shifts: columns fov, round, dy, dx (pixels) and ok."""
    figure, (ax,) = new_figure(NORMAL, 3.4)
    length = np.hypot(shifts["dy"].to_numpy(float), shifts["dx"].to_numpy(float))
    failed = ~shifts["ok"].to_numpy(bool)
    ax.plot(
        shifts["round"], length, "o", color=GENE, markersize=4, alpha=0.35, markeredgewidth=0,
        rasterized=len(shifts) > MANY, label="one field",
    )  # fmt: skip
    middle = pd.Series(length).groupby(shifts["round"].to_numpy()).median()
    ax.plot(middle.index, middle, "_", color="black", markersize=14, markeredgewidth=2, label="median")
    if failed.any():
        ax.plot(shifts["round"][failed], np.nan_to_num(length[failed]), "x", color=BLANK, markersize=8, label="failed")
    ax.set(xlabel="imaging round", ylabel="drift against round 0 [px]", ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    ax.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def bit_brightness(scale: np.ndarray, background: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> Figure:
    """Plot the height of a molecule's spot in each bit, and the background (bit,), in camera counts after filtering."""
    figure, (ax,) = new_figure(NORMAL, 3.4)
    kinds = list(dict.fromkeys(colours))
    for kind in kinds:
        chosen = [k for k, colour in enumerate(colours) if colour == kind]
        label = f"{kind} nm" if kind.isdigit() else kind or "molecule"
        ax.bar(chosen, np.asarray(scale)[chosen], color=CATEGORIES[kinds.index(kind) % len(CATEGORIES)], label=label)
    ax.plot(range(len(names)), background, "_", color="black", markersize=9, label="background")
    _bits_below(ax, names)
    ax.set(ylabel="height of one molecule [counts]")
    _legend_above(ax)
    return figure


def error_rates(rates: Mapping[str, Sequence[float]]) -> Figure:
    """Plot 1->0 and 0->1 rates of each bit with intervals (see `merfish.calls.error_model.bit_error_rates`)."""
    figure, (ax,) = new_figure(NORMAL, 3.4)
    places = np.arange(len(rates["bit"]))
    for kind, label, colour, shift in (("lost", "1→0", GENE, -0.12), ("gained", "0→1", BLANK, 0.12)):
        rate, low, high = (np.array(rates[kind + end], dtype=float) for end in ("", "_low", "_high"))
        bars = np.maximum([rate - low, high - rate], 0)
        ax.errorbar(places + shift, rate, bars, fmt="o", markersize=4, color=colour, label=label)
    _bits_below(ax, [str(name) for name in rates["bit"]])
    ax.set(ylabel="error rate, 95% interval", ylim=(0, None))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend_above(ax)
    return figure


def _bits_below(ax: Axes, names: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    ax.set_xlim(-0.8, len(names) - 0.2)


def _legend_above(ax: Axes) -> None:
    """Add a legend above the axes, where it hides no data."""
    ax.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def stage(reported: np.ndarray, positions: np.ndarray, links: pd.DataFrame) -> Figure:
    """Draw reported and corrected positions of the fields (fov, 2) in micrometres, and the overlaps of the correction.

    links: columns a, b (rows of positions) and used. Arrows show the errors of the stage, enlarged.
    """
    from matplotlib.collections import LineCollection

    figure, ax = map_figure(NORMAL, np.ptp(reported, axis=0) + 1)
    ends, used = links[["a", "b"]].to_numpy(int), links["used"].to_numpy(bool)
    for which, colour, style in ((used, MUTED, "-"), (~used, BLANK, ":")):
        lines = LineCollection(list(reported[ends[which]]), colors=colour, linestyles=style, linewidths=1)
        lines.set_rasterized(len(ends) > MANY)
        ax.add_collection(lines)
    ax.plot(*reported.T, "o", color="black", markersize=3, rasterized=len(reported) > MANY)
    change = positions - reported
    longest = float(np.hypot(*change.T).max(initial=0))
    title = f"all errors are below {LEAST_OFF * 1000:g} nm"
    if longest > LEAST_OFF:
        # the longest arrow extends at most half-way to the nearest field
        enlarged = max([times for times in ENLARGED if times * longest <= _step(reported) / 2], default=1)
        off = np.hypot(*change.T) > LEAST_OFF
        ax.quiver(
            *reported[off].T, *change[off].T, color=GENE, angles="xy", scale_units="xy", scale=1 / enlarged, zorder=3,
            rasterized=len(reported) > MANY,
        )  # fmt: skip
        ax.plot(*(reported + change * enlarged).T, " ")  # extends the axes to the ends of the arrows
        title = f"arrows enlarged {enlarged} times; the longest is {longest:.2g} µm"
    ax.set_title(title, fontsize=9, loc="left")
    ax.margins(0.1)
    ax.invert_yaxis()
    return figure


def _step(places: np.ndarray) -> float:
    """Return the distance between the two nearest fields, in micrometres."""
    from scipy.spatial import KDTree

    different = np.unique(places, axis=0)
    return float(KDTree(different).query(different, k=2)[0][:, 1].min()) if len(different) > 1 else 1.0


def words_called(found: np.ndarray, kept: np.ndarray, names: Sequence[str], is_blank: np.ndarray) -> Figure:
    """Plot molecules of each word (word,) found and kept, most abundant word first, blanks in red.

    Bars of molecules that were found but not kept are pale.
    """
    figure, (ax,) = new_figure(WIDE, 3.4)
    order = np.lexsort((-found, -kept))
    places, blank = np.arange(len(order)), is_blank[order]
    for which, colour, label in ((~blank, GENE, "genes"), (blank, BLANK, "blanks")):
        ax.bar(places[which], found[order][which], color=colour, width=0.85, alpha=0.25)
        ax.bar(places[which], kept[order][which], color=colour, width=0.85, label=label)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="words, most abundant first; pale: found, but not kept", ylabel="molecules", xticks=[])
    ax.set_xlim(-1, len(names))
    if len(names) <= 80:
        ax.set_xticks(places, [names[k] for k in order], rotation=90, fontsize=7, parse_math=False)
    _legend_above(ax)
    return figure
