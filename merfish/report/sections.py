"""What the page of a run says, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from merfish import plots, results
from merfish._files import plain
from merfish._parquet import between, parts
from merfish.calls.filtering import few_blanks
from merfish.errors import InputError
from merfish.report import figures
from merfish.report.domains import domain_section
from merfish.report.findings import findings, overall
from merfish.report.notices import bit_warnings, quality_lines, stain_lines, untied_text
from merfish.report.page import Picture, Section, Table, picture, write_report
from merfish.report.summary import (
    Molecules,
    field_table,
    genes_of_cells,
    log_correlation,
    read_bulk,
    sum_cells,
    sum_molecules,
)

OVERVIEW, STAINS = "overview.npy", "stains.npz"  # of each field
FEWEST_CELLS_DRAWN = 10  # fewer lie too far apart to be seen on one picture
MOST_CELLS_DRAWN = 10_000  # by their outlines; more are as small as the pixels of a picture
VERDICTS = {
    "pass": "Every figure that has a threshold passes.",
    "warn": "Some figures need a look.",
    "fail": "Some figures fail.",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, where its results stand (elsewhere before they are published), its record."""

    out: Path
    stage: Path
    record: dict[str, Any]

    @property
    def is_blank(self) -> np.ndarray:
        """(word,) bool."""
        return np.array(self.record["codebook"]["is_blank"], bool)

    @cached_property
    def fovs(self) -> np.ndarray:
        """Fields with results, ascending."""
        return np.sort(np.array([int(fov) for fov in self.record["fields"]], int))

    @property
    def places(self) -> np.ndarray:
        """Corrected positions (field, 2) of the fields with results, x, y in micrometre."""
        return np.array(self.record["stage"]["positions"], float).reshape(-1, 2)[self.fovs]

    @property
    def size(self) -> tuple[float, float]:
        """(x, y) of a field, micrometre."""
        height, width = next((field["shape"] for field in self.record["fields"].values()), (1, 1))
        return width * self.record["microns_per_pixel"], height * self.record["microns_per_pixel"]

    @property
    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last corner (x, y) of the section, micrometre."""
        places = self.places if len(self.fovs) else np.zeros((1, 2))
        return places.min(axis=0), places.max(axis=0) + self.size

    @cached_property
    def molecules(self) -> Molecules:
        """Sums over the kept molecules."""
        return sum_molecules(self.stage / results.TRANSCRIPTS, self.fovs, self.is_blank, *self.corners)

    @cached_property
    def fields(self) -> pd.DataFrame:
        """See `field_table`."""
        return field_table(self.record, self.molecules)


def write_run_report(
    out: Path, stage: Path | None = None, *, bulk: Path | None = None, replicate: Path | None = None
) -> Path:
    """Write ``report.html`` and ``report/`` of a run from its results.

    stage: where the results stand and the report goes, ``out`` when not given. bulk: CSV file of bulk RNA-seq, gene and
    value; replicate: folder of another run of the same codebook, both to be compared with. Raises InputError if a
    folder holds no finished run, or for a faulty table.
    """
    stage = stage or out
    run = Run(out, stage, read_record(stage))
    others = {}
    if bulk is not None:
        others["bulk RNA-seq"] = read_bulk(bulk)
    if replicate is not None:
        other = read_record(replicate)["words"]
        others["the other run"] = pd.Series(other["n_kept"], index=other["gene"], dtype=float)
    made = run.record["figures"]
    lead = (
        f"{made['n_fields']:,} fields, {made['n_kept']:,} molecules, {made['n_cells']:,} cells, "
        f"merfish {run.record['versions']['merfish']}"
    )
    title = f"MERFISH run of {Path(run.record['inputs']['folder']).name}"
    return write_report(stage / results.REPORT, title, lead, sections_of(run, others))


def run_sections(out: Path) -> list[Section]:
    """What the page of a finished run says."""
    return sections_of(Run(out, out, read_record(out)), {})


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run. Raises InputError if there is none, or if it lacks what the page needs."""
    record = results.read_run(folder)
    if "microns_per_pixel" not in record:
        raise InputError(f"{folder / results.RUN}: made by an older version; run again into the same folder")
    return record


