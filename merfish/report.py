"""The page a person looks at after a run: one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from merfish import plots, results
from merfish._files import whole_file
from merfish.calls.filtering import few_blanks
from merfish.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OVERVIEW = "overview.npy"  # of each field
MOST_LINES, MOST_ROWS = 5, 100  # of unusual images, on a console and on the page
WIDE_INCHES = 8.0
FEWEST_CELLS_DRAWN = 10  # fewer lie too far apart to be seen on one picture
MOST_CELLS_DRAWN = 50_000  # more are smaller than the pixels of a picture


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


def write_run_report(out: Path, stage: Path | None = None) -> Path:
    """Write ``report.html`` of a run from its results. Raises InputError if the folder holds no finished run.

    stage: where the results and the report stand, ``out`` when not given.
    """
    stage = stage or out
    run = results.read_run(stage)
    figures = run["figures"]
    lead = f"{figures['n_fields']} fields, {figures['n_kept']:,} molecules, merfish {run['versions']['merfish']}"
    title = f"MERFISH run of {run['inputs']['folder']}"
    return write_report(stage / results.REPORT, title, lead, run_sections(out, stage))


def run_sections(out: Path, stage: Path | None = None) -> list[Section]:
    """What the page of a run says: molecules, quality of the images, cells; arguments as of `write_run_report`."""
    stage = stage or out
    run = results.read_run(stage)
    bits = run["bits"]
    shifts = pd.DataFrame([{"fov": int(fov), **row} for fov, f in run["fields"].items() for row in f["drift"]])
    brightness = plots.bit_brightness(
        np.array(bits["scale"]), np.array(bits["background"]), bits["names"], bits["colors"]
    )
    sections = [
        Section("Molecules", _molecule_text(run), figures=_molecule_pictures(out, stage, run)),
        Section(
            "Images",
            [_drift_text(shifts), *bit_warnings(run), *stain_lines(run["fields"])],
            tables=[
                *_quality_table(run["quality"]),
                *_chromatic_table(run["chromatic"]),
                *_light_table(run["light"]),
            ],
            figures=[
                *([picture(plots.drift(shifts), "Drift of each round")] if len(shifts) else []),
                picture(brightness, "Brightness of a molecule in each bit"),
                picture(plots.error_rates(run["bit_error_rates"]), "How often a bit is lost or gained, from the calls"),
            ],
        ),
    ]
    if run["stage"]["links"]["a"] or run["stage"]["untied"]:
        sections.append(_stage_section(run["stage"]))
    if run["failed"]:
        rows = [(fov, reason) for fov, reason in run["failed"].items()]
        sections.append(Section("Fields that failed", tables=[Table(("field", "reason"), rows)]))
    return sections + _cell_section(stage, run["figures"])


def _cell_section(stage: Path, figures: dict[str, Any]) -> list[Section]:
    from merfish.cells.counts import read_cells

    if not figures["n_cells"]:
        return []
    text = f"{figures['n_cells']:,} cells, {figures['transcripts_per_cell']:.1f} molecules a cell in the median; "
    text += f"{figures['share_in_cells']:.0%} of the molecules lie in cells."
    drawn = FEWEST_CELLS_DRAWN <= figures["n_cells"] <= MOST_CELLS_DRAWN
    cells = read_cells(stage / results.CELLS) if drawn else None
    outlines = [] if cells is None else [picture(plots.cells(cells["geometry"].to_numpy()), "Cell outlines")]
    return [Section("Cells", [text], figures=outlines)]


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


def quality_lines(quality: dict[str, list[Any]]) -> list[str]:
    """Fields whose images are unlike those of others, a line each, the first of them."""
    rows: dict[int, list[str]] = {}
    for fov, bit, reasons in zip(*(quality.get(name, []) for name in ("fov", "bit", "reasons")), strict=True):
        rows.setdefault(fov, []).append(f"{bit} {reasons}")
    lines = [f"field {fov}: {'; '.join(found)}" for fov, found in rows.items()]
    more = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"{more} more fields have unusual images, see the report"] if more > 0 else [])


def stain_lines(fields: dict[str, dict[str, Any]]) -> list[str]:
    """Stains that could not be aligned with the bits: why, and in which fields."""
    found: dict[str, list[str]] = {}
    for fov, said in fields.items():
        for name, reason in said.get("stains_not_aligned", {}).items():
            found.setdefault(f"stain {name} is not aligned with the bits: {reason}", []).append(fov)
    more = {text: ", ..." if len(fovs) > MOST_LINES else "" for text, fovs in found.items()}
    return [f"{text} (fields {', '.join(fovs[:MOST_LINES])}{more[text]})" for text, fovs in found.items()]


def _quality_table(quality: dict[str, list[Any]]) -> list[Table]:
    columns = ("fov", "round", "bit", "reasons")
    rows = list(zip(*(quality.get(name, []) for name in columns), strict=True))[:MOST_ROWS]
    return [Table(("field", "round", "bit", "what is unusual about its images"), rows)] if rows else []


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
            "unknown" if fit["shift"] is None else f"{fit['shift']:.2f} px",
            f"{fit['pairs']:,.0f}",
            "unknown" if fit["error"] is None else f"{fit['error']:.3f} px",
            "yes" if fit["map"] != np.eye(2, 3).tolist() else "no: it does not help",
        )
        for color, fit in fits.items()
    ]
    columns = ("colour", "largest chromatic shift", "pairs of spots", "error of the map, rms", "corrected")
    return [Table(columns, rows)] if rows else []


def _molecule_text(run: dict[str, Any]) -> list[str]:
    figures, notice = run["figures"], run["calibration"]["notice"]
    rate = figures["misidentification_rate"]
    known = "How many of them are wrong is not known."
    if rate is not None:
        known = f"{rate:.1%} of them are expected to be wrong"
        known += ", by the blanks" if figures["blanks_in_book"] else ""
        known += _interval(" (by the kept blanks alone {})", figures["by_blanks"])
        known += _interval("; where the filter was not fitted, {}", figures["held_out"]) + "."
        if few := few_blanks(figures["n_found_blank"], figures["blanks_in_book"]):
            known += f" But {few}."
    return [
        *([f"Warning: {notice}."] if notice else []),
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


def _molecule_pictures(out: Path, stage: Path, run: dict[str, Any]) -> list[Picture]:
    words = run["words"]
    called = plots.words_called(
        np.array(words["n_found"]), np.array(words["n_kept"]), words["gene"], np.array(run["codebook"]["is_blank"])
    )
    pictures = [picture(called, "Molecules of each word; blanks carry no RNA, so what they collect is error")]
    if run["fields"]:
        fov = max((int(f) for f in run["fields"]), key=lambda f: int(run["fields"][str(f)]["n_found"]))
        path = results.field_folder(out, fov) / OVERVIEW
        calls = pd.read_parquet(stage / results.TRANSCRIPTS, filters=[("fov", "==", fov)])
        if path.is_file():
            pictures.insert(0, picture(plots.overview(read_overview(path), calls), f"Field {fov}"))
    return pictures


def read_overview(path: Path) -> np.ndarray:
    """The overview picture of a field, uint8 (y, x). Raises InputError if it is damaged."""
    try:
        image: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); run again into the same folder") from error
    return image
