"""Memory and time of the steps after decoding, on intermediate files that this script writes as a run would.

    python benchmarks/pipeline_scale.py [--fields 300 3000] [--molecules 60000] [--workers 2] [--folder DIR]

Writes benchmarks/results/pipeline_scale.md. Fields of 2048 x 2048 px form a square grid with an overlap of a tenth, in
which both show the same molecules and cells. A field shows nine of ten molecules, a few are wrong, and the stage error
is 2 um. Each size runs in a separate process; memory is the largest resident set of any process of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import shapely
from tables import RESULTS

from merfish import mhd4_codebook, pipeline, results
from merfish._files import Packed, pack
from merfish.calls.fit import count_fit
from merfish.config import RunConfig
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.normalize import Normalization
from merfish.imaging.organization import Channel, Movie
from merfish.pipeline.cluster import run_map_on
from merfish.pipeline.fields import (
    CALL_COLUMNS,
    CALLS,
    OUTLINES,
    SPOTS,
    TALLY,
    write_outlines,
    write_spots,
    write_tally,
)
from merfish.pipeline.folder import new_record, new_stage, owned, read_record, said
from merfish.pipeline.progress import display
from merfish.pipeline.survey import Calibrated
from merfish.report import OVERVIEW
from merfish.transcripts import transcript_table

SIDE, SCALE, TILES = 2048, 0.108, 10  # pixels, micrometres per pixel, tiles along a field; neighbours share one of them
TILE = SIDE * SCALE / TILES
CELLS_A_TILE, RADIUS = 3, 6.0
ROUNDS = 8  # of two bits each
STAGE_ERROR, PLACE_ERROR, SEEN = 2.0, 0.03, 0.9
BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])


def tile(row: int, column: int, n: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Generate about n molecules and cell outlines of a tile of the tissue in micrometres, the same every time."""
    rng = np.random.default_rng([row + 1, column + 1])
    count = rng.poisson(n)
    word = rng.choice(np.flatnonzero(~BOOK.is_blank), count)
    x, y = (rng.random((2, count)) + np.array([[column], [row]])) * TILE
    centre = (rng.random((CELLS_A_TILE, 2)) + np.array([column, row])) * TILE
    return pd.DataFrame({"word": word, "x": x, "y": y}), shapely.buffer(shapely.points(centre), RADIUS, quad_segs=8)