def sections_of(run: Run, others: dict[str, pd.Series]) -> list[Section]:
    """All sections; others: values by gene to compare the counts of genes with, by what they are."""
    made = [
        headline(run, others),
        molecule_section(run),
        gene_section(run),
        bit_section(run),
        field_section(run),
        cell_section(run),
        embedding_section(run),
        agreement_section(run, others),
        image_section(run),
        failed_section(run.record["failed"]),
        how_section(run),
    ]
    return [section for section in made if section is not None]


# --- what decides -------------------------------------------------------------------------------------------------


def headline(run: Run, others: dict[str, pd.Series]) -> Section:
    """Verdicts, and what to look at."""
    record = run.record
    bulk = others.get("bulk RNA-seq")
    compared = None if bulk is None else log_correlation(*_paired(run, bulk)[:2])
    found = findings(record, log_correlation(*_halves(run)), compared)
    notice = record["calibration"]["notice"]
    figure = record["figures"]
    text = [
        VERDICTS[overall(found)],
        *([f"Warning: {notice}."] if notice else []),
        *bit_warnings(record),
        *quality_lines(record["quality"]),
        *stain_lines(record["fields"]),
        *(f"Codebook: {warning}." for warning in figure["warnings"]),
    ]
    if (few := few_blanks(figure["n_found_blank"], figure["blanks_in_book"])) and figure["n_kept"]:
        text.append(f"{few[0].upper()}{few[1:]}.")
    return Section("Is this run good?", text, findings=found)


def _halves(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Counts of genes in every other field, and in those between."""
    counts = run.molecules.counts[:, ~run.is_blank]
    return counts[0::2].sum(axis=0), counts[1::2].sum(axis=0)


def _paired(run: Run, other: pd.Series) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Counts of genes, values of others for the same genes, and their names. Raises InputError if none is in both."""
    words = pd.Series(run.record["words"]["n_kept"], index=run.record["words"]["gene"], dtype=float)[~run.is_blank]
    shared = [gene for gene in words.index if gene in other.index]
    if not shared:
        raise InputError(
            f"no gene of the run, as {words.index[0]}, is in the other table, as {other.index[:1].tolist()}"
        )
    return words[shared].to_numpy(), other[shared].to_numpy(), shared


# --- molecules and genes ------------------------------------------------------------------------------------------


def molecule_section(run: Run) -> Section:
    """How many molecules, where, and how sure."""
    molecules = run.molecules
    shown = []
    if molecules.density.any():
        rows, columns = np.nonzero(molecules.density)
        numbers = pd.DataFrame(
            {
                "x": molecules.corner[0] + (columns + 0.5) * molecules.bin,
                "y": molecules.corner[1] + (rows + 0.5) * molecules.bin,
                "molecules": molecules.density[rows, columns],
            }
        )
        figure = figures.density_map(molecules.density, molecules.corner, molecules.bin)
        shown.append(picture("density", figure, "Molecules of genes on the stage", numbers, "small"))
    shown += _overview_picture(run)
    return Section("Molecules", _molecule_text(run.record), figures=shown)


def _molecule_text(record: dict[str, Any]) -> list[str]:
    figure = record["figures"]
    known = "How many of them are wrong is not known."
    if figure["misidentification_rate"] is not None:
        known = f"{figure['misidentification_rate']:.1%} of them are expected to be wrong"
        known += ", by the blanks" if figure["blanks_in_book"] else ""
        known += _interval(" (by the kept blanks alone {})", figure["by_blanks"])
        known += _interval("; where the filter was not fitted, {}", figure["held_out"]) + "."
    return [
        f"{figure['n_found']:,} molecules found, {figure['n_kept']:,} kept ({figure['n_blank']:,} of them blanks). "
        + known,
        f"{figure['n_duplicates']:,} seen in two overlapping fields were counted once.",
    ]


def _interval(text: str, value: dict[str, float] | None) -> str:
    return text.format("{rate:.1%}, 95% interval {low:.1%} to {high:.1%}".format(**value)) if value else ""


def _overview_picture(run: Run) -> list[Picture]:
    """The field with most molecules, with all of them, also those that an overlapping field shows better."""
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
    caption = f"Field {fov}, the one with most molecules: its brightest bits and the molecules kept there"
    return [
        picture("field", figures.field_image(image, calls, square), caption, numbers, "small"),
        picture("detail", figures.field_detail(image, calls, square), "The yellow square of that field", None, "small"),
    ]


def read_overview(path: Path) -> np.ndarray:
    """The overview picture of a field, uint8 (y, x), read where it is used. Raises InputError if it is damaged."""
    try:
        image: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); run again into the same folder") from error
    return image


