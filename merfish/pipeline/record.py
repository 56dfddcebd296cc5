"""``run.json``: parameters, inputs and findings, and a summary of them for a terminal."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish import results
from merfish._files import file_record
from merfish._text import counted
from merfish.calls.error_model import WordTally, bit_error_rates, misidentification_rate, wilson
from merfish.calls.filtering import few_blanks
from merfish.calls.fit import FitCounts, Verdict, codebook_fits
from merfish.codebook import Codebook, check_codebook
from merfish.config import RunConfig
from merfish.decoding.assumptions import Optics, broken_assumptions
from merfish.imaging.experiment import Experiment
from merfish.imaging.organization import NO_ROUND, Channel
from merfish.imaging.quality import flag_quality
from merfish.imaging.unmixing import Leak
from merfish.pipeline.manifest import versions
from merfish.pipeline.reconcile import Fields, Reconciled
from merfish.pipeline.survey import Calibrated
from merfish.pipeline.tables import Written
from merfish.report.notices import (
    assumption_lines,
    bit_warnings,
    efficiency_line,
    leak_lines,
    quality_lines,
    stain_lines,
    untied_text,
)


def run_record(
    fields: Fields,
    says: Mapping[int, Mapping[str, Any]],
    failed: Mapping[int, str],
    config: RunConfig,
    calibrated: Calibrated,
    found: Reconciled,
    words: pd.DataFrame,
    spikes: np.ndarray,
    written: Written,
) -> dict[str, Any]:
    """Return the whole record of a run.

    says: contents of the records of the fields. spikes: bool (spike,), whether each added molecule is found and kept.
    """
    experiment, calibration = fields.experiment, calibrated.calibration
    book = experiment.codebook
    return {
        "versions": versions(),
        "command": shlex.join(sys.argv),
        "parameters": config.model_dump(),
        "inputs": describe_inputs(experiment, fields.fovs),
        "microns_per_pixel": experiment.microns_per_pixel,
        "z": list(experiment.z),
        "codebook": {
            "names": book.names,
            "is_blank": book.is_blank.tolist(),
            "words": ["".join(map(str, word)) for word in book.words.tolist()],
        },
        "bits": {
            "names": book.bit_names,
            "colors": [channel.color for channel in experiment.bits],
            **calibration.normalization.to_dict(),
        },
        "calibration": {"surveyed": calibrated.surveyed, "notice": calibrated.notice},
        "chromatic": calibration.to_dict()["chromatic"],
        "light": calibration.light_figures(),
        "leaks": leak_rows(calibration.leaks, book.bit_names, experiment.bits),
        "bit_error_rates": bit_error_rates(found.words, book).to_dict("list"),
        "words": words.to_dict("list"),
        "codebook_fit": asdict(judge_codebook(book, says, calibrated)),
        "stage": found.stitching.to_dict(),
        "quality": unusual_images(says),
        "fields": says,
        "failed": dict(failed),
        "figures": {
            **call_figures(found.words, book, found.filter.blank_share),
            "held_out": interval(found.filter.held_out),
            **spike_figures(spikes),
            **({"broken_assumptions": unmet(says, book)} if config.method != "spots" else {}),
            "n_fields": len(fields.fovs),
            "n_duplicates": int(found.words.kept.sum()) - written.n_molecules,
            "n_kept": written.n_molecules,
            "n_cells": written.n_cells,
            "share_in_cells": written.n_in_cells / written.n_molecules if written.n_molecules else 0.0,
            "transcripts_per_cell": written.transcripts_per_cell,
        },
    }


def judge_codebook(codebook: Codebook, says: Mapping[int, Mapping[str, Any]], calibrated: Calibrated) -> Verdict:
    """Test whether the images fit the codebook, from the calls of all fields."""
    counts = sum((FitCounts(**said["fit"]) for said in says.values()), FitCounts())
    scale = calibrated.calibration.normalization.scale
    dead = tuple(name for name, height in zip(codebook.bit_names, scale, strict=True) if height == 0)
    return codebook_fits(counts, codebook, dead)


def unmet(says: Mapping[int, Mapping[str, Any]], codebook: Codebook) -> list[str]:
    """Return which assumptions of the pixel decoders the fields and the codebook do not meet."""
    return broken_assumptions([Optics(*said["optics"]) for said in says.values()], codebook)


def unusual_images(says: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the bits of fields whose images differ from the others: lists of fov, bit, round and reasons."""
    columns: dict[str, list[Any]] = {}
    for said in says.values():
        for name, values in said["quality"].items():
            columns.setdefault(name, []).extend(values)
    if not columns:
        return {}
    table = pd.DataFrame(columns)
    numbers = [name for name in columns if name not in ("fov", "bit", "round", "color")]
    flagged = flag_quality(table.astype(dict.fromkeys(numbers, float)))
    shown = flagged[flagged["reasons"] != ""]
    return {name: shown[name].tolist() for name in ("fov", "bit", "round", "reasons")}


