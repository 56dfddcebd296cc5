"""Scores of calls against the truth, matched one to one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree


def match_calls(calls: pd.DataFrame, truth: pd.DataFrame, radius: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Match calls with molecules of the same barcode_id within ``radius`` pixels, each at most once.

    The closest pairs are matched first. Returns the rows of calls (pair,) int64 and the rows of truth (pair,) int64.
    """
    if not len(calls) or not len(truth):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # A third axis separates barcodes by more than the radius.
    found, real = (
        cKDTree(np.column_stack([table["x"], table["y"], 3.0 * radius * table["barcode_id"].to_numpy(float)]))
        for table in (calls, truth)
    )
    pairs = found.sparse_distance_matrix(real, radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"], pairs["v"]))]
    call_used, truth_used = np.zeros(len(calls), bool), np.zeros(len(truth), bool)
    kept = []
    for row, (i, j) in enumerate(zip(pairs["i"], pairs["j"], strict=True)):
        if not (call_used[i] or truth_used[j]):
            call_used[i] = truth_used[j] = True
            kept.append(row)
    return pairs["i"][kept].astype(np.int64), pairs["j"][kept].astype(np.int64)


def score_calls(
    calls: pd.DataFrame,
    truth: pd.DataFrame,
    radius: float = 2.0,
    margin: float = 10.0,
    *,
    shape: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Score calls against the truth, matched by `match_calls` within ``radius`` pixels.

    calls, truth: tables with barcode_id, x, y (pixels). shape: (y, x) of the field; if given, recall counts only
    molecules, and precision only calls, at least ``margin`` pixels inside the border; their partners may lie in the
    margin, so that neither is penalised at the border. Calls of blanks count as wrong.

    Returns recall, precision, n_truth, n_calls, and over the matched calls median_error (pixels), bias_x and
    bias_y (mean of call minus truth, pixels). Quantities that are not defined are NaN.
    """
    call_rows, truth_rows = match_calls(calls, truth, radius)
    inner_calls, inner_truth = (_inside(table, margin, shape) for table in (calls, truth))
    matched = inner_calls[call_rows]
    dx, dy = (
        calls[axis].to_numpy(float)[call_rows[matched]] - truth[axis].to_numpy(float)[truth_rows[matched]]
        for axis in ("x", "y")
    )
    some = len(dx) > 0
    return {
        "recall": _fraction(inner_truth[truth_rows].sum(), inner_truth.sum()),
        "precision": _fraction(matched.sum(), inner_calls.sum()),
        "n_truth": float(inner_truth.sum()),
        "n_calls": float(inner_calls.sum()),
        "median_error": float(np.median(np.hypot(dx, dy))) if some else np.nan,
        "bias_x": float(dx.mean()) if some else np.nan,
        "bias_y": float(dy.mean()) if some else np.nan,
    }


def _inside(table: pd.DataFrame, margin: float, shape: tuple[int, int] | None) -> np.ndarray:
    if shape is None:
        return np.ones(len(table), bool)
    x, y = table["x"].to_numpy(float), table["y"].to_numpy(float)
    height, width = shape
    low, high = margin - 0.5, -margin - 0.5
    return (x >= low) & (x < width + high) & (y >= low) & (y < height + high)


def _fraction(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
