"""Time of the parts of a run: one large field, 3,000 tiny ones, and one worker against two.

    python benchmarks/pipeline_speed.py [--only field tiny scaling memory] [--tiny 3000]

Writes benchmarks/results/pipeline_speed.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from tables import RESULTS

import merfish
from merfish import mhd4_codebook, results, simulate_stack
from merfish.codebook import write_codebook
from merfish.simulate import simulate_experiment


def field(folder: Path, _: int) -> list[str]:
    """Measure a field of 16 bits, beads and two stains, 2048 x 2048 px, from its files to its record, on all cores."""
    raw = simulate_experiment(folder / "raw", fields=(1, 2), shape=(2048, 2048), seed=1)
    for k in range(2):  # the first iteration compiles the kernels or reads them from their cache
        merfish.run(raw, out=folder / f"out{k}")
    record = results.read_run(folder / "out1")
    rows = ["| field | register | decode | segment | write | all |", "|---|---|---|---|---|---|"]
    for fov, said in record["fields"].items():
        seconds = [said["seconds"][name] for name in ("register", "decode", "segment", "write")]
        rows.append(f"| {fov} | " + " | ".join(f"{s:.2f} s" for s in (*seconds, sum(seconds))) + " |")
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["seconds"].items())
    return [*rows, "", f"The whole run of two fields: {steps}."]


def tiny(folder: Path, n: int) -> list[str]:
    """Run registered stacks of 16 x 24 x 24 px, so small that almost no time is spent on decoding."""
    book = mhd4_codebook([f"gene{k}" for k in range(130)])
    raw = folder / "raw"
    raw.mkdir()
    write_codebook(book, raw / "codebook.csv")
    (raw / "microscope.json").write_text('{"microns_per_pixel": 0.1}')
    side = int(np.ceil(np.sqrt(n)))
    (raw / "positions.csv").write_text("".join(f"{2.4 * (k % side)},{2.4 * (k // side)}\n" for k in range(n)))
    stack, _ = simulate_stack(book, shape=(384, 384), density=0.01, seed=0)
    corners = np.random.default_rng(0).choice(360**2, n, replace=False)  # duplicate positions are rejected
    for k, (top, left) in enumerate(zip(*divmod(corners, 360), strict=True)):
        np.save(raw / f"stack_{k}.npy", stack[:, top : top + 24, left : left + 24])
    rows = ["| fields | processes | ms per field | peak memory of the parent, MB |", "|---|---|---|---|"]
    for fovs, workers in ((range(n // 10), None), (range(n), None), (range(n), 2)):
        started = time.perf_counter()
        merfish.run(raw, out=folder / f"out {len(fovs)} {workers}", fovs=list(fovs), workers=workers)
        spent = 1e3 * (time.perf_counter() - started) / len(fovs)
        peak = psutil.Process().memory_info().rss / 1e6
        rows.append(f"| {len(fovs)} | {workers or 'this one'} | {spent:.0f} | {peak:.0f} |")
    return rows


def scaling(folder: Path, _: int) -> list[str]:
    """Run 16 fields of 1024 x 1024 px with one worker on one core, and with two on one core each."""
    raw = simulate_experiment(folder / "raw", fields=(4, 4), shape=(1024, 1024), seed=2)
    merfish.run(raw, out=folder / "warm", fovs=[0], workers=2)
    seconds, allowed = {}, os.sched_getaffinity(0)
    for workers in (1, 2):
        os.sched_setaffinity(0, sorted(allowed)[:workers])  # one worker alone would use all cores
        merfish_run = merfish.run(raw, out=folder / f"out{workers}", workers=workers)
        assert merfish_run.n_obs
        seconds[workers] = results.read_run(folder / f"out{workers}")["seconds"]
    os.sched_setaffinity(0, allowed)
    rows = ["| step | 1 worker | 2 workers | ratio |", "|---|---|---|---|"]
    for name in ("calibrate", "fields", "total"):
        one, two = seconds[1][name], seconds[2][name]
        rows.append(f"| {name} | {one:.1f} s | {two:.1f} s | {one / two:.2f} |")
    return rows


def memory(folder: Path, _: int) -> list[str]:
    """Measure peak memory of a process that runs two fields of 16 bits on all cores, and disk space of the results."""
    rows = ["| field, px | peak memory, MB | molecules found | disk, MB per field |", "|---|---|---|---|"]
    code = "import merfish, resource, sys; merfish.run(sys.argv[1], out=sys.argv[2]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    for side in (1024, 2048):
        raw, out = folder / f"raw{side}", folder / f"out{side}"
        simulate_experiment(raw, fields=(1, 2), shape=(side, side), seed=1)
        done = subprocess.run([sys.executable, "-c", code, raw, out], stdout=subprocess.PIPE, text=True, check=True)
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2
        n_found = results.read_run(out)["figures"]["n_found"]
        rows.append(f"| {side} x {side} | {int(done.stdout) / 1e6:.0f} | {n_found:,} | {disk / 1e6:.1f} |")
    return rows


def main() -> None:
    parts: dict[str, Callable[[Path, int], list[str]]] = {
        "field": field, "tiny": tiny, "scaling": scaling, "memory": memory,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--tiny", type=int, default=3000)
    options = parser.parse_args()
    page = RESULTS / "pipeline_speed.md"
    known = dict(part.split("\n\n", 1) for part in page.read_text().split("## ")[1:]) if page.is_file() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            lines = parts[name](Path(folder), options.tiny)
        known[name] = f"{parts[name].__doc__}\n\n" + "\n".join(lines)
        print(known[name])
    text = "".join(f"## {name}\n\n{known[name].strip()}\n\n" for name in parts if name in known)
    page.write_text(f"Made by `python benchmarks/pipeline_speed.py`.\n\n{text.strip()}\n")


if __name__ == "__main__":
    main()
