"""starfish and the decoders of merfish on the same simulated stacks: python benchmarks/peers/decode.py.

Creates an environment for starfish outside the repository (``--cache``), installs it from PyPI, and writes
benchmarks/results/decode_peers.md. ``--quick`` is a smoke run of small fields. With ``--worlds FOLDER`` only starfish
runs, on the first stack of each world in one plane of benchmarks/robustness.py: scores go to FOLDER, where
``robustness.py --peers FOLDER`` reads them; existing files are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from embed import environment

from merfish import decode, mhd4_codebook, simulate_stack
from merfish.decoding.methods import METHODS
from merfish.imaging.normalize import peak_normalization
from merfish.imaging.preprocess import bandpass
from merfish.simulate import Imaging, score_calls

sys.path.append(str(Path(__file__).parents[1]))
from memory import forget_peak, peak_bytes
from tables import as_markdown

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "decode_peers.md"
DENSITIES = (0.003, 0.01, 0.03)  # molecules a pixel
BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
DISTANCE = 0.5176  # starfish's notebook: one lost bit
MAGNITUDES = (0.25, 0.5, 0.87)  # in molecules; of these starfish is given the one that suits it best
BLOB = 0.3  # in molecules, height of a blob in the brightest bit
PIXELS = (("pixels", "own"), ("pixels", "ours"))  # route, filters
ROUTES = (*PIXELS, ("blobs", "own"), ("blobs", "ours"))


def run_worker(python: Path, folder: Path, step: str, **settings: float) -> dict[str, float]:
    """Run one step of starfish_worker.py on the files in ``folder``; returns its seconds and bytes."""
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [python, "-W", "ignore", str(HERE / "starfish_worker.py"), str(folder), step]
    run = subprocess.run(command, capture_output=True, text=True)  # its progress bars are of no use here
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{run.stderr}")
    return dict(json.loads((folder / "record.json").read_text()))


def starfish(
    python: Path,
    raw: np.ndarray,
    truth: pd.DataFrame,
    words: np.ndarray,
    psf_sigma: float,
    routes: tuple[tuple[str, str], ...] = ROUTES,
) -> pd.DataFrame:
    """Run starfish's methods on a raw stack; returns one row per method, filter and magnitude threshold.

    words (word, bit) of the codebook; psf_sigma: pixel, for its deconvolution.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "raw.npy", raw)
        np.save(folder / "words.npy", words)
        start = time.perf_counter()
        smooth = bandpass(raw, smoothing=METHODS["pixels"].smoothing, background=METHODS["pixels"].background)
        ours = {"seconds": time.perf_counter() - start, "bytes": 0.0}
        theirs = run_worker(python, folder, "filter", psf_sigma=psf_sigma)
        filters = {"own": (np.load(folder / "filtered.npy", allow_pickle=False), theirs), "ours": (smooth, ours)}
        for route, filter_name in routes:
            stack, before = filters[filter_name]
            scale = peak_normalization(stack)
            normalised = (stack - scale.background[:, None, None]) * scale.gain[:, None, None]
            np.save(folder / "normalised.npy", normalised.astype(np.float32))
            for magnitude in MAGNITUDES:
                record = run_worker(python, folder, route, distance=DISTANCE, magnitude=magnitude, blob=BLOB)
                calls = pd.read_csv(folder / "calls.csv")
                rows.append(
                    {
                        "method": f"starfish {route}, {filter_name} filters",
                        "magnitude": magnitude,
                        **score(calls, truth, raw),
                        "seconds": before["seconds"] + record["seconds"],
                        "peak_over_stack": max(before["bytes"], record["bytes"]) / raw.nbytes,
                    }
                )
    return pd.DataFrame(rows)


def score(calls: pd.DataFrame, truth: pd.DataFrame, raw: np.ndarray) -> dict[str, float]:
    """Return recall and precision, and their harmonic mean."""
    found = score_calls(calls, truth, shape=raw.shape[1:])
    recall, precision = found["recall"], found["precision"]
    return {"recall": recall, "precision": precision, "f1": 2 * recall * precision / max(recall + precision, 1e-9)}