def gene_section(run: Run) -> Section:
    """Each word: how often it was found and kept, how surely."""
    words, is_blank = pd.DataFrame(run.record["words"]), run.is_blank
    figure = figures.words_called(
        words["n_found"].to_numpy(int), words["n_kept"].to_numpy(int), words["gene"].to_list(), is_blank
    )
    shown = picture(
        "words",
        figure,
        "Molecules of each word; blanks carry no RNA, so what they collect is error",
        words.assign(is_blank=is_blank),
        "wide",
    )
    order = words.assign(is_blank=is_blank).sort_values(["is_blank", "n_kept"], ascending=[True, False], kind="stable")
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
        "Wrong: expected share of the kept that are another molecule or none. Exact: share of the kept that show their "
        "word without an error. Detected: share of the molecules of this word that are found and kept. "
        + _detected_text(run.record["figures"]),
    ]
    if not is_blank.all() and is_blank.any():
        top = int(words["n_kept"][is_blank].max())
        above = int((words["n_kept"][~is_blank] > top).sum())
        text.append(
            f"{above} of {int((~is_blank).sum())} genes have more molecules than the most abundant blank, {top:,}."
        )
    return Section("Genes", text, [Table(tuple(names.values()), rows, formats, sortable=True)], [shown])


def _detected_text(figure: dict[str, Any]) -> str:
    """How the detection efficiency of the words was measured."""
    by_errors = "The differences between words follow from the error rates of their bits"
    spiked = figure.get("spike_in")
    if spiked is None:
        return f"{by_errors}, and so does their level, which is too high where spots overlap."
    return (
        f"{by_errors}; their level was measured: {figure['n_spikes']:,} molecules were added to the images of some "
        f"fields, which were decoded again, and {spiked['rate']:.1%} of them were found and kept"
        + " (95% interval {low:.1%} to {high:.1%}).".format(**spiked)
    )


# --- bits and fields ----------------------------------------------------------------------------------------------


def bit_section(run: Run) -> Section:
    """Brightness and error rates of the bits."""
    bits, rates = run.record["bits"], pd.DataFrame(run.record["bit_error_rates"])
    table = pd.DataFrame({"bit": bits["names"], "colour": bits["colors"], "molecule": bits["scale"]})
    for name in ("spots", "background", "noise", "width"):
        table[name] = _median_of_bits(run.record["fields"], name, len(table))
    with np.errstate(invalid="ignore", divide="ignore"):
        table["molecule / noise"] = table["molecule"] / table["noise"].replace(0, np.nan)
    table["saturated"] = np.sum([f["saturated"] for f in run.record["fields"].values()] or [[0] * len(table)], axis=0)
    table["lost"], table["gained"] = rates["lost"].astype(float), rates["gained"].astype(float)
    formats = {
        "molecule": "{:.0f}", "spots": "{:.0f}", "background": "{:.0f}", "noise": "{:.1f}", "width": "{:.2f}",
        "molecule / noise": "{:.0f}", "saturated": "{:,}", "lost": "{:.1%}", "gained": "{:.1%}",
    }  # fmt: skip
    brightness = figures.bit_brightness(
        np.array(bits["scale"], float), np.array(bits["background"], float), bits["names"], bits["colors"]
    )
    shown = [
        picture("brightness", brightness, "Height of a molecule in each bit", table[["bit", "colour", "molecule"]]),
        picture(
            "error_rates",
            figures.error_rates(rates.to_dict("list")),  # type: ignore[arg-type]
            "How often a bit is lost or gained, from the calls",
            rates,
        ),
    ]
    text = [
        "Molecule: height of one after filtering, camera counts. Spots, background, noise (camera counts) and width of "
        "the spots (sigma after filtering, pixels; larger out of focus): median of the fields. Saturated: pixels of "
        "all fields. Lost and gained: errors 1→0 and 0→1."
    ]
    return Section("Bits", text, [_table(table, formats, "bits")], shown)


def _median_of_bits(fields: Mapping[str, Any], name: str, n_bits: int) -> np.ndarray:
    values = [np.array(field["quality"][name], float) for field in fields.values() if name in field["quality"]]
    if not values:
        return np.full(n_bits, np.nan)
    return pd.DataFrame(np.array(values)).median().to_numpy()


