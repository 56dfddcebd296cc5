"""Accuracy, speed, memory and drift error of the decoders: python benchmarks/decode.py.

Writes benchmarks/results/decode.md, decode.png and decode_calibration.png. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tables import RESULTS, as_markdown

from merfish import decode, mhd4_codebook, plots, simulate_stack
from merfish.decoding.methods import METHODS
from merfish.simulate import match_calls, score_calls
from merfish.stack import decode_all

DENSITIES = (0.003, 0.01, 0.03, 0.1)  # molecules per pixel
BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
# at a precision of 0.945, 0.94 and 0.92 the spot decoder has to reach a recall of 0.84, 0.82 and 0.74
PRECISION = {0.003: 0.945, 0.01: 0.94, 0.03: 0.92, 0.1: 0.9}


def accuracy(shape: tuple[int, int], seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run every method with its defaults on simulated stacks; returns scores by density, seed and method, and calls."""
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


def accuracy_in_planes(side: int, seeds: int) -> pd.DataFrame:
    """Run every method on stacks of five planes 2.5 depths of focus apart; z in planes, inner: within them."""
    rows = []
    for density, seed in product(DENSITIES[:2], range(100, 100 + seeds)):
        stack, truth = simulate_stack(BOOK, shape=(side, side), density=density, seed=seed, n_planes=5)
        for method in METHODS:
            calls = decode(stack, BOOK, method=method)
            score = score_calls(calls, truth, shape=(side, side))
            call, real = match_calls(calls, truth)
            error = calls["z"].to_numpy()[call] - truth["z"].to_numpy()[real]
            inner = error[truth["z"].between(0, 4).to_numpy()[real]]
            rows.append(
                {
                    "density": density,
                    "method": method,
                    "recall": score["recall"],
                    "precision": score["precision"],
                    "median_error_z": float(np.median(np.abs(error))),
                    "inner_median_error_z": float(np.median(np.abs(inner))),
                    "inner_rms_z": float(np.sqrt((inner**2).mean())),
                }
            )
    return pd.DataFrame(rows).groupby(["density", "method"], sort=False).mean().reset_index()


def judge(found: pd.DataFrame, truth: pd.DataFrame, shape: tuple[int, int]) -> pd.DataFrame:
    """Return a row per call: stated probability, whether it is correct, whether it (its molecule) is 10 px inside."""
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
    """Group judged calls into ten bins of the stated probability: n, and means of ``stated`` and ``right``."""
    groups = calls.groupby(np.minimum((calls["probability"] * 10).astype(int), 9))
    return groups.agg(n=("right", "size"), stated=("probability", "mean"), right=("right", "mean"))


def calibration_error(calls: pd.DataFrame) -> float:
    """Return the expected calibration error: the mean absolute difference of stated and observed rates."""
    bins = calibration(calls)
    return float((bins["n"] * (bins["stated"] - bins["right"]).abs()).sum() / max(len(calls), 1))


def ranked(calls: pd.DataFrame, n_truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision (call,) when judged calls are kept in order of decreasing probability."""
    order = calls.sort_values("probability", ascending=False, kind="stable")
    precision = (order["right"] & order["inner"]).cumsum() / order["inner"].cumsum().clip(lower=1)
    return (order["finds"].cumsum() / n_truth).to_numpy(), precision.to_numpy()


def recall_at_precision(calls: pd.DataFrame, n_truth: float, precision: float) -> float:
    """Return the highest recall at a precision when judged calls are kept by probability, with a margin of 10 px."""
    recall, reached = ranked(calls, n_truth)
    return float(recall[reached >= precision].max(initial=0.0))


def draw(scores: pd.DataFrame, calls: pd.DataFrame, path: Path) -> None:
    """Plot recall against precision of ranked calls by density, with the optimum for known positions and bits."""
    figure, axes = plots.new_figure(13, 3.8, len(DENSITIES))
    best = {0.003: (0.943, 0.853), 0.01: (0.949, 0.857), 0.03: (0.949, 0.869)}
    for ax, density in zip(axes, DENSITIES, strict=True):
        for method, colour in zip(METHODS, plots.CATEGORIES, strict=False):
            score, judged = (t[(t["density"] == density) & (t["method"] == method)] for t in (scores, calls))
            recall, precision = ranked(judged, score["n_truth"].sum())
            some = recall > 0.02  # the precision of very few calls is noise
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
    """Plot the share of correct calls against the stated probability, by method and density, without bins below 50."""
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


def main(quick: bool) -> None:
    """Run all measurements, and write the table and the plots."""
    shape, seeds = ((256, 256), 1) if quick else ((768, 768), 4)
    scores, calls = accuracy(shape, seeds)
    mean = scores.groupby(["density", "method"], sort=False).mean().drop(columns="seed")
    error = scores.groupby(["density", "method"], sort=False)["recall"].sem().rename("recall_se")
    targets = ", ".join(f"{precision} at {density}" for density, precision in PRECISION.items())
    text = f"""Made by `python benchmarks/decode.py{" --quick" if quick else ""}`.

Raw stacks of {shape[0]} x {shape[1]}, {seeds} seeds, calls kept at the default rate of 5 %. `recall_at`: recall when
calls are kept in order of decreasing probability until precision falls to {targets} molecules/px.
`ece`: expected calibration error of `probability`. Errors in pixels. `recall_se`: standard error over seeds.

{as_markdown(mean.join(error).reset_index())}

## Five planes of {shape[0] // 2} x {shape[1] // 2}, {seeds} seeds, density per plane; errors of z in planes

{as_markdown(accuracy_in_planes(shape[0] // 2, seeds))}
"""
    (RESULTS / "decode.md").write_text(text)
    draw(scores, calls, RESULTS / "decode.png")
    draw_calibration(calls, RESULTS / "decode_calibration.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
