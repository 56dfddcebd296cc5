"""The benchmarks: how each is run, and the headline figures of its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from benchmarks.tables import read_markdown

HERE = Path(__file__).parent
Row = Mapping[str, str]  # column and value that identify a row of a table


@dataclass(frozen=True)
class Figure:
    """One number of a page: ``column`` in the row ``where``, divided by that of the row ``over`` if there is one."""

    label: str
    column: str
    where: Row
    over: Row | None = None
    kind: Literal["share", "ratio", "number"] = "share"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; ``{data}`` in arguments is the folder of real data. quick: None if there are no small settings."""

    name: str  # of its page
    about: str
    script: str
    arguments: Sequence[str] = ()
    quick: Sequence[str] | None = None
    peer: bool = False  # installs other tools
    figures: Sequence[Figure] = ()

    def command(self, data: Path, quick: bool) -> list[str]:
        """Return the arguments for Python."""
        given = (self.quick or ()) if quick else self.arguments
        return [str(HERE / self.script), *(argument.format(data=data) for argument in given)]

    def left_out(self, data: Path, quick: bool, peers: bool) -> str | None:
        """Return why it cannot run as requested, None if it can."""
        if quick and self.quick is None:
            return "it has no small setting"
        if self.peer and not peers:
            return "it installs other tools: --peers"
        if any("{data}" in argument for argument in self.arguments) and not data.is_dir():
            return f"there are no data in {data}: --data"
        return None


def number(text: str) -> float:
    """Parse the number at the beginning of a table cell; `95%` is 0.95, `4 of 5` is 0.8. NaN if there is none."""
    found = re.match(r"([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?: of (\d+)|(%))?", text)
    if found is None:
        return float("nan")
    value = float(found[1].replace(",", ""))
    return value / float(found[2]) if found[2] else value / 100 if found[3] else value


def look_up(tables: Sequence[pd.DataFrame], column: str, where: Row) -> float:
    """Return the number in ``column`` of the first row that matches ``where``. Raises LookupError if there is none."""
    for table in tables:
        if column in table and set(where) <= set(table):
            fits = table[(table[list(where)] == pd.Series(dict(where))).all(axis=1)]
            if len(fits):
                return number(fits[column].iloc[0])
    raise LookupError(f"no table has a column {column!r} and a row {dict(where)}")


def headlines(benchmark: Benchmark, page: str) -> list[dict[str, str | float]]:
    """Return rows of figure, kind and value from the page of a benchmark."""
    tables, rows = read_markdown(page), []
    for figure in benchmark.figures:
        value = look_up(tables, figure.column, figure.where)
        if figure.over is not None:
            value /= look_up(tables, figure.column, figure.over)
        rows.append({"figure": figure.label, "kind": figure.kind, "value": value})
    return rows


def spots(column: str, over: str = "") -> Figure:
    """Return recall or precision of `spots` at 0.01 molecules per pixel, alone or divided by that of another method."""
    row = {"density": "0.01", "method": "spots"}
    if over:
        return Figure(f"{column}, spots / {over}", column, row, row | {"method": over}, "ratio")
    return Figure(f"{column}, spots", column, row)


