"""Problems of a run in single lines, for a console and for the report, from the record of the run or a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merfish.report.findings import median_efficiency

MOST_LINES = 5  # about unusual images


def bit_warnings(run: dict[str, Any]) -> list[str]:
    """List bits without signal, and bits with saturated pixels."""
    names, lines = run["bits"]["names"], []
    dead = [name for name, scale in zip(names, run["bits"]["scale"], strict=True) if scale == 0]
    if dead and len(dead) < len(names):
        lines.append(f"Bits without molecules, which are excluded from decoding as dead: {', '.join(dead)}.")
    counts = [np.array(found["saturated"]) for found in run["fields"].values()]
    total = np.sum(counts, axis=0) if counts else np.zeros(len(names), int)
    if total.any():
        worst = max(run["fields"], key=lambda fov: sum(run["fields"][fov]["saturated"]))
        each = ", ".join(f"{name} {count:,}" for name, count in zip(names, total.tolist(), strict=True) if count)
        lines.append(f"Saturated pixels by bit, most of them in field {worst}: {each}.")
    return lines


def assumption_lines(figures: Mapping[str, Any]) -> list[str]:
    """List the assumptions of the pixel decoders that the images or the codebook do not meet."""
    return [
        f"more molecules may be wrong than expected: {reason}; --method spots accounts for this"
        for reason in figures.get("broken_assumptions", [])
    ]


def leak_lines(run: dict[str, Any]) -> list[str]:
    """List the light that leaks from bits into others and is subtracted; empty if there is none."""
    leaks = run.get("leaks", [])
    if not leaks:
        return []
    kinds = [f" ({leak['kind']})" if leak["kind"] else "" for leak in leaks[:MOST_LINES]]
    each = ["{source} into {target} {share:.0%}".format(**leak) + of for leak, of in zip(leaks, kinds, strict=False)]
    more = f", and {len(leaks) - MOST_LINES} more" if len(leaks) > MOST_LINES else ""
    return [f"Light that leaks between bits is subtracted: {', '.join(each)}{more}."]


def efficiency_line(run: dict[str, Any]) -> list[str]:
    """Report the share of molecules found and kept, and how it was measured; empty if it is unknown."""
    spiked = run["figures"].get("spike_in")
    if spiked is not None:
        n = run["figures"]["n_spikes"]
        rate = "{rate:.0%} of molecules detected (95% interval {low:.0%} to {high:.0%})".format(**spiked)
        return [f"{rate}, measured with {n:,} molecules added to the images"]
    middle = median_efficiency(run["words"], run["codebook"]["is_blank"])
    if np.isnan(middle):
        return []
    return [
        f"{middle:.0%} of molecules detected in the median gene, from the error rates of the bits alone; "
        "this is too high where spots overlap"
    ]


def quality_lines(quality: dict[str, list[Any]]) -> list[str]:
    """List fields with unusual images, one line for each of the first few."""
    rows: dict[int, list[str]] = {}
    for fov, bit, reasons in zip(*(quality.get(name, []) for name in ("fov", "bit", "reasons")), strict=True):
        rows.setdefault(fov, []).append(f"{bit} {reasons}")
    lines = [f"field {fov}: {'; '.join(found)}" for fov, found in rows.items()]
    more = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"{more} more fields have unusual images, see the report"] if more > 0 else [])


def stain_lines(fields: dict[str, dict[str, Any]]) -> list[str]:
    """List stains that could not be aligned with the bits, with reasons and fields."""
    found: dict[str, list[str]] = {}
    for fov, field in fields.items():
        for name, reason in field.get("stains_not_aligned", {}).items():
            found.setdefault(f"stain {name} is not aligned with the bits: {reason}", []).append(fov)
    more = {text: ", ..." if len(fovs) > MOST_LINES else "" for text, fovs in found.items()}
    return [f"{text} (fields {', '.join(fovs[:MOST_LINES])}{more[text]})" for text, fovs in found.items()]


def untied_text(stage: dict[str, Any]) -> str:
    """Return advice for a run in which at least half of the overlapping fields share no molecule, else empty text."""
    used, untied = sum(stage["links"]["used"]), stage["untied"]
    if untied < max(used, 1):
        return ""
    # an image mirrored along x still fits its neighbours along y
    return (
        f"In {untied} of {used + untied} overlaps, the two neighbouring fields share no molecule: check the "
        "positions, and transpose, flip_horizontal and flip_vertical in the microscope file."
    )
