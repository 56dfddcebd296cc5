"""Sections on the quality of a run: its figures against thresholds, and its counts against other data."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.calls.filtering import few_blanks
from merfish.errors import InputError
from merfish.report import figures
from merfish.report.findings import findings, overall
from merfish.report.notices import assumption_lines, bit_warnings, quality_lines, stain_lines
from merfish.report.page import Section, picture
from merfish.report.run import Run
from merfish.report.summary import log_correlation

VERDICTS = {
    "pass": "All figures meet their thresholds.",
    "warn": "Some figures need attention.",
    "fail": "Some figures fail.",
}


def headline(run: Run, others: dict[str, pd.Series]) -> Section:
    """Return the section with verdicts and warnings."""
    record = run.record
    bulk = others.get("bulk RNA-seq")
    compared = None if bulk is None else log_correlation(*_paired(run, bulk)[:2])
    found = findings(record, log_correlation(*_halves(run)), compared)
    notice = record["calibration"]["notice"]
    figure = record["figures"]
    text = [
        VERDICTS[overall(found)],
        *([f"Warning: {notice}."] if notice else []),
        *(f"Warning: {text}." for text in assumption_lines(figure)),
        *bit_warnings(record),
        *quality_lines(record["quality"]),
        *stain_lines(record["fields"]),
        *(f"Codebook: {warning}." for warning in figure["warnings"]),
    ]
    if (few := few_blanks(figure["n_found_blank"], figure["blanks_in_book"])) and figure["n_kept"]:
        text.append(f"{few[0].upper()}{few[1:]}.")
    return Section("Quality of the run", text, findings=found)


def agreement_section(run: Run, others: dict[str, pd.Series]) -> Section | None:
    """Compare counts of genes between halves of the fields, and with other runs and bulk RNA-seq."""
    genes = [name for name, blank in zip(run.record["words"]["gene"], run.is_blank, strict=True) if not blank]
    labels = ("molecules in every second field", "molecules in the other fields")
    compared = [("halves", *_halves(run), genes, labels)] if len(run.fovs) > 1 else []
    for name, values in others.items():
        compared.append((name.replace(" ", "_"), *_paired(run, values), ("molecules of this run", name)))
    shown = []
    for name, x, y, names, labels in compared:
        r, n = log_correlation(x, y)
        if n:
            numbers = pd.DataFrame({"gene": names, labels[0]: x, labels[1]: y})
            figure = figures.correlation(x, y, names, labels, r)
            caption = f"{labels[1][0].upper()}{labels[1][1:]} against {labels[0]}"
            shown.append(picture(f"correlation_{name}", figure, caption, numbers))
    each = run.fields["r"].to_numpy(float)
    if np.isfinite(each).sum() > 2:
        label = "r of log10 counts, each field against all others"
        numbers = run.fields[["field", "r"]]
        figure = figures.histogram(each, label, "fields")
        shown.append(picture("r_of_fields", figure, f"Histogram: {label}", numbers, "small"))
    return Section("Agreement of counts", figures=shown) if shown else None


def _halves(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return counts of genes in every second field, and in the others."""
    counts = run.molecules.counts[:, ~run.is_blank]
    return counts[0::2].sum(axis=0), counts[1::2].sum(axis=0)


def _paired(run: Run, other: pd.Series) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return counts, the other values of the same genes, and their names. Raises InputError if no gene is shared."""
    words = pd.Series(run.record["words"]["n_kept"], index=run.record["words"]["gene"], dtype=float)[~run.is_blank]
    shared = [gene for gene in words.index if gene in other.index]
    if not shared:
        raise InputError(
            f"the other table has no gene of the run, such as {words.index[0]}; it has {other.index[:1].tolist()}"
        )
    return words[shared].to_numpy(), other[shared].to_numpy(), shared
