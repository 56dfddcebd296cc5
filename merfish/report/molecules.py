"""Sections on molecules and genes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from merfish import plots, results
from merfish._parquet import between
from merfish.report import figures
from merfish.report.page import Picture, Section, Table, picture
from merfish.report.run import OVERVIEW, Run, read_overview


def molecule_section(run: Run) -> Section:
    """Return the number of molecules, their misidentification rate, and maps of them."""
    density, squares = run.molecules.density, run.molecules.squares
    shown = []
    if density.any():
        rows, columns = np.nonzero(density)
        numbers = pd.DataFrame(
            {
                "x": squares.corner[0] + (columns + 0.5) * squares.side,
                "y": squares.corner[1] + (rows + 0.5) * squares.side,
                "molecules": density[rows, columns],
            }
        )
        figure = figures.density_map(density, squares)
        shown.append(picture("density", figure, "Molecules of genes on the stage", numbers, "small"))
    shown += _overview_picture(run)
    return Section("Molecules", _molecule_text(run.record), figures=shown)


def _molecule_text(record: dict[str, Any]) -> list[str]:
    figure = record["figures"]
    known = "Their misidentification rate is unknown."
    if figure["misidentification_rate"] is not None:
        known = f"{figure['misidentification_rate']:.1%} of them are expected to be wrong"
        known += ", as estimated from the blanks" if figure["blanks_in_book"] else ""
        known += _interval(" (from the kept blanks alone, {})", figure["by_blanks"])
        known += _interval("; on fields that were not used to fit the filter, {}", figure["held_out"]) + "."
    return [
        f"{figure['n_found']:,} molecules found, {figure['n_kept']:,} kept ({figure['n_blank']:,} of them blanks). "
        + known,
        f"{figure['n_duplicates']:,} molecules were seen in two overlapping fields and counted once.",
    ]


def _interval(text: str, value: dict[str, float] | None) -> str:
    return text.format("{rate:.1%}, 95% interval {low:.1%} to {high:.1%}".format(**value)) if value else ""


def _overview_picture(run: Run) -> list[Picture]:
    """Draw the field with the most molecules, and a detail of it.

    Molecules that were counted in an overlapping field are drawn as well.
    """
    if not len(run.fovs):
        return []
    row = int(np.argmax(run.fields["kept"]))
    fov, scale = int(run.fovs[row]), run.record["microns_per_pixel"]
    path = results.field_folder(run.out, fov) / OVERVIEW
    if not path.is_file():
        return []
    low, high = run.places[row], run.places[row] + run.size
    columns = ["gene", "is_blank", "global_x", "global_y"]
    calls = between(run.stage / results.TRANSCRIPTS, columns, "global", low, high)
    calls = calls.assign(x=(calls["global_x"] - low[0]) / scale, y=(calls["global_y"] - low[1]) / scale)
    image, numbers = read_overview(path), calls[["gene", "is_blank", "x", "y"]]
    square = plots.densest_square(calls, image.shape)
    caption = f"Field {fov}, which has the most molecules: brightest bit of each pixel, and kept molecules"
    return [
        picture("field", figures.field_image(image, calls, square), caption, numbers, "small"),
        picture("detail", figures.field_detail(image, calls, square), "The yellow square in that field", None, "small"),
    ]


def gene_section(run: Run) -> Section:
    """Return the molecules of each word, and their reliability."""
    words, is_blank = pd.DataFrame(run.record["words"]), run.is_blank
    figure = figures.words_called(
        words["n_found"].to_numpy(int), words["n_kept"].to_numpy(int), words["gene"].to_list(), is_blank
    )
    words = words.assign(is_blank=is_blank)
    caption = "Molecules of each word; blanks encode no RNA, so their molecules are errors"
    shown = picture("words", figure, caption, words, "wide")
    order = words.sort_values(["is_blank", "n_kept"], ascending=[True, False], kind="stable")
    names = {
        "gene": "gene",
        "n_found": "found",
        "n_kept": "kept",
        "misidentification_rate": "wrong",
        "confidence_ratio": "exact",
        "detection_efficiency": "detected",
    }
    rows = [
        (f"{row['gene']}{' (blank)' if row['is_blank'] else ''}", *(row[name] for name in list(names)[1:]))
        for row in order.to_dict("records")
    ]
    formats = {"found": "{:,}", "kept": "{:,}", "wrong": "{:.1%}", "exact": "{:.0%}", "detected": "{:.0%}"}
    text = [
        "Wrong: expected share of misidentified molecules among those kept. Exact: share of the kept molecules "
        "without bit errors. Detected: share of the molecules of this word that are found and kept. "
        + detected_text(run.record["figures"]),
    ]
    if not is_blank.all() and is_blank.any():
        top = int(words["n_kept"][is_blank].max())
        above = int((words["n_kept"][~is_blank] > top).sum())
        text.append(
            f"{above} of {int((~is_blank).sum())} genes have more molecules than the most abundant blank, {top:,}."
        )
    return Section("Genes", text, [Table(tuple(names.values()), rows, formats, sortable=True)], [shown])


def detected_text(figure: dict[str, Any]) -> str:
    """Describe how the detection efficiency of the words was measured."""
    by_errors = "Differences between words are computed from the error rates of their bits"
    spiked = figure.get("spike_in")
    if spiked is None:
        return f"{by_errors}, and so does their level, which is too high where spots overlap."
    return (
        f"{by_errors}; their level was measured: {figure['n_spikes']:,} molecules were added to the images of some "
        f"fields, which were decoded again, and {spiked['rate']:.1%} of them were found and kept"
        + " (95% interval {low:.1%} to {high:.1%}).".format(**spiked)
    )
