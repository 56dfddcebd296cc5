"""Accuracy, speed, memory and drift error of the decoders, measured side by side: python benchmarks/decode.py.

Writes benchmarks/results/decode.md, decode.json, decode.png and decode_calibration.png. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd

from merfish import decode, mhd4_codebook, plots, simulate_stack
from merfish.decoding.filtering import rate_calls
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.decoding.molecules import extract_molecules
from merfish.decoding.pixels import decode_hard, decode_soft, distance_threshold, magnitude_threshold
from merfish.imaging.normalize import Normalization, peak_normalization
from merfish.imaging.preprocess import Bandpassed, bandpass
from merfish.imaging.registration import measure_drift
from merfish.pipeline import decode_all
from merfish.simulate import match_calls, score_calls

RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.003, 0.01, 0.03, 0.1)  # molecules a pixel
BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
# at 0.945, 0.94 and 0.92 precision the spot decoder has to reach 0.84, 0.82 and 0.74
PRECISION = {0.003: 0.945, 0.01: 0.94, 0.03: 0.92, 0.1: 0.9}


def accuracy(shape: tuple[int, int], seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method with its defaults on raw simulated stacks: scores, one row a density, seed and method, and calls."""
    rows, calls = [], []
    for density in DENSITIES:
        for seed in range(100, 100 + seeds):
            stack, truth = simulate_stack(BOOK, shape=shape, density=density, seed=seed)
            for method in METHODS:
                found = decode_all(stack, BOOK, method=method)
                score = score_calls(decode(stack, BOOK, method=method), truth, shape=shape)
                labels = {"density": density, "seed": seed, "method": method}
                calls.append(judge(found, truth, shape).assign(**labels))
                ece = calibration_error(calls[-1])
                at = recall_at_precision(calls[-1], score["n_truth"], PRECISION[density])
                rows.append({**labels, "ece": ece, "recall_at": at, **score})
    return pd.DataFrame(rows), pd.concat(calls, ignore_index=True)


def judge(found: pd.DataFrame, truth: pd.DataFrame, shape: tuple[int, int]) -> pd.DataFrame:
    """One row a call: probability stated, whether it is right, whether it lies (its molecule lies) 10 px inside."""
    height, width = shape
    inner, inner_truth = (
        (table["x"].between(9.5, width - 10.5) & table["y"].between(9.5, height - 10.5)).to_numpy()
        for table in (found, truth)
    )
    call, real = match_calls(found, truth)
    right, finds = np.zeros(len(found), bool), np.zeros(len(found), bool)
    right[call], finds[call] = True, inner_truth[real]
    stated = found["probability"].to_numpy(float)
    return pd.DataFrame({"probability": stated, "right": right, "inner": inner, "finds": finds})


def calibration(calls: pd.DataFrame) -> pd.DataFrame:
    """Judged calls in ten bins of stated probability: n, and the mean of ``stated`` and ``right``."""
    groups = calls.groupby(np.minimum((calls["probability"] * 10).astype(int), 9))
    return groups.agg(n=("right", "size"), stated=("probability", "mean"), right=("right", "mean"))


def calibration_error(calls: pd.DataFrame) -> float:
    """Expected calibration error: the mean distance of stated and right over the calls, bin by bin."""
    bins = calibration(calls)
    return float((bins["n"] * (bins["stated"] - bins["right"]).abs()).sum() / max(len(calls), 1))


