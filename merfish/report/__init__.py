"""The page a person looks at after a run.

`summary` sums up what the tables hold, `findings` holds it against thresholds, `figures` draws, `domains` shows what
``--embed`` found, `sections` puts it together and `page` writes; `notices` says what is wrong in single lines, also for
a console.
"""

from __future__ import annotations

from merfish.report.page import Picture, Section, Table, picture, write_report
from merfish.report.sections import OVERVIEW, STAINS, read_overview, read_record, run_sections, write_run_report

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
