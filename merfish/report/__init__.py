"""The report of a run: one page with figures and tables.

`summary` aggregates the tables of a run, `findings` compares figures with thresholds, `figures` draws. `agreement`,
`molecules`, `images`, `cells` and `domains` build the sections of the page, `sections` orders them, and `page` writes
them. `notices` describes problems in single lines, also for a console.
"""

from __future__ import annotations

from merfish.report.page import Picture, Section, Table, picture, write_report
from merfish.report.run import OVERVIEW, STAINS, read_overview, read_record
from merfish.report.sections import run_sections, write_run_report

__all__ = [
    "OVERVIEW",
    "STAINS",
    "Picture",
    "Section",
    "Table",
    "picture",
    "read_overview",
    "read_record",
    "run_sections",
    "write_report",
    "write_run_report",
]
