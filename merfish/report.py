"""The page a person looks at after a run: one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from merfish import plots, runfolder
from merfish._files import whole_file
from merfish.calls.filtering import few_blanks
from merfish.errors import InputError
from merfish.transcripts import read_transcripts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WIDE_INCHES = 8.0
FEWEST_CELLS_DRAWN = 10  # fewer lie too far apart to be seen on one picture


@dataclass(frozen=True)
class Picture:
    """A figure as PNG in base64, with its caption; a wide one has a row to itself."""

    png: str
    caption: str
    wide: bool


@dataclass(frozen=True)
class Table:
    """Column names and rows of values, printed as they are."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures below it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = field(default=())


def picture(figure: Figure, caption: str) -> Picture:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    wide = figure.get_figwidth() > WIDE_INCHES
    return Picture(base64.b64encode(buffer.getvalue()).decode("ascii"), caption, wide)


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("merfish"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def write_run_report(out: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a run from its results. Raises InputError if the folder holds no finished run."""
    out = Path(out)
    run = read_run(out)
    figures = run["figures"]
    lead = f"{figures['n_fields']} fields, {figures['n_kept']:,} molecules, merfish {run['versions']['merfish']}"
    return write_report(out / runfolder.REPORT, f"MERFISH run of {run['inputs']['folder']}", lead, run_sections(out))


def read_run(out: Path) -> dict[str, Any]:
    """The record of a finished run. Raises InputError if there is none."""
    record: dict[str, Any] = runfolder.read_json(out / runfolder.RUN)
    if "figures" not in record or "fields" not in record:
        raise InputError(f"{out / runfolder.RUN}: not the record of a whole run")
    return record


def run_sections(out: Path) -> list[Section]:
    """What the page of a run says: molecules, quality of the images, cells."""
    from merfish.cells.counts import read_cells

    run = read_run(out)
    figures = run["figures"]
    calls = read_transcripts(out / runfolder.TRANSCRIPTS)
    bits = run["bits"]
    shifts = pd.DataFrame([{"fov": int(fov), **row} for fov, f in run["fields"].items() for row in f["drift"]])
    sections = [
        Section("Molecules", _molecule_text(figures), figures=_molecule_pictures(out, run, calls)),
        Section(
            "Images",
            [_drift_text(shifts), *bit_warnings(run)],
            tables=[*_chromatic_table(run["chromatic"]), *_light_table(run["light"])],
            figures=[
                *([picture(plots.drift(shifts), "Drift of each round")] if len(shifts) else []),
                picture(
                    plots.bit_brightness(
                        np.array(bits["scale"]), np.array(bits["background"]), bits["names"], bits["colors"]
                    ),
                    "Brightness of a molecule in each bit",
                ),
                picture(plots.error_rates(run["bit_error_rates"]), "How often a bit is lost or gained, from the calls"),
            ],
        ),
    ]
    if run["stage"]["links"]["a"] or run["stage"]["untied"]:
        sections.append(_stage_section(run["stage"]))
    if run["failed"]:
        rows = [(fov, reason) for fov, reason in run["failed"].items()]
        sections.append(Section("Fields that failed", tables=[Table(("field", "reason"), rows)]))
    cells = read_cells(out / runfolder.CELLS)
    if len(cells):
        text = f"{len(cells):,} cells, {figures['transcripts_per_cell']:.1f} molecules a cell in the median; "
        text += f"{figures['share_in_cells']:.0%} of the molecules lie in cells."
        drawn = len(cells) >= FEWEST_CELLS_DRAWN
        outlines = [picture(plots.cells(cells["geometry"].to_numpy()), "Cell outlines")] if drawn else []
        sections.append(Section("Cells", [text], figures=outlines))
    return sections


def _drift_text(shifts: pd.DataFrame) -> str:
    if len(shifts):
        return "Each round's drift was measured on the bead images against round 0 and taken out in one resampling."
    return "The stacks were registered already."


def bit_warnings(run: dict[str, Any]) -> list[str]:
    """What is wrong with single bits of a run: those that show nothing, those whose pixels saturate."""
    names, said = run["bits"]["names"], []
    dead = [name for name, scale in zip(names, run["bits"]["scale"], strict=True) if scale == 0]
    if dead and len(dead) < len(names):
        said.append(f"No molecule shows in {', '.join(dead)}: dead, and left out of decoding.")
    counts = [np.array(found["saturated"]) for found in run["fields"].values()]
    total = np.sum(counts, axis=0) if counts else np.zeros(len(names), int)
    if total.any():
        worst = max(run["fields"], key=lambda fov: sum(run["fields"][fov]["saturated"]))
        each = ", ".join(f"{name} {count:,}" for name, count in zip(names, total.tolist(), strict=True) if count)
        said.append(f"Saturated pixels, most of them in field {worst}: {each}.")
    return said


def _light_table(light: dict[str, dict[str, float]]) -> list[Table]:
    rows = [
        (color, f"{found['least']:.0%}", f"{found['dark']:.0f}" if found["dark"] else "not needed", found["hot"])
        for color, found in light.items()
    ]
    columns = ("colour", "light where it is least", "dark level, counts", "hot pixels")
    return [Table(columns, rows)] if rows else []


def _chromatic_table(fits: dict[str, dict[str, Any]]) -> list[Table]:
    rows = [
        (
            color,
            f"{fit['shift']:.2f} px",
            f"{fit['pairs']:,.0f}",
            "unknown" if np.isnan(fit["error"]) else f"{fit['error']:.3f} px",
            "yes" if fit["map"] != np.eye(2, 3).tolist() else "no: it does not help",
        )
        for color, fit in fits.items()
    ]
    columns = ("colour", "largest chromatic shift", "pairs of spots", "error of the map, rms", "corrected")
    return [Table(columns, rows)] if rows else []


def _molecule_text(figures: dict[str, Any]) -> list[str]:
    rate = figures["misidentification_rate"]
    known = "How many of them are wrong is not known."
    if rate is not None:
        known = f"{rate:.1%} of them are expected to be wrong, by the blanks"
        known += _interval(" (by the kept blanks alone {})", figures["by_blanks"])
        known += _interval("; where the filter was not fitted, {}", figures["held_out"]) + "."
        if few := few_blanks(figures["n_found_blank"]):
            known += f" But {few}."
    return [
        f"{figures['n_found']:,} molecules found, {figures['n_kept']:,} kept ({figures['n_blank']:,} of them blanks). "
        + known,
        f"{figures['n_duplicates']:,} seen in two overlapping fields were counted once.",
        *(f"Codebook: {warning}." for warning in figures["warnings"]),
    ]


def untied_text(stage: dict[str, Any]) -> str:
    """What to say of a run in which half of the fields that should share molecules do not; empty if more do."""
    used, untied = sum(stage["links"]["used"]), stage["untied"]
    if untied < max(used, 1):
        return ""
    # an image mirrored along x still fits its neighbours along y
    return (
        f"In {untied} of {used + untied} overlaps of neighbouring fields the two share no molecule: look at the "
        "positions, and at transpose, flip_horizontal and flip_vertical of the microscope file."
    )


def _stage_section(stage: dict[str, Any]) -> Section:
    links = pd.DataFrame(stage["links"])
    said, positions = np.array(stage["said"]), np.array(stage["positions"])
    used = int(links["used"].sum())
    text = f"{used} overlaps of neighbouring fields show the same molecules in both."
    if used:
        left = max(links.loc[links["used"], "residual"].max(), 0.001)
        text += (
            f" They tell that the stage stops {stage['stage_error']:.2f} µm (rms, along each axis) from where it says; "
            f"the corrected positions, in which all places are given, agree with every overlap to {left:.3f} µm."
        )
    if used < len(links):
        text += f" {len(links) - used} overlaps contradict the others and were left out (red)."
    text = f"{text} {untied_text(stage)}".strip()
    caption = "How far the stage was off (arrows, enlarged), and which fields share molecules (lines)"
    return Section("Stage", [text], figures=[picture(plots.stage(said, positions, links), caption)])


def _interval(text: str, value: dict[str, float] | None) -> str:
    return text.format("{rate:.1%}, 95 % interval {low:.1%} to {high:.1%}".format(**value)) if value else ""


def _molecule_pictures(out: Path, run: dict[str, Any], calls: pd.DataFrame) -> list[Picture]:
    book = run["codebook"]
    found = read_transcripts(out / runfolder.ALL_TRANSCRIPTS)
    pictures = [
        picture(
            plots.words_called(found, calls, book["names"], np.array(book["is_blank"])),
            "Molecules of each word; blanks carry no RNA, so what they collect is error",
        )
    ]
    if run["fields"]:
        fov = max((int(f) for f in run["fields"]), key=lambda f: int((calls["fov"] == f).sum()))
        image = np.load(runfolder.field_folder(out, fov) / "overview.npy", allow_pickle=False)
        pictures.insert(0, picture(plots.overview(image, calls[calls["fov"] == fov]), f"Field {fov}"))
    return pictures