def field_section(run: Run) -> Section | None:
    """A table of the fields, and maps of its columns on the stage."""
    if not len(run.fovs):
        return None
    table, places = run.fields, run.places
    corners = np.array(run.record["stage"]["positions"], float).reshape(-1, 2)
    failed = corners[sorted(int(fov) for fov in run.record["failed"])]
    maps = (
        ("kept", "Molecules kept", "molecules"),
        ("blanks", "Share of blanks among the kept", "share of blanks"),
        ("in cells", "Share of molecules in cells", "share in cells"),
        ("r", "Counts of genes against all other fields", "r of log10 counts"),
        ("drift", "Largest drift of a round", "drift [px]"),
        ("spot width", "Width of spots: focus", "sigma [px]"),
        ("saturated", "Saturated pixels of all bits", "pixels"),
        ("seconds", "Time to decode and segment", "seconds"),
    )
    shown: list[Picture] = []
    alike: list[str] = []
    for name, caption, label in maps:
        values = table[name].to_numpy(float)
        known = values[np.isfinite(values)]
        if len(known) and not np.ptp(known):
            alike.append(f"{caption}: {known[0]:,.4g} in every field.")
        elif len(known):
            figure = figures.field_map(places, run.size, values, failed, label)
            numbers = pd.DataFrame({"field": run.fovs, "x": places[:, 0], "y": places[:, 1], name: values})
            shown.append(picture(f"map_{name.replace(' ', '_')}", figure, caption, numbers, "small"))
    formats = {
        "found": "{:,}", "kept": "{:,}", "blanks": "{:.1%}", "in cells": "{:.0%}", "drift": "{:.1f}",
        "spot width": "{:.2f}", "saturated": "{:,}", "r": "{:.2f}", "seconds": "{:.1f}",
    }  # fmt: skip
    text = [
        "Blanks and in cells: shares of the kept. Drift: largest of all rounds, pixels. Spot width: sigma after "
        "filtering, pixels, larger out of focus. Saturated: pixels of all bits. r: log10 counts of genes against those "
        "of all other fields. Crosses on the maps: fields that failed.",
        *([" ".join(alike)] if alike else []),
    ]
    return Section("Fields", text, [_table(table, formats, "fields")], shown)


def _table(table: pd.DataFrame, formats: dict[str, str], name: str) -> Table:
    rows = [tuple(plain(value) for value in row) for row in table.itertuples(index=False)]
    return Table(tuple(table.columns), rows, formats, name, sortable=True)


# --- cells --------------------------------------------------------------------------------------------------------


def cell_section(run: Run) -> Section | None:
    """Cells: how many, how large, how full."""
    made = run.record["figures"]
    if not made["n_cells"]:
        return None
    path = run.stage / results.CELLS
    cells = sum_cells(path, genes_of_cells(run.stage / results.CELL_BY_GENE), *run.corners)
    text = [
        f"{made['n_cells']:,} cells, {made['transcripts_per_cell']:,.0f} molecules per cell (median); "
        f"{made['share_in_cells']:.0%} of the molecules lie in cells. "
        f"{int((cells.n_molecules == 0).sum()):,} cells are empty."
    ]
    shown = []
    if made["n_cells"] >= FEWEST_CELLS_DRAWN:
        outlines = _outlines(path, made["n_cells"])
        if outlines is None:
            caption = "Cells by their molecules, mean of those in a square"
            figure = figures.square_map(cells.full, cells.corner, cells.bin, "molecules", "viridis", figures.NORMAL)
        else:
            caption = "Cells by their molecules"
            figure = figures.cell_map(outlines, cells.n_molecules, "molecules")
        shown = [picture("cells", figure, caption, lambda: _described_cells(path, cells.n_genes))]
    shown += _stain_picture(run)
    for name, values, label, counted in (
        ("cell_molecules", cells.n_molecules, "molecules a cell", "cells"),
        ("cell_genes", cells.n_genes, "genes a cell", "cells"),
        ("cell_volume", cells.volume, "volume [µm³]", "cells"),
        ("assigned", run.fields["in cells"].to_numpy(float), "share of a field's molecules in cells", "fields"),
    ):
        numbers = pd.DataFrame({label: values})
        figure = figures.histogram(values, label, counted)
        shown.append(picture(name, figure, f"Histogram: {label}", numbers, "small"))
    return Section("Cells", text, figures=shown)