def ranked(calls: pd.DataFrame, n_truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision (call,) when judged calls are kept from the most probable on."""
    order = calls.sort_values("probability", ascending=False, kind="stable")
    precision = (order["right"] & order["inner"]).cumsum() / order["inner"].cumsum().clip(lower=1)
    return (order["finds"].cumsum() / n_truth).to_numpy(), precision.to_numpy()


def recall_at_precision(calls: pd.DataFrame, n_truth: float, precision: float) -> float:
    """Largest recall at a precision when judged calls are kept from the most probable on, 10 px margin."""
    recall, reached = ranked(calls, n_truth)
    return float(recall[reached >= precision].max(initial=0.0))


def best_of(work: Callable[[], Any], repeats: int = 5) -> float:
    """Shortest of some runs, seconds, after one to compile."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@numba.njit(parallel=True)
def read_once(flat: np.ndarray) -> int:
    """Sum of all words of memory: what any decoder must at least do."""
    total = np.uint64(0)
    for k in numba.prange(len(flat)):
        total += flat[k]
    return total


def ball_tree_reference(stack: np.ndarray) -> int:
    """Pixels by scikit-learn's neighbours and molecules by scikit-image's regions, as MERlin and starfish do."""
    from skimage.measure import label, regionprops
    from sklearn.neighbors import NearestNeighbors

    n_bits, height, width = stack.shape
    vectors = np.maximum(stack.reshape(n_bits, -1).T, 0)
    norm = np.linalg.norm(vectors, axis=1)
    words = BOOK.words / np.linalg.norm(BOOK.words, axis=1, keepdims=True)
    tree = NearestNeighbors(n_neighbors=1, algorithm="ball_tree").fit(words)
    distance, word = tree.kneighbors(vectors / np.maximum(norm, 1e-6)[:, None])
    good = (distance[:, 0] < distance_threshold(4)) & (norm > magnitude_threshold(4))
    image = np.where(good, word[:, 0] + 1, 0).reshape(height, width)
    weight = norm.reshape(height, width)
    return sum(
        len([r.centroid_weighted for r in regionprops(label(image == w + 1), intensity_image=weight)])
        for w in range(BOOK.n_words)
    )


def speed(side: int) -> tuple[pd.DataFrame, float]:
    """Times of a side x side stack at 0.01 molecules a pixel, and of the reference on a crop, scaled."""
    raw, _ = simulate_stack(BOOK, shape=(side, side), density=0.01, seed=1)
    floor = best_of(lambda: read_once(raw.ravel().view(np.uint64)))
    seen = Bandpassed(raw, smoothing=1.0, background=3.0)
    smooth, scale = seen[:, :], peak_normalization(seen)
    smooth -= scale.background[:, None, None]
    smooth *= scale.gain[:, None, None]
    same = Normalization.identity(16)
    level = Normalization(scale.background + np.median(raw[:, ::8, ::8], axis=(1, 2)), scale.scale)

    def molecules() -> None:
        extract_molecules(decode_soft(smooth, BOOK, same), smooth, BOOK, same, height=side)

    rows = [
        ("read the raw stack once", floor),
        ("hamming: kernel, uint16", best_of(lambda: decode_hard(raw, BOOK, level))),
        ("hamming: kernel, filtered float32", best_of(lambda: decode_hard(smooth, BOOK, same))),
        ("band-pass alone", best_of(lambda: bandpass(raw, smoothing=1.0, background=3.0))),
        ("background and scale of each bit", best_of(lambda: peak_normalization(seen))),
        ("pixels: kernel, filtered float32", best_of(lambda: decode_soft(smooth, BOOK, same))),
        ("pixels: kernel with band-pass, uint16", best_of(lambda: decode_soft(seen, BOOK, scale))),
        ("pixels: kernel and molecules", best_of(molecules)),
    ]
    for name in METHODS:

        def from_filtered(name: str = name) -> None:
            rate_calls(decode_filtered(smooth, BOOK, same, method=name), BOOK)

        def from_raw(name: str = name) -> None:
            decode(raw, BOOK, method=name)

        rows.append((f"{name}: filtered stack, everything", best_of(from_filtered)))
        rows.append((f"{name}: raw stack, everything", best_of(from_raw)))
    crop = min(side, 256)
    start = time.perf_counter()
    ball_tree_reference(np.ascontiguousarray(smooth[:, :crop, :crop]))
    rows.append(("ball tree and regionprops, scaled from a crop", (time.perf_counter() - start) * (side / crop) ** 2))
    table = pd.DataFrame(rows, columns=["what", "seconds"])
    table["ns_per_pixel"] = table["seconds"] / side**2 * 1e9
    table["times_reading"] = table["seconds"] / floor
    return table, floor


def peak_memory(side: int) -> pd.DataFrame:
    """Peak memory of a decode with its stack, as a multiple of the stack, each in a fresh process."""
    rows = []
    for method, preprocess in [(name, flag) for name in METHODS for flag in (False, True)]:
        command = [sys.executable, __file__, "--memory", method, str(int(preprocess)), str(side)]
        ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append((method, "raw uint16" if preprocess else "filtered float32", ratio))
    return pd.DataFrame(rows, columns=["method", "stack", "peak_over_stack"])


def measure_memory(method: str, preprocess: bool, side: int) -> float:
    """Growth of the largest resident size by one decode, over the stack's bytes."""
    small, _ = simulate_stack(BOOK, shape=(64, 64), seed=1)
    decode(small, BOOK, method=method)  # compiled code is not the stack's
    decode(small.astype(np.float32), BOOK, method=method, preprocess=False)
    stack, _ = simulate_stack(BOOK, shape=(side, side), density=0.01, seed=1)
    if not preprocess:
        stack = bandpass(stack, smoothing=1.0, background=3.0)
        stack /= peak_normalization(stack).scale[:, None, None]
    Path("/proc/self/clear_refs").write_text("5")  # forget the simulator's peak
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    decode(stack, BOOK, method=method, preprocess=preprocess)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - before + stack.nbytes) / stack.nbytes


