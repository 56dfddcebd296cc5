"""Write and read the tables of the benchmarks, and locate their pages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS_VARIABLE = "MERFISH_BENCHMARK_RESULTS"  # folder for pages that must not replace those of the repository
RESULTS = Path(os.environ.get(RESULTS_VARIABLE, Path(__file__).parent / "results"))


def as_markdown(table: pd.DataFrame | list[dict[str, Any]]) -> str:
    """Format a table, or its rows, as Markdown: numbers are rounded, NaN is empty."""
    frame = pd.DataFrame(table)
    text = frame.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)).replace("nan", "")
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_markdown(page: str) -> list[pd.DataFrame]:
    """Return the tables of a page, in order, with cells as text."""
    tables: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [pd.DataFrame(rows[2:], columns=rows[0]) for rows in tables if rows]


def put_section(path: Path, title: str, section: str) -> None:
    """Write ``section``, which begins with "## ", into a page, in place of the one with the same heading or at the end.

    title: everything before the first section.
    """
    text = path.read_text() if path.exists() else ""
    parts = [f"## {part}".rstrip() + "\n" for part in text.split("\n## ")[1:]] + [section.rstrip() + "\n"]
    path.write_text("\n".join([title, *{part.partition("\n")[0]: part for part in parts}.values()]))
