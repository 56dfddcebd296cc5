"""The harness of the benchmarks: parsing of their pages."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.registry import BENCHMARKS, headlines, number
from benchmarks.tables import as_markdown, put_section, read_markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda one: one.name)
def test_headlines__are_on_the_page_of_each_benchmark(benchmark):
    page = RESULTS / f"{benchmark.name}.md"
    if benchmark.figures:
        values = [row["value"] for row in headlines(benchmark, page.read_text())]
        assert all(map(math.isfinite, values))
    assert Path(benchmark.command(Path("data"), quick=False)[0]).is_file()


def test_read_markdown__reads_what_as_markdown_writes():
    table = pd.DataFrame({"a": ["x", "y"], "b": ["1", ""]})
    first, second = read_markdown(f"# Title\n\n{as_markdown(table)}\n\ntext\n\n{as_markdown(table)}\n")
    pd.testing.assert_frame_equal(first, table)
    pd.testing.assert_frame_equal(second, table)


def test_put_section__replaces_the_one_of_the_same_heading(tmp_path):
    page = tmp_path / "page.md"
    for section in ("## A\n\n1\n", "## B\n\n2\n", "## A\n\n### C\n\n3\n"):
        put_section(page, "# Title\n", section)
    assert page.read_text() == "# Title\n\n## A\n\n### C\n\n3\n\n## B\n\n2\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("-236.07 (-236.12 to -236.03)", -236.07), ("95%", 0.95), ("4 of 5", 0.8), ("1,049 px", 1049.0),
     ("1.69e+03", 1690.0), ("7.95 s", 7.95)],
)  # fmt: skip
def test_number__is_what_a_cell_begins_with(text, value):
    assert number(text) == pytest.approx(value)
    assert math.isnan(number("none"))