def _described_cells(path: Path, n_genes: np.ndarray) -> Iterator[pd.DataFrame]:
    """What the page knows of each cell, part by part."""
    first = 0
    for part in parts(path, ["cell_id", "center_x", "center_y", "volume", "n_transcripts"]):
        yield part.to_pandas().assign(n_genes=n_genes[first : first + len(part)])
        first += len(part)


def embedding_section(run: Run) -> Section | None:
    """Domains that ``--embed`` found."""
    if "embedding" not in run.record:
        return None
    cells = pd.read_parquet(run.stage / results.CELLS, columns=["center_x", "center_y"])
    return domain_section(run.stage, cells, _outlines(run.stage / results.CELLS, len(cells)))


def _outlines(path: Path, n_cells: int) -> np.ndarray | None:
    """Of the cells, None where they are too few or too many to be drawn by them."""
    import shapely

    if not FEWEST_CELLS_DRAWN <= n_cells <= MOST_CELLS_DRAWN:
        return None
    column = pq.read_table(path, columns=["geometry"])["geometry"]
    return np.asarray(shapely.from_wkb(column.to_numpy(zero_copy_only=False)), object)


def _stain_picture(run: Run) -> list[Picture]:
    """Stains of the field with most cells under the outlines of the run."""
    import shapely

    row = int(np.argmax(run.fields["outlines"]))
    fov, scale = int(run.fovs[row]), run.record["microns_per_pixel"]
    path = results.field_folder(run.out, fov) / STAINS
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as saved:
        stains, names, step = saved["stains"], saved["names"].tolist(), float(saved["step"])
    low, high = run.places[row], run.places[row] + run.size
    around = np.array(run.size) / 4  # cells whose centres lie outside reach in
    near = between(run.stage / results.CELLS, ["cell_id", "geometry"], "center", low - around, high + around)
    parts, cell = shapely.get_parts(shapely.from_wkb(near["geometry"].to_numpy()), return_index=True)
    # the middle of pixel k of the small picture is that of its square of pixels
    rings = [
        ((shapely.get_coordinates(ring) - low) / scale - (step - 1) / 2) / step
        for ring in shapely.get_exterior_ring(parts)
    ]
    ids = near["cell_id"].to_numpy()[cell]
    corners = [pd.DataFrame(ring, columns=["x", "y"]).assign(cell_id=i) for ring, i in zip(rings, ids, strict=True)]
    caption = f"Field {fov}, the one with most cells: its stains and the cells"
    figure = figures.stains_under_outlines(stains, names, rings)
    return [picture("stains", figure, caption, pd.concat(corners) if corners else None)]


# --- agreement ----------------------------------------------------------------------------------------------------


def agreement_section(run: Run, others: dict[str, pd.Series]) -> Section | None:
    """Counts of genes in halves of the fields, in other runs, in bulk."""
    genes = [name for name, blank in zip(run.record["words"]["gene"], run.is_blank, strict=True) if not blank]
    labels = ("molecules in every other field", "molecules in the fields between")
    compared = [("halves", *_halves(run), genes, labels)] if len(run.fovs) > 1 else []
    for name, values in others.items():
        compared.append((name.replace(" ", "_"), *_paired(run, values), ("molecules of this run", name)))
    shown = []
    for name, x, y, names, labels in compared:
        r, n = log_correlation(x, y)
        if n:
            numbers = pd.DataFrame({"gene": names, labels[0]: x, labels[1]: y})
            figure = figures.correlation(x, y, names, labels, r)
            shown.append(
                picture(
                    f"correlation_{name}", figure, f"{labels[1][0].upper()}{labels[1][1:]} against {labels[0]}", numbers
                )
            )
    each = run.fields["r"].to_numpy(float)
    if np.isfinite(each).sum() > 2:
        label = "r of log10 counts, a field against all others"
        numbers = run.fields[["field", "r"]]
        figure = figures.histogram(each, label, "fields")
        shown.append(picture("r_of_fields", figure, f"Histogram: {label}", numbers, "small"))
    return Section("Agreement of counts", figures=shown) if shown else None


# --- images and stage ---------------------------------------------------------------------------------------------