def drift_error(rounds: int) -> pd.Series:
    """Errors of measured drift, pixels, over simulated bead images drifting up to 20 px."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(rounds):
        beads, shift = rng.uniform(-30, 542, (60, 2)), rng.uniform(-20, 20, 2)
        light = 2000 * np.exp(rng.normal(0, 0.4, 60))
        images = [rng.poisson(100 + spots(beads + move, light)) for move in (np.zeros(2), shift)]
        found = measure_drift(np.stack(images).astype(np.uint16)).iloc[1]
        errors.append(np.hypot(found["dy"] - shift[0], found["dx"] - shift[1]))
    return pd.Series(errors)


def spots(places: np.ndarray, light: np.ndarray, size: int = 512, sigma: float = 1.4) -> np.ndarray:
    """An image (size, size) of Gaussian spots at (y, x)."""
    grid = np.arange(size)
    profile = [np.exp(-((grid[:, None] - places[:, axis]) ** 2) / (2 * sigma**2)) for axis in (0, 1)]
    return (profile[0] * light) @ profile[1].T


def draw(scores: pd.DataFrame, calls: pd.DataFrame, path: Path) -> None:
    """Recall against precision of ranked calls by density, with the best possible when places and bits are known."""
    figure, axes = plots.new_figure(13, 3.8, len(DENSITIES))
    best = {0.003: (0.943, 0.853), 0.01: (0.949, 0.857), 0.03: (0.949, 0.869)}
    for ax, density in zip(axes, DENSITIES, strict=True):
        for method, colour in zip(METHODS, plots.CATEGORIES, strict=False):
            score, judged = (t[(t["density"] == density) & (t["method"] == method)] for t in (scores, calls))
            recall, precision = ranked(judged, score["n_truth"].sum())
            some = recall > 0.02  # the share of right ones among a few calls is no precision
            ax.plot(precision[some], recall[some], color=colour, label=method)
            ax.plot(score["precision"].mean(), score["recall"].mean(), "o", color=colour, markersize=6)
        ax.axvline(PRECISION[density], color=plots.MUTED, linewidth=0.8, linestyle=":")
        if density in best:
            ax.plot(*best[density], "k*", markersize=11, label="best possible")
        ax.set(title=f"{density} molecules/px", xlabel="precision", xlim=(0.7, 1), ylim=(0, 1))
    axes[0].set_ylabel("recall")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left", title="dots: kept at 5 %", title_fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def draw_calibration(calls: pd.DataFrame, path: Path) -> None:
    """Share of right calls against the probability stated, by method and density; bins of fewer than 50 left out."""
    figure, axes = plots.new_figure(11, 3.8, len(METHODS))
    for ax, method in zip(axes, METHODS, strict=True):
        for density, colour in zip(DENSITIES, plots.CATEGORIES, strict=False):
            bins = calibration(calls[(calls["density"] == density) & (calls["method"] == method)])
            bins = bins[bins["n"] >= 50]
            ax.plot(bins["stated"], bins["right"], "o-", color=colour, label=f"{density} molecules/px", markersize=4)
        ax.plot([0, 1], [0, 1], color=plots.MUTED, linewidth=1)
        ax.set(title=method, xlabel="probability stated", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("share right")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers rounded."""
    text = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(quick: bool) -> None:
    """Measure everything and write the tables."""
    shape, seeds, side, rounds = ((256, 256), 1, 512, 10) if quick else ((768, 768), 3, 2048, 100)
    scores, calls = accuracy(shape, seeds)
    mean = scores.groupby(["density", "method"], sort=False).mean().drop(columns="seed")
    error = scores.groupby(["density", "method"], sort=False)["recall"].sem().rename("recall_se")
    times, floor = speed(side)
    memory, drift = peak_memory(side), drift_error(rounds)
    ratio = times["seconds"].iloc[-1] / times.set_index("what").loc["pixels: kernel and molecules", "seconds"]
    targets = ", ".join(f"{precision} at {density}" for density, precision in PRECISION.items())
    text = f"""Made by `python benchmarks/decode.py{" --quick" if quick else ""}`.

{platform.machine()}, {os.cpu_count()} cores, {numba.get_num_threads()} threads, Python {platform.python_version()},
NumPy {version("numpy")}, Numba {version("numba")}.

## Accuracy, raw stacks of {shape[0]} x {shape[1]}, {seeds} seeds, calls kept at the default rate of 5 %

`recall_at`: recall when calls are kept from the most probable on until precision falls to {targets} molecules/px.
`ece`: expected calibration error of `probability`. Errors in pixels. `recall_se`: standard error over seeds.

{as_markdown(mean.join(error).reset_index())}

## Time of one 16 x {side} x {side} stack, 0.01 molecules/px

Floor: reading the stack once, {floor / side**2 * 1e9:.1f} ns a pixel. Pixels with molecules are {ratio:.0f} times
faster than the reference.

{as_markdown(times)}

## Peak memory of a decode, the stack included

{as_markdown(memory)}

## Drift of {rounds} simulated bead images, up to 20 px

median {drift.median():.3f} px, largest {drift.max():.3f} px
"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode.md").write_text(text)
    tables = {"accuracy": scores, "times": times, "memory": memory}
    record = {name: table.to_dict("list") for name, table in tables.items()}
    (RESULTS / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(scores, calls, RESULTS / "decode.png")
    draw_calibration(calls, RESULTS / "decode_calibration.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(options.memory[0], options.memory[1] == "1", int(options.memory[2])))
    else:
        main(options.quick)
