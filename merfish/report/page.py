"""A page of sections with tables and figures: one self-contained HTML file, and a folder with its numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from markupsafe import Markup

from merfish import plots
from merfish._files import whole_file
from merfish.report.findings import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "report"  # beside the page: figures as PNG, numbers as CSV
MOST_ROWS = 1000  # rows of a table on the page; its CSV file has all
DPI = 150  # of figures, and of images within them
# Colours that become CSS variables of the page, which have other values in dark mode
_NAMED = {"#000000": "currentColor", plots.GENE: "var(--gene)", plots.BLANK: "var(--blank)"}

# A table, or a function that yields a large one in parts
Numbers = pd.DataFrame | Callable[[], Iterator[pd.DataFrame]] | None
Width = Literal["small", "normal", "wide"]


@dataclass(frozen=True)
class Picture:
    """A figure as SVG for the page and as PNG beside it, with its numbers; name: stem of its files."""

    name: str
    svg: Markup
    png: bytes
    caption: str
    numbers: Numbers
    width: Width


@dataclass(frozen=True)
class Table:
    """Column names and rows of values.

    formats: by column, for `str.format`; other values are printed as they are. name: stem of its CSV file, empty for
    none. sortable: whether a click on a column header sorts the rows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    sortable: bool = False

    @property
    def cells(self) -> list[list[tuple[str, float | None]]]:
        """Return the first `MOST_ROWS` rows, each value as text and as the number to sort by, None for text."""
        return [
            [_cell(v, self.formats.get(c, "")) for c, v in zip(self.columns, row, strict=True)]
            for row in self.rows[:MOST_ROWS]
        ]


@dataclass(frozen=True)
class Section:
    """A heading with verdicts, paragraphs, tables and figures."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    findings: Sequence[Finding] = ()


def picture(name: str, figure: Figure, caption: str, numbers: Numbers = None, width: Width = "normal") -> Picture:
    """Render a figure for a page."""
    svg, png = render(figure, name)
    return Picture(name, _for_page(svg, name, caption), png, caption, numbers, width)


def render(figure: Figure, name: str) -> tuple[str, bytes]:
    """Render a figure as SVG and as PNG; ``name`` makes the ids in the SVG reproducible."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # one layout for both formats; `savefig` would draw everything three times for each
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        if any(axes.get_aspect() != "auto" for axes in figure.axes):
            engine.execute(figure)  # axes with a fixed aspect get their size only now
        figure.set_layout_engine("none")
    png, svg = io.BytesIO(), io.StringIO()
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return svg.getvalue(), png.getvalue()


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page, and the folder of its figures and numbers, each atomically."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("merfish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    with whole_file(path.parent / FOLDER) as part:
        part.mkdir()
        for section in sections:
            _write_numbers(section, part)
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _write_numbers(section: Section, folder: Path) -> None:
    for shown in section.figures:
        (folder / f"{shown.name}.png").write_bytes(shown.png)
        if shown.numbers is not None:
            parts = shown.numbers() if callable(shown.numbers) else [shown.numbers]
            with open(folder / f"{shown.name}.csv", "w", newline="", encoding="utf-8") as file:
                for k, part in enumerate(parts):
                    part.to_csv(file, index=False, header=k == 0)
    for table in section.tables:
        if table.name:
            with open(folder / f"{table.name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([table.columns, *table.rows])


def _for_page(svg: str, name: str, caption: str) -> Markup:
    """Adapt Matplotlib's SVG to the page: scalable, in the colours of the page, with ids that no other SVG has."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for colour, named in _NAMED.items():
        svg = re.sub(rf"(?<=[ :]){colour}(?=[;\"])", named, svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    head = f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{Markup.escape(caption)}"'
    head += ' xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    return Markup(head + svg[svg.index(">") + 1 :])


def _cell(value: Any, form: str) -> tuple[str, float | None]:
    """Format a value as text, and return the number to sort by; an unknown number is a dash without a number."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if value is None or (number is not None and np.isnan(number)):
        return "–", None
    return (form.format(value) if form else str(value)), number