def true_corner(fov: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first tile (row, column) of a field, and the stage error there (x, y, in micrometres)."""
    error = np.random.default_rng([7, fov]).normal(0, STAGE_ERROR, 2)
    return np.array(divmod(fov, columns)) * (TILES - 1), error


def write_field(out: Path, fov: int, columns: int, n_molecules: int) -> None:
    """Write one field's record like `merfish.pipeline.fields.FieldWork`."""
    first, error = true_corner(fov, columns)
    around = range(-1, TILES + 1)
    parts = [tile(first[0] + r, first[1] + c, n_molecules // TILES**2) for r in around for c in around]
    corner = first[::-1] * TILE + error
    rng = np.random.default_rng([1, fov])
    molecules = pd.concat([part for part, _ in parts], ignore_index=True)
    molecules = molecules[rng.random(len(molecules)) < SEEN]
    place = molecules[["x", "y"]].to_numpy() - corner + rng.normal(0, PLACE_ERROR, (len(molecules), 2))
    x, y = place.T / SCALE
    inside = (x >= 0) & (x <= SIDE - 1) & (y >= 0) & (y <= SIDE - 1)
    odds = rng.normal(4, 3, inside.sum())
    wrong = rng.random(inside.sum()) < 1 / (1 + np.exp(odds))
    word = np.where(wrong, rng.integers(BOOK.n_words, size=inside.sum()), molecules["word"].to_numpy()[inside])
    calls = transcript_table(
        BOOK, word, x=x[inside], y=y[inside], hamming_distance=0, intensity=1.0, probability=1 / (1 + np.exp(-odds))
    )
    cells = np.concatenate([cells for _, cells in parts])
    pixels = shapely.transform(cells, lambda xy: (xy - corner) / SCALE)
    seen = shapely.intersection(pixels, shapely.box(-0.5, -0.5, SIDE - 0.5, SIDE - 0.5))
    seen = seen[shapely.area(seen) > 200]
    calls["nuclear"] = False
    measured = pd.DataFrame({"nucleus": np.full(len(seen), 0.3), "depth": 1.0})
    with new_record(results.field_folder(out, fov), {"made": "benchmark"}) as (folder, says):
        calls[list(CALL_COLUMNS)].to_parquet(folder / CALLS, index=False)
        write_outlines(list(seen), folder / OUTLINES, measured)
        write_spots([], folder / SPOTS)
        np.lib.format.open_memmap(folder / OVERVIEW, "w+", np.uint8, (SIDE, SIDE))  # black: uses no disk space
        write_tally(calls, BOOK, folder / TALLY)
        says |= {"drift": drift(fov), "shape": (SIDE, SIDE), "saturated": [0] * 16, "n_found": len(calls)}
        says |= {"n_outlines": len(seen), "quality": quality(fov), "fit": asdict(count_fit(calls))}
        says["seconds"] = dict(zip(("register", "decode", "segment"), rng.gamma(50, 0.06, 3).tolist(), strict=True))


def drift(fov: int) -> list[dict[str, float | int | bool]]:
    """Return the drift of each round of a field from the first, in pixels."""
    shifts = np.random.default_rng([5, fov]).normal(0, 2, (ROUNDS, 2))
    return [{"round": k, "dy": dy, "dx": dx, "ok": True} for k, (dy, dx) in enumerate(shifts.tolist())]


def quality(fov: int) -> dict[str, list]:
    """Return the quality figures of a normal field."""
    rng = np.random.default_rng([3, fov])
    names = ("brightness", "spots", "background", "noise", "width")
    numbers = {name: (100 * np.exp(rng.normal(0, 0.05, 16))).tolist() for name in names}
    rest = {
        "fov": [fov] * 16,
        "bit": list(BOOK.bit_names),
        "round": [k // 2 for k in range(16)],
        "likeness": [0.9] * 16,
    }
    return {**rest, "color": ["650", "750"] * 8, **numbers}


class WriteWork:
    """Writes one field."""

    def __init__(self, out: Path, columns: int, n_molecules: int) -> None:
        self.arguments = columns, n_molecules
        self.out = out

    def __call__(self, fov: int) -> None:
        write_field(self.out, fov, *self.arguments)


def experiment(out: Path, n_fields: int, columns: int) -> Experiment:
    """Build an experiment without images."""
    movie = Movie("none", "(?P<fov>[0-9]+)", -1)
    bits = tuple(Channel(name, name, 0, k, "650", movie, (k,), (0.0,), None) for k, name in enumerate(BOOK.bit_names))
    corners = [true_corner(fov, columns)[0][::-1] * TILE for fov in range(n_fields)]
    return Experiment(
        out, {}, BOOK, SCALE, False, False, False, None, np.array(corners, float), bits, (), {}, registered=True
    )


def combine(out: Path, n_fields: int, workers: int) -> None:
    """Run the steps after decoding."""
    columns = int(np.ceil(np.sqrt(n_fields)))
    source = experiment(out, n_fields, columns)
    calibrated = Calibrated(Calibration(Normalization.identity(16), {}, {}), "", {})
    with owned(out), display(out, False) as shown, run_map_on(workers if workers > 1 else None) as run_map:
        says = {}
        with shown.step("check records"):
            for fov in range(n_fields):
                record = read_record(results.field_folder(out, fov))
                assert record is not None
                says[fov] = pack(said(record))
        stage = new_stage(out)
        pipeline.write_results(source, RunConfig(), out, Packed(says), {}, calibrated, "key", stage, run_map, shown)
        pipeline.publish_results(out, stage)


def measure(folder: Path, n_fields: int, n_molecules: int, workers: int) -> dict[str, Any]:
    """Measure seconds and peak memory (bytes) of `combine`; intermediate files are written if they do not exist."""
    out = folder / f"run_{n_fields}"
    todo = [fov for fov in range(n_fields) if not results.field_folder(out, fov).exists()]
    columns = int(np.ceil(np.sqrt(n_fields)))
    with run_map_on(2) as run_map:
        for fov, failure in run_map(WriteWork(out, columns, n_molecules), todo):
            assert failure is None, (fov, failure)
    command = [sys.executable, __file__, "--combine", str(out), "--fields", str(n_fields), "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak: dict[int, int] = {}
    watch = threading.Thread(target=watch_memory, args=(process, peak))
    watch.start()
    assert process.wait() == 0
    watch.join()
    record = results.read_run(out)
    return {
        "fields": n_fields,
        "molecules": record["figures"]["n_found"],
        "cells": record["figures"]["n_cells"],
        "seconds": time.perf_counter() - started,
        "peak": max(peak.values()),
        "steps": record["seconds"],
        "stage_error_left": stage_error_left(record, columns),
    }


def watch_memory(process: subprocess.Popen, peak: dict[int, int]) -> None:
    """Record the largest resident set of a process and its children while it runs."""
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            for child in (parent, *parent.children(recursive=True)):
                peak[child.pid] = max(peak.get(child.pid, 0), child.memory_info().rss)
        except psutil.Error:
            pass
        time.sleep(0.2)


def stage_error_left(record: dict, columns: int) -> float:
    """Return the error of the corrected positions, rms along each axis, in micrometres, up to a common shift."""
    positions = np.array(record["stage"]["positions"])
    true = np.array(
        [first[::-1] * TILE + error for first, error in (true_corner(f, columns) for f in range(len(positions)))]
    )
    off = positions - true
    return float(np.sqrt(((off - off.mean(axis=0)) ** 2).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fields", type=int, nargs="+", default=[300, 3000])
    parser.add_argument("--molecules", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--combine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.combine:
        combine(options.combine, options.fields[0], options.workers)
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    rows = [measure(folder, n, options.molecules, options.workers) for n in options.fields]
    steps = [name for name in rows[0]["steps"] if name != "total"]
    text = [
        f"Made by `python benchmarks/pipeline_scale.py --fields {' '.join(map(str, options.fields))} "
        f"--molecules {options.molecules} --workers {options.workers}`.",
        "",
        "| fields | molecules found | cells | minutes | peak memory, MB | ms per field | error of positions, um |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['fields']} | {r['molecules']:,} | {r['cells']:,} | {r['seconds'] / 60:.1f} | {r['peak'] / 1e6:.0f} "
            f"| {1e3 * r['seconds'] / r['fields']:.0f} | {r['stage_error_left']:.3f} |"
            for r in rows
        ),
        "",
        "Seconds of each step:",
        "",
        "| fields | " + " | ".join(steps) + " |",
        "|---" * (len(steps) + 1) + "|",
        *(f"| {r['fields']} | " + " | ".join(f"{r['steps'].get(s, 0):.0f}" for s in steps) + " |" for r in rows),
    ]  # fmt: skip
    page = "\n".join(text) + "\n"
    (RESULTS / "pipeline_scale.md").write_text(page)
    print(page, json.dumps(rows, indent=1))
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    mp.freeze_support()
    main()