def ours(raw: np.ndarray, truth: pd.DataFrame) -> pd.DataFrame:
    """Run the decoders of merfish with their defaults, each in a new process; returns one row per method."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "raw.npy", raw)
        for method in METHODS:
            subprocess.run([sys.executable, __file__, "--worker", str(folder), method], check=True)
            record = json.loads((folder / "record.json").read_text())
            calls = pd.read_csv(folder / "calls.csv")
            rows.append(
                {
                    "method": f"merfish {method}",
                    "magnitude": np.nan,
                    **score(calls, truth, raw),
                    "seconds": record["seconds"],
                    "peak_over_stack": record["bytes"] / raw.nbytes,
                }
            )
    return pd.DataFrame(rows)


def run_ours(folder: Path, method: str) -> None:
    """Decode raw.npy into calls.csv, and measure the time without compilation."""
    decode(simulate_stack(BOOK, shape=(64, 64), seed=1)[0], BOOK, method=method)
    stack = np.load(folder / "raw.npy", allow_pickle=False)
    before = forget_peak()
    start = time.perf_counter()
    decode(stack, BOOK, method=method).to_csv(folder / "calls.csv", index=False)
    seconds = time.perf_counter() - start
    record = {"seconds": seconds, "bytes": peak_bytes() - before + stack.nbytes}
    (folder / "record.json").write_text(json.dumps(record))


def best_settings(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per density and method at the magnitude with the largest f1: means over seeds, shortest time."""
    keys = ["density", "method", "magnitude"]
    summary = scores.groupby(keys, sort=False, dropna=False).agg(
        {"recall": "mean", "precision": "mean", "f1": "mean", "seconds": "min", "peak_over_stack": "mean"}
    )
    summary = summary.reset_index()
    return summary.loc[summary.groupby(["density", "method"], sort=False)["f1"].idxmax()].reset_index(drop=True)


def deliver_worlds(cache: Path, folder: Path) -> None:
    """Write the scores of starfish's pixel decoder on the worlds of robustness.py, one file per world."""
    sys.path.insert(0, str(HERE.parent))  # before this folder, which has a decode.py as well
    from robustness import SEEDS, WORLDS, peer_file

    python = environment(cache, "starfish")
    folder.mkdir(parents=True, exist_ok=True)
    for world in WORLDS:
        path = peer_file(folder, world)
        raw, truth, imaging, _ = world.simulate(SEEDS[0])
        if raw.ndim == 3 and not path.exists():
            table = starfish(python, raw, truth, world.book.words, float(np.mean(imaging.psf_sigma)), PIXELS)
            table.to_csv(path, index=False)


def main(cache: Path, quick: bool) -> None:
    """Run all measurements and write the table."""
    side, seeds = (192, 1) if quick else (768, 3)
    python = environment(cache, "starfish")
    tables = []
    for density in DENSITIES:
        for seed in range(100, 100 + seeds):
            raw, truth = simulate_stack(BOOK, shape=(side, side), density=density, seed=seed)
            theirs = starfish(python, raw, truth, BOOK.words, float(np.mean(Imaging().psf_sigma)))
            for table in (ours(raw, truth), theirs):
                tables.append(table.assign(density=density))
    table = best_settings(pd.concat(tables, ignore_index=True))
    pins = (HERE / "starfish.txt").read_text().split("\n", 1)[1].split()
    tried = ", ".join(map(str, MAGNITUDES))
    text = f"""Made by `python benchmarks/peers/decode.py{" --quick" if quick else ""}`.

{platform.machine()}, {os.cpu_count()} cores; {", ".join(pins)}.

Raw stacks of {side} x {side}, {seeds} seeds, the same for all tools; calls are matched one to one with molecules of the
same word within 2 px, with a margin of 10 px. merfish: defaults. starfish: PixelSpotDecoder and CombineAdjacentFeatures
(distance at most {DISTANCE}, at least 2 px), and BlobDetector on the brightest bit with MetricDistance; after the
filters of its MERFISH notebook ("own": high pass 3, 15 rounds of Richardson-Lucy with the true mean PSF, low pass 1) or
after the band-pass of `pixels` ("ours"); all bits have the same scale for all tools. Its `magnitude` (in molecules) is
the one of {tried} with the largest harmonic mean of recall and precision (`f1`), which is chosen with the truth; users
cannot do this. `seconds`: shortest over seeds, with filters, without imports and compilation. `peak_over_stack`: of the
main process.

{as_markdown(table)}
"""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "merfish-peers"
    parser.add_argument("--cache", type=Path, default=default, help=f"folder of environments ({default})")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--worlds", type=Path, help="folder for scores on the worlds of robustness.py")
    options = parser.parse_args()
    if options.worker:
        run_ours(Path(options.worker[0]), options.worker[1])
    elif options.worlds:
        deliver_worlds(options.cache, options.worlds)
    else:
        main(options.cache, options.quick)
