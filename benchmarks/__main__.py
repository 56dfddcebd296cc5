"""Run all benchmarks in sequence, and write a summary: python -m benchmarks [--quick] [--only NAME ...].

    --list       list the benchmarks with their commands
        --quick      small settings where available, under five minutes; pages are written to a temporary folder
    --peers      include those that install other tools, each in a separate environment
        --data DIR   real data, see benchmarks/README.md; without it, benchmarks that need real data are skipped

Each benchmark runs in a separate process. Writes benchmarks/results/summary.md and summary.png: the headline figures
of the pages, ratios of figures that were measured in the same run, and the time and memory of each benchmark.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.registry import BENCHMARKS, Benchmark, headlines
from benchmarks.tables import RESULTS, RESULTS_VARIABLE, as_markdown
from merfish import plots

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"


@dataclass(frozen=True)
class Cost:
    """Cost of one benchmark: exit code, seconds, and peak memory [GB] of its largest process."""

    code: int
    seconds: float
    memory: float


def run(command: Sequence[str], results: Path) -> Cost:
    """Run a benchmark that writes its page to ``results``; its output is shown only if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {RESULTS_VARIABLE: str(results)}
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            print(said.read(), flush=True)
    return Cost(process.returncode, time.perf_counter() - started, usage.ru_maxrss / 2**20)


def measure(benchmarks: Sequence[Benchmark], data: Path, results: Path, quick: bool) -> tuple[list[dict], list[dict]]:
    """Run benchmarks; returns rows of figures and rows of costs."""
    figures, costs = [], []
    for one in benchmarks:
        command = one.command(data, quick)
        print(" ".join(["python", *command]), flush=True)
        cost = run([sys.executable, *command], results)
        page = results / f"{one.name}.md"
        if not cost.code and page.exists():
            try:
                figures += [{"benchmark": one.name, **row} for row in headlines(one, page.read_text())]
            except LookupError as error:  # small settings may lack a row
                print(f"{one.name}: {error}", flush=True)
        costs.append(
            {
                "benchmark": one.name,
                "seconds": round(cost.seconds, 1),
                "peak memory [GB]": cost.memory,
                "exit code": cost.code,
            }
        )
    return figures, costs


def draw(figures: pd.DataFrame, costs: pd.DataFrame, path: Path) -> None:
    """Plot shares, ratios, seconds and memory side by side."""
    rows = max(len(figures), len(costs), 4)
    figure, (shares, ratios, seconds, memory) = plots.new_figure(16, 1.5 + 0.28 * rows, 4)
    for ax, kind, colour in ((shares, "share", plots.GENE), (ratios, "ratio", plots.BLANK)):
        chosen = figures[figures["kind"] == kind] if len(figures) else figures
        ax.plot(chosen["value"] if len(chosen) else [], range(len(chosen)), "o", color=colour)
        ax.set_yticks(range(len(chosen)), chosen["benchmark"] + ": " + chosen["figure"] if len(chosen) else [])
        ax.grid(axis="x", linewidth=0.4)
    shares.set(title="shares", xlim=(0, 1.02))
    ratios.set(title="ratios, measured in one run", xscale="log")
    ratios.axvline(1, color=plots.MUTED, linewidth=1)
    ratios.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ratios.xaxis.set_major_formatter("{x:g}")
    ratios.xaxis.set_minor_locator(NullLocator())
    for ax, column, title in ((seconds, "seconds", "time [s]"), (memory, "peak memory [GB]", "peak memory [GB]")):
        ax.barh(costs["benchmark"], costs[column], color=plots.MUTED)
        ax.set(title=title)
    for ax in (shares, ratios, seconds, memory):
        ax.invert_yaxis()
        ax.tick_params(labelsize=8)
    figure.savefig(path, metadata={"Software": None})


def summary(figures: pd.DataFrame, costs: pd.DataFrame, command: str) -> str:
    """Return the summary page."""
    return f"""# Summary of the benchmarks

Made by `{command}`.

{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Compare figures of this page with
each other, not with those of other machines.

## Figures

`ratio`: ratio of two figures of the same run.

{as_markdown(figures)}

## Costs

Peak memory of the largest process of each benchmark.

{as_markdown(costs)}

![The same figures](summary.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in BENCHMARKS])
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    wanted = [one for one in BENCHMARKS if options.only is None or one.name in options.only]
    if options.list:
        for one in wanted:
            print(f"{one.name:15} {one.about}\n{'':15} python {' '.join(one.command(options.data, False))}")
        return
    chosen = [one for one in wanted if (reason := one.left_out(options.data, options.quick, options.peers)) is None
              or print(f"{one.name}: left out, {reason}")]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        figures, costs = measure(chosen, options.data, Path(scratch) if options.quick else RESULTS, options.quick)
    tables = pd.DataFrame(figures, columns=["benchmark", "figure", "kind", "value"]), pd.DataFrame(costs)
    asked = f"{' --quick' * options.quick}{' --peers' * options.peers}"
    asked += f" --only {' '.join(options.only)}" if options.only else ""
    page = summary(*tables, f"python -m benchmarks{asked}")
    (RESULTS / "summary.md").write_text(page)
    draw(*tables, RESULTS / "summary.png")
    print(page)
    sys.exit(any(row["exit code"] for row in costs))


if __name__ == "__main__":
    main()
