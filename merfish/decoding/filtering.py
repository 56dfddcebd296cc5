"""Which calls to keep at a wanted misidentification rate, learnt from the blanks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.codebook import Codebook

MISIDENTIFICATION_RATE = 0.05  # share of kept calls that may be wrong; Chen et al. 2015 and MERlin aim at the same
RIDGE = 1.0  # pseudo-observations that pull each slope to 0 when there are few blanks
MIN_BLANK_CALLS = 5  # below this the blanks cannot tell one call from another


def misidentification_probability(features: np.ndarray, is_blank: np.ndarray, blank_fraction: float) -> np.ndarray:
    """Probability that each call is wrong.

    A wrong call falls on any word alike, so the chance that a call with these features is wrong is the chance that
    it is a blank, divided by the share of words that are blanks (the estimate of Moffitt et al. 2016, there for
    bins, here by logistic regression, which needs a few parameters where bins need as many as there are bins).

    features: (call, feature) float, anything that tells good calls from bad: brightness, area, distance.
    is_blank: (call,) bool. blank_fraction: blank words over all words.
    Returns (call,) float32 in [0, 1]; NaN for all calls if the codebook has no blanks; the overall rate for all
    calls if fewer than 5 are blanks.
    """
    n = len(is_blank)
    if blank_fraction <= 0 or n == 0:
        return np.full(n, np.nan, np.float32)
    if is_blank.sum() < MIN_BLANK_CALLS:
        return np.full(n, min(is_blank.mean() / blank_fraction, 1.0), np.float32)
    spread = features.std(axis=0)
    standard = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    blank = _logistic(np.column_stack([np.ones(n), standard]), is_blank.astype(float))
    return np.minimum(blank / blank_fraction, 1.0).astype(np.float32)


def _logistic(design: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Fitted probabilities of a ridge-penalised logistic regression (first column: free intercept), by Newton steps."""
    penalty = np.full(design.shape[1], RIDGE)
    penalty[0] = 0.0
    slope = np.zeros(design.shape[1])
    slope[0] = np.log(outcome.mean() / (1 - outcome.mean())) if 0 < outcome.mean() < 1 else 0.0
    fitted = np.full(len(outcome), outcome.mean())
    for _ in range(50):
        gradient = design.T @ (outcome - fitted) - penalty * slope
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        slope += np.clip(step, -2, 2)
        fitted = 1 / (1 + np.exp(-np.clip(design @ slope, -30, 30)))
        if np.abs(step).max() < 1e-8:
            break
    return fitted


def keep_at_rate(probability_wrong: np.ndarray, rate: float = MISIDENTIFICATION_RATE) -> np.ndarray:
    """The largest set of most trusted calls whose expected share of wrong ones is at most ``rate``; (call,) bool.

    With unknown probabilities (NaN) every call is kept.
    """
    if np.isnan(probability_wrong).any():
        return np.ones(len(probability_wrong), bool)
    order = np.argsort(probability_wrong, kind="stable")
    share = np.cumsum(probability_wrong[order], dtype=float) / np.arange(1, len(order) + 1)
    keep = np.zeros(len(order), bool)
    if len(order):
        keep[order[: np.searchsorted(share, rate, side="right")]] = True
    return keep


def call_features(calls: pd.DataFrame) -> np.ndarray:
    """What tells good calls from bad, (call, 4) float: log area, distance, log intensity, corrected bits (2 = more).

    calls: a transcript table (see `merfish.transcripts.COLUMNS`).
    """
    return np.column_stack(
        [
            np.log(np.maximum(calls["area"].to_numpy(float), 1)),
            np.nan_to_num(calls["distance"].to_numpy(float)),
            np.log(np.maximum(calls["intensity"].to_numpy(float), 1e-2)),
            np.minimum(calls["hamming_distance"].to_numpy(float), 2),
        ]
    )


def rate_calls(calls: pd.DataFrame, codebook: Codebook) -> pd.DataFrame:
    """The same table with ``probability``, that each call is right, learnt from the blanks of all its rows."""
    blank_fraction = float(codebook.is_blank.mean())
    wrong = misidentification_probability(call_features(calls), calls["is_blank"].to_numpy(bool), blank_fraction)
    return calls.assign(probability=(1 - wrong).astype(np.float32))


def keep_calls(calls: pd.DataFrame, rate: float = MISIDENTIFICATION_RATE) -> pd.DataFrame:
    """The rated calls that may be kept at a misidentification rate, in their order."""
    return calls[keep_at_rate(1 - calls["probability"].to_numpy(float), rate)].reset_index(drop=True)