def _stage_pictures(stage: dict[str, Any]) -> tuple[list[str], list[Picture]]:
    """How far the stage was off, in words and as a picture; nothing where no overlap tells."""
    if not (stage["links"]["a"] or stage["untied"]):
        return [], []
    links = pd.DataFrame(stage["links"])
    said, positions = np.array(stage["said"]), np.array(stage["positions"])
    used = int(links["used"].sum())
    text = f"{used} overlaps of neighbouring fields show the same molecules in both."
    if used:
        left = max(links.loc[links["used"], "residual"].max(), 0.001)
        text += (
            f" According to them, the stage stops {stage['stage_error']:.3f} µm (rms, along each axis) from the "
            "position it reports; the corrected positions, in which all places are given, agree with every overlap to "
            f"{left:.3f} µm."
        )
    if used < len(links):
        text += f" {len(links) - used} overlaps contradict the others and were left out (red)."
    text = f"{text} {untied_text(stage)}".strip()
    caption = "How far the stage was off (arrows), and which fields share molecules (lines)"
    names = {"x said": said[:, 0], "y said": said[:, 1], "x": positions[:, 0], "y": positions[:, 1]}
    numbers = pd.DataFrame(names).rename_axis("field").reset_index()
    return [text], [picture("stage", figures.stage(said, positions, links), caption, numbers)]


def image_section(run: Run) -> Section:
    """Drift, stage, light, colours, and images that are unlike the others."""
    record = run.record
    shifts = _drift_table(record["fields"])
    text, shown = "The stacks were registered already.", []
    if len(shifts):
        text = "Each round's drift was measured on the bead images against round 0 and taken out in one resampling."
        shown = [picture("drift", figures.drift(shifts), "Drift of each round", shifts)]
    tables = [
        *_quality_table(record["quality"]),
        *_chromatic_table(record["chromatic"]),
        *_light_table(record["light"]),
    ]
    said, places = _stage_pictures(record["stage"])
    return Section("Images and stage", [text, *said], tables, [*shown, *places])


def _drift_table(fields: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each field and round, as `merfish.imaging.registration.measure_field_drift` has them."""
    columns: dict[str, list[Any]] = {}
    for fov, field in fields.items():
        for row in field["drift"]:
            for name, value in {"fov": int(fov), **row}.items():
                columns.setdefault(name, []).append(value)
    return pd.DataFrame(columns)


def _quality_table(quality: dict[str, list[Any]]) -> list[Table]:
    columns = ("fov", "round", "bit", "reasons")
    rows = list(zip(*(quality.get(name, []) for name in columns), strict=True))
    heads = ("field", "round", "bit", "what is unusual about its images")
    return [Table(heads, rows, name="unusual_images")] if rows else []


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


def failed_section(failed: dict[str, str]) -> Section | None:
    """Fields that failed, and why."""
    rows = list(failed.items())
    return Section("Fields that failed", tables=[Table(("field", "reason"), rows, name="failed")]) if rows else None


# --- how it was made ----------------------------------------------------------------------------------------------


def how_section(run: Run) -> Section:
    """Command, parameters, versions, inputs, and how long each step took."""
    record = run.record
    inputs = record["inputs"]
    rows = [
        ("command", record["command"]),
        ("images", f"{len(inputs['images']):,} files, {sum(inputs['images'].values()) / 1e9:,.2f} GB"),
        *((name.replace("_", " "), table["path"]) for name, table in inputs["tables"].items()),
        *((f"parameter {name}", _value(value)) for name, value in record["parameters"].items()),
        *((f"version of {name}", version) for name, version in record["versions"].items()),
    ]
    seconds = {name: value for name, value in record["seconds"].items() if name != "total"}
    laps = pd.DataFrame([field["seconds"] for field in record["fields"].values()]).sum()
    within = {f"  {name}, all fields": float(value) for name, value in laps.items()}
    everything = {**seconds, **within}
    figure = figures.seconds_of_steps(everything)
    numbers = pd.DataFrame({"step": list(everything), "seconds": list(everything.values())})
    text = f"{record['seconds']['total']:,.0f} s in all; steps of fields are the sum over all workers."
    shown = picture("seconds", figure, "Time of each step", numbers, "wide")
    return Section("How it was made", [text], [Table(("what", "value"), rows, name="parameters")], [shown])


def _value(value: Any) -> str:
    return "not given" if value is None or value == {} else str(value)
