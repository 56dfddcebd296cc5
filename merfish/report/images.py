"""Sections on bits, fields, images and stage positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from merfish._files import plain
from merfish.report import figures
from merfish.report.notices import untied_text
from merfish.report.page import Picture, Section, Table, picture
from merfish.report.run import Run


def bit_section(run: Run) -> Section:
    """Return brightness and error rates of the bits."""
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
            "Error rates of each bit, estimated from the calls",
            rates,
        ),
    ]
    text = [
        "Molecule: height of one molecule after filtering [camera counts]. Medians over fields of spots, background, "
        "noise [camera counts] and width of the spots (sigma after filtering [px], larger out of focus). Saturated: "
        "pixels in all fields. Lost and gained: 1→0 and 0→1 error rates."
    ]
    return Section("Bits", text, [_sortable(table, formats, "bits")], shown)


def _median_of_bits(fields: Mapping[str, Any], name: str, n_bits: int) -> np.ndarray:
    values = [np.array(field["quality"][name], float) for field in fields.values() if name in field["quality"]]
    if not values:
        return np.full(n_bits, np.nan)
    return pd.DataFrame(np.array(values)).median().to_numpy()


def field_section(run: Run) -> Section | None:
    """Return a table of the fields, and maps of its columns."""
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
        ("spot width", "Width of spots, larger out of focus", "sigma [px]"),
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
        "Blanks, in cells: shares of the kept molecules. Drift: largest of all rounds [px]. Spot width: sigma after "
        "filtering [px], larger out of focus. Saturated: pixels of all bits. r: log10 counts of genes against those "
        "of all other fields. Crosses on the maps: fields that failed.",
        *([" ".join(alike)] if alike else []),
    ]
    return Section("Fields", text, [_sortable(table, formats, "fields")], shown)


def _sortable(table: pd.DataFrame, formats: dict[str, str], name: str) -> Table:
    rows = [tuple(plain(value) for value in row) for row in table.itertuples(index=False)]
    return Table(tuple(table.columns), rows, formats, name, sortable=True)


def image_section(run: Run) -> Section:
    """Return drift, stage positions, illumination, chromatic shifts, and unusual images."""
    record = run.record
    shifts = _drift_table(record["fields"])
    text, shown = "The stacks were already registered.", []
    if len(shifts):
        text = "The drift of each round from round 0 was measured on the bead images and corrected in one resampling."
        shown = [picture("drift", figures.drift(shifts), "Drift of each round", shifts)]
    tables = [
        *_quality_table(record["quality"]),
        *_chromatic_table(record["chromatic"]),
        *_light_table(record["light"]),
        *_leak_table(record.get("leaks", [])),
    ]
    corrections, arrows = _stage_corrections(record["stage"])
    return Section("Images and stage", [text, *corrections], tables, [*shown, *arrows])


def _stage_corrections(stage: dict[str, Any]) -> tuple[list[str], list[Picture]]:
    """Describe the errors of the stage as text and as a picture; both are empty if no fields overlap."""
    if not (stage["links"]["a"] or stage["untied"]):
        return [], []
    links = pd.DataFrame(stage["links"])
    reported, positions = np.array(stage["said"]), np.array(stage["positions"])
    used = int(links["used"].sum())
    text = f"In {used} overlaps of neighbouring fields, both fields show the same molecules."
    if used:
        left = max(links.loc[links["used"], "residual"].max(), 0.001)
        text += (
            f" The error of the reported stage positions is {stage['stage_error']:.3f} µm (rms along each axis). The "
            "corrected positions, to which all coordinates refer, agree with every overlap within "
            f"{left:.3f} µm."
        )
    if used < len(links):
        text += f" {len(links) - used} overlaps contradict the others and were excluded (red)."
    text = f"{text} {untied_text(stage)}".strip()
    caption = "Errors of the stage (arrows), and fields that share molecules (lines)"
    names = {"x reported": reported[:, 0], "y reported": reported[:, 1], "x": positions[:, 0], "y": positions[:, 1]}
    numbers = pd.DataFrame(names).rename_axis("field").reset_index()
    return [text], [picture("stage", figures.stage(reported, positions, links), caption, numbers)]


def _drift_table(fields: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row for each field and round, with the columns of `merfish.imaging.registration.measure_field_drift`."""
    columns: dict[str, list[Any]] = {}
    for fov, field in fields.items():
        for row in field["drift"]:
            for name, value in {"fov": int(fov), **row}.items():
                columns.setdefault(name, []).append(value)
    return pd.DataFrame(columns)


def _quality_table(quality: dict[str, list[Any]]) -> list[Table]:
    columns = ("fov", "round", "bit", "reasons")
    rows = list(zip(*(quality.get(name, []) for name in columns), strict=True))
    heads = ("field", "round", "bit", "unusual property of its images")
    return [Table(heads, rows, name="unusual_images")] if rows else []


def _light_table(light: dict[str, dict[str, float]]) -> list[Table]:
    rows = [
        (color, f"{found['least']:.0%}", f"{found['dark']:.0f}" if found["dark"] else "not needed", found["hot"])
        for color, found in light.items()
    ]
    columns = ("colour", "lowest relative illumination", "dark level, counts", "hot pixels")
    return [Table(columns, rows)] if rows else []


def _chromatic_table(fits: dict[str, dict[str, Any]]) -> list[Table]:
    rows = [
        (
            color,
            "unknown" if fit["shift"] is None else f"{fit['shift']:.2f} px",
            f"{fit['pairs']:,.0f}",
            "unknown" if fit["error"] is None else f"{fit['error']:.3f} px",
            "yes" if fit["map"] != np.eye(2, 3).tolist() else "no, not needed",
        )
        for color, fit in fits.items()
    ]
    columns = ("colour", "largest chromatic shift", "pairs of spots", "error of the map, rms", "corrected")
    return [Table(columns, rows)] if rows else []


def _leak_table(leaks: list[dict[str, Any]]) -> list[Table]:
    rows = [(leak["source"], leak["target"], f"{leak['share']:.1%}", leak["kind"]) for leak in leaks]
    columns = ("bit", "leaks into", "share, subtracted", "kind")
    return [Table(columns, rows, name="leaks")] if rows else []


def failed_section(failed: dict[str, str]) -> Section | None:
    """List the fields that failed, and the reasons."""
    rows = list(failed.items())
    return Section("Fields that failed", tables=[Table(("field", "reason"), rows, name="failed")]) if rows else None
