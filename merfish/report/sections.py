"""The report of a run: its sections in order, and how the run was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from merfish import results
from merfish.report import figures
from merfish.report.agreement import agreement_section, headline
from merfish.report.cells import cell_section
from merfish.report.domains import domain_section
from merfish.report.images import bit_section, failed_section, field_section, image_section
from merfish.report.molecules import gene_section, molecule_section
from merfish.report.page import Section, Table, picture, write_report
from merfish.report.run import Run, read_record
from merfish.report.summary import read_bulk


def write_run_report(
    out: Path, stage: Path | None = None, *, bulk: Path | None = None, replicate: Path | None = None
) -> Path:
    """Write ``report.html`` and ``report/`` of a run from its results.

    stage: folder of the results, in which the report is written, ``out`` by default. bulk: CSV file of bulk RNA-seq
    with genes and values; replicate: folder of another run with the same codebook; the counts of genes are compared
    with both. Raises InputError if a folder contains no finished run, or for a faulty table.
    """
    stage = stage or out
    run = Run(out, stage, read_record(stage))
    others = {}
    if bulk is not None:
        others["bulk RNA-seq"] = read_bulk(bulk)
    if replicate is not None:
        words = read_record(replicate)["words"]
        others["the other run"] = pd.Series(words["n_kept"], index=words["gene"], dtype=float)
    made = run.record["figures"]
    lead = (
        f"{made['n_fields']:,} fields, {made['n_kept']:,} molecules, {made['n_cells']:,} cells, "
        f"merfish {run.record['versions']['merfish']}"
    )
    title = f"MERFISH run of {Path(run.record['inputs']['folder']).name}"
    return write_report(stage / results.REPORT, title, lead, sections_of(run, others))


def run_sections(out: Path) -> list[Section]:
    """Return the sections of the report of a finished run."""
    return sections_of(Run(out, out, read_record(out)), {})


def sections_of(run: Run, others: dict[str, pd.Series]) -> list[Section]:
    """Return all sections; others: tables by name, values by gene, with which the counts of genes are compared."""
    made = [
        headline(run, others),
        molecule_section(run),
        gene_section(run),
        bit_section(run),
        field_section(run),
        cell_section(run),
        domain_section(run),
        agreement_section(run, others),
        image_section(run),
        failed_section(run.record["failed"]),
        provenance_section(run.record),
    ]
    return [section for section in made if section is not None]


def provenance_section(record: dict[str, Any]) -> Section:
    """Return command, inputs, parameters, versions, and the time of each step."""
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
    seconds |= {f"  {name}, all fields": float(value) for name, value in laps.items()}
    numbers = pd.DataFrame({"step": list(seconds), "seconds": list(seconds.values())})
    text = f"{record['seconds']['total']:,.0f} s in total; the time of steps of fields is summed over all workers."
    shown = picture("seconds", figures.seconds_of_steps(seconds), "Time of each step", numbers, "wide")
    return Section("How the run was made", [text], [Table(("what", "value"), rows, name="parameters")], [shown])


def _value(value: Any) -> str:
    return "default" if value is None or value == {} else str(value)