BENCHMARKS = (
    Benchmark(
        "decode", "accuracy and calibration of the decoders by density", "decode.py", quick=["--quick"],
        figures=[spots("recall"), spots("precision"), spots("recall", "pixels")],
    ),
    Benchmark(
        "robustness", "the decoders on autofluorescent cells, shifted bits, and other rates, PSF, signal or codebooks",
        "robustness.py", quick=["--quick"],
        figures=[
            Figure(f"recall, {world}", "recall", {"world": world, "method": "spots"})
            for world in ("nothing", "cells glow")
        ],
    ),
    Benchmark(
        "efficiency", "detection efficiency reported by a run, against the truth", "efficiency.py",
        figures=[
            Figure(f"{column}, spots", column, {"method": "spots", "molecules/px": "0.01"})
            for column in ("true", "stated")
        ],
    ),
    Benchmark(
        "decode_speed", "time of the decoders against reading the stack once and a ball tree; memory",
        "decode_speed.py", quick=["--quick"],
        figures=[
            Figure("pixels, kernel / reading the stack", "times_reading", {"what": "pixels: kernel and molecules"},
                   kind="ratio"),
            Figure("spots, peak memory / stack", "peak_over_stack", {"method": "spots", "stack": "raw uint16"},
                   kind="ratio"),
        ],
    ),
    Benchmark(
        "decode_peers", "starfish on the same simulated stacks", "peers/decode.py", peer=True,
        figures=[
            Figure("recall, spots / starfish pixels", "recall", {"density": "0.01", "method": "merfish spots"},
                   {"density": "0.01", "method": "starfish pixels, own filters"}, "ratio"),
        ],
    ),
    Benchmark(
        "decode_real", "real images against permuted codebooks; images rendered from real molecules", "decode_real.py",
        ["--data", "{data}"], ["--data", "{data}", "--quick"],
        figures=[Figure("genes / blanks, field 0", "ratio", {"method": "spots", "field": "0"}, kind="ratio")],
    ),
    Benchmark(
        "imaging", "recall lost to drift, colours, uneven light, haze, hot pixels and stage errors", "imaging.py",
        quick=["--quick"],
        figures=[
            Figure(f"recall, {name}", "recall, default", {"experiment": name})
            for name in ("perfect", "all disturbances")
        ],
    ),
    Benchmark(
        "registration", "drift of 200 rounds with beads that move, disappear or saturate", "registration.py",
        quick=["--quick"],
    ),
    Benchmark(
        "pipeline_speed", "time of a large field by step, of tiny ones, one worker against two; memory and disk",
        "pipeline_speed.py", quick=["--only", "tiny", "--tiny", "20"],
        figures=[
            Figure("ms per tiny field, two processes", "ms per field", {"processes": "2"}, kind="number"),
        ],
    ),
    Benchmark(
        "pipeline_scale", "memory and time of everything after decoding", "pipeline_scale.py",
        quick=["--fields", "10", "--molecules", "5000"],
    ),
    Benchmark("faults", "faulty inputs, kills, damage, a full disk: messages, and the same results", "faults.py"),
    Benchmark(
        "fuzz", "mutated images and tables: which are accepted or rejected, and how fast", "fuzz.py",
        quick=["--number", "20"],
        figures=[Figure("TIFF, neither accepted nor rejected", "other outcomes", {"kind": "TIFF"}, kind="number")],
    ),
    Benchmark(
        "cells", "segmentation of simulated tissues: cells, molecules in their cells, volumes, borders", "cells.py",
        figures=[
            Figure("F1 of cells", "F1", {"tissue": "usual", "planes": "1", "resolution": "blocks"}),
            Figure("CPU time, full / blocks", "CPU time, full / blocks", {"tissue": "usual", "planes": "1"},
                   kind="ratio"),
        ],
    ),
    Benchmark(
        "stacked_cells", "segmentation of simulated tissues of two layers of cells", "stacked_cells.py",
        quick=["--quick"],
    ),
    Benchmark(
        "exchange", "assignment to real outlines; memory and time by number of cells", "exchange.py",
        ["--data", "{data}"], ["--data", "{data}", "--cells", "1000", "--pixels", "8192"],
        figures=[],
    ),
    Benchmark(
        "embedding", "domains against averages of principal components; needs '.[vae,analysis]'", "embedding.py",
        figures=[
            Figure("ARI, SpatialVAE.domains", "median", {"method": "SpatialVAE.domains"}),
            Figure("ARI, SpatialVAE.domains / mean of 15 neighbours", "median", {"method": "SpatialVAE.domains"},
                   {"method": "mean of 15 neighbours"}, "ratio"),
        ],
    ),
    Benchmark(
        "domains", "domains before and after training, and their number", "domains.py",
        [f"{{data}}/spatial_tables/{name}" for name in (
            "starmap_mpfc_BZ5.h5ad:z", "starmap_mpfc_BZ14.h5ad:z", "osmfish_cortex.h5ad:Region")],
        ["--seeds", "1", "--simulated", "1"],
    ),
    Benchmark(
        "batches", "transfer of cell types to another batch, with and without batch_key", "batches.py", ["{data}"],
    ),
    Benchmark(
        "heldout", "likelihood of held-out cells and counts, cell types; needs '.[vae,analysis]'", "heldout.py",
        ["{data}"],
        figures=[Figure("log p(x) [nats per cell], osmFISH", "osmfish", {"method": "SpatialVAE"}, kind="number")],
    ),
    Benchmark(
        "neighbours", "information from neighbours by niche_encoder; coverage of intervals of counts and latents",
        "neighbours.py",
        [f"{{data}}/spatial_tables/{name}.h5ad" for name in (
            "starmap_mpfc_BZ5", "starmap_mpfc_BZ14", "osmfish_cortex", "merfish_hypothalamus", "merfish_mop_slice1")],
    ),
    Benchmark(
        "distribution", "evidence, coverage of intervals, imputation, differential expression, sampled tissue",
        "distribution.py", ["{data}"],
        figures=[Figure("coverage of 90 % intervals, osmFISH", "coverage by rank", {"table": "osmfish"})],
    ),
    Benchmark(
        "dependence", "partial correlations of a known chain, neighbour effects, Potts models", "dependence.py",
        figures=[Figure("coverage of 95 % intervals of couplings", "coverage of 95 % intervals", {"seeds": "20"})],
    ),
    Benchmark(
        "single_cell", "dissociated cells: clusters and held-out likelihood, compared with scVI", "single_cell.py",
        ["--data", "{data}/single_cell"], peer=True,
    ),
    Benchmark(
        "training_speed", "training speed and the time of each part of a step", "training_speed.py",
        figures=[
            Figure("SpatialVAE / products alone, minibatch 1024", "minibatch 1024",
                   {"": "SpatialVAE, without neighbours"}, {"": "matrix products alone"}, "ratio"),
        ],
    ),
)  # fmt: skip