def call_figures(words: WordTally, codebook: Codebook, blank_share: float) -> dict[str, Any]:
    """Return numbers of molecules before and after filtering, expected misidentification rate, and warnings.

    blank_share: fraction of wrong calls that are blanks.
    """
    n_kept, blank = int(words.kept.sum()), codebook.is_blank
    return {
        "n_found": int(words.found.sum()),
        "n_found_blank": int(words.found[blank].sum()),
        "n_kept": n_kept,
        "n_blank": int(words.kept[blank].sum()),
        "blanks_in_book": bool(blank.any()),
        "misidentification_rate": float(1 - words.right.sum() / n_kept) if n_kept else None,
        "by_blanks": interval(misidentification_rate(words.kept[blank].sum(), n_kept, blank_share)),
        "warnings": list(check_codebook(codebook).warnings),
    }


def leak_rows(leaks: Sequence[Leak], names: Sequence[str], channels: Sequence[Channel] = ()) -> list[dict[str, Any]]:
    """Leaks for a record, the largest first: names of the bits, share, and kind, if ``channels`` determine it."""
    rows = []
    for source, target, share in sorted(leaks, key=lambda leak: -leak.share):
        kind = leak_kind(channels[source], channels[target]) if channels else ""
        rows.append({"source": names[source], "target": names[target], "share": share, "kind": kind})
    return rows


def leak_kind(source: Channel, target: Channel) -> str:
    """Kind of a leak between two bits, from their rounds and colours; "" if unknown."""
    a, b = source.movie.imaging_round, target.movie.imaging_round
    if NO_ROUND in (a, b):
        return ""
    if a == b:
        return "bleed-through"
    return "carry-over" if a < b and source.color == target.color else ""


def spike_figures(kept: np.ndarray) -> dict[str, Any]:
    """Return the number of added molecules and the fraction of them that is kept; kept: bool (spike,)."""
    return {"spike_in": interval(wilson(int(kept.sum()), int((~kept).sum()))), "n_spikes": len(kept)}


def interval(rate: tuple[float, float, float]) -> dict[str, float] | None:
    """Return a rate and its interval as stored in the record, None if it is unknown."""
    return None if np.isnan(rate[0]) else dict(zip(("rate", "low", "high"), rate, strict=True))


def describe_inputs(experiment: Experiment, fovs: Sequence[int]) -> dict[str, Any]:
    """Return the tables with their hashes, and the images with their sizes in bytes."""
    wanted = set(fovs)
    images = {
        str(path.relative_to(experiment.folder)): path.stat().st_size
        for (_, fov), path in experiment.files.items()
        if fov in wanted
    }
    tables = {name: {"path": str(path), **file_record(path)} for name, path in experiment.tables.items()}
    return {"folder": str(experiment.folder), "tables": tables, "images": images}


def molecule_lines(figures: Mapping[str, Any]) -> list[str]:
    """Describe the molecules found and kept, and warnings about them, in lines for a terminal."""
    rate = figures["misidentification_rate"]
    kept = f"{counted(figures['n_kept'], 'molecule')} ({counted(figures['n_blank'], 'blank')})"
    line = f"{kept} of {figures['n_found']:,} found"
    warnings = [f"codebook: {warning}" for warning in figures["warnings"]]
    if rate is None:
        return [line, *warnings]
    few = few_blanks(figures["n_found_blank"], figures["blanks_in_book"])
    broken = [f"warning: {text}" for text in assumption_lines(figures)]
    return [f"{line}, {rate:.1%} expected to be wrong", *([few] if few else []), *broken, *warnings]


def sequential_lines(fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the number of spots of genes imaged one by one, empty if there are none."""
    spots: Counter[str] = Counter()
    for said in fields.values():
        spots.update(said.get("n_sequential", {}))
    text = ", ".join(f"{gene} {n:,}" for gene, n in spots.items())
    return [f"spots of genes imaged one by one: {text}"] if spots else []


def run_summary(out: Path) -> dict[str, Any]:
    """Summarise a finished run in a few lines; also returns the failed fields."""
    record = results.read_run(out)
    figures, failed = record["figures"], record["failed"]
    notice = record["calibration"]["notice"]
    lines = [
        *molecule_lines(figures),
        *efficiency_line(record),
        *([f"warning: {notice}"] if notice else []),
        *bit_warnings(record),
        *leak_lines(record),
        *quality_lines(record["quality"]),
        *stain_lines(record["fields"]),
        *filter(None, [untied_text(record["stage"])]),
        *([f"cells were read from {record['segmentation']['path']}"] if "segmentation" in record else []),
        f"{counted(figures['n_cells'], 'cell')}, {figures['transcripts_per_cell']:.0f} molecules per cell (median)",
        *sequential_lines(record["fields"]),
        *(f"field {fov} failed: {reason}" for fov, reason in failed.items()),
        f"results in {out}, report in {out / results.REPORT}",
    ]
    return {"lines": lines, "failed": failed, "notice": notice}
