"""Which calls to keep at a wanted misidentification rate, learnt from the blanks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.config import MISIDENTIFICATION_RATE

# What a few blanks cannot tell is taken from simulated fields of 0.003-0.03 molecules a pixel with known truth: log
# odds of being wrong: constant, and slopes against log area, distance, log intensity and corrected bits.
PRIOR_PIXELS = np.array([-3.5, -0.8, 4.0, 0.0, 2.0])
# the same against the spot decoder's own log odds of being wrong, which are nearly right
PRIOR_SPOTS = np.array([0.0, 0.9])
# about the number of blanks that it takes to outweigh a prior's slopes; its constant weighs one quarter
WEIGHT_PIXELS, WEIGHT_SPOTS = 4.0, 64.0
MAX_LOG_ODDS = 12.0
FEWEST_BLANKS = 10  # called; with fewer the 95 % interval of the rate spans more than a factor of 3


def misidentification_probability(
    features: np.ndarray,
    is_blank: np.ndarray,
    blank_fraction: float,
    prior: np.ndarray | None = None,
    weight: float = WEIGHT_PIXELS,
    learn_from: np.ndarray | None = None,
) -> np.ndarray:
    """Probability that each call is wrong.

    A wrong call falls on any word alike, so a call that is wrong with probability p is a blank with probability
    p times the share of words that are blanks (Moffitt et al. 2016 use it bin by bin). p is a logistic function of
    the features, which needs a few parameters where bins need as many as there are bins.

    features: (call, feature) float, anything that tells good calls from bad: brightness, area, distance.
    is_blank: (call,) bool. blank_fraction: blank words over all words. prior: (1 + feature,) expected log odds where
    all features are 0 and their change for each unit of a feature, 0 when not given; weight: how many blanks it
    takes to outweigh them. learn_from: (call,) bool, the calls whose blanks are looked at, all when not given.
    Returns (call,) float32 in [0, 1]; NaN for all calls if the codebook has no blanks.
    """
    n = len(is_blank)
    if blank_fraction <= 0 or n == 0:
        return np.full(n, np.nan, np.float32)
    spread = features.std(axis=0)
    spread[spread == 0] = 1
    design = np.column_stack([np.ones(n), (features - features.mean(axis=0)) / spread])
    start = np.zeros(design.shape[1])
    if prior is not None:
        start[0] = prior[0] + features.mean(axis=0) @ prior[1:]
        start[1:] = prior[1:] * spread
    seen = slice(None) if learn_from is None else learn_from
    slope = _wrong_given_blanks(design[seen], is_blank[seen], blank_fraction, start, weight)
    return _logistic(design @ slope).astype(np.float32)


def _logistic(log_odds: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))))


def _wrong_given_blanks(
    design: np.ndarray, is_blank: np.ndarray, blank_fraction: float, prior: np.ndarray, weight: float
) -> np.ndarray:
    """Logistic regression of a hidden label: P(wrong) = s(design @ slope), P(blank) = blank_fraction * P(wrong).

    Fisher scoring with a normal prior; the first column of ``design`` is the constant. Returns the slopes.
    """
    stiffness = np.full(len(prior), weight)
    stiffness[0] /= 4
    slope = prior.copy()
    for _ in range(100):
        wrong = _logistic(design @ slope)
        blank = blank_fraction * wrong
        gradient = design.T @ ((is_blank - blank) * (1 - wrong) / (1 - blank)) - stiffness * (slope - prior)
        information = (design * (blank * (1 - wrong) ** 2 / (1 - blank))[:, None]).T @ design + np.diag(stiffness)
        step = np.clip(np.linalg.solve(information, gradient), -1, 1)
        slope += step
        if np.abs(step).max() < 1e-8:
            break
    return slope


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


def rate_calls(calls: pd.DataFrame, codebook: Codebook, learn_from: np.ndarray | None = None) -> pd.DataFrame:
    """The same table with ``probability``, that each call is right, learnt from the blanks.

    learn_from: (call,) bool, the rows whose blanks are looked at; all when not given.

    A probability that the decoder has given is taken as the one feature, else there are those of `call_features`.
    Without blanks nothing checks it: it is kept with what simulated fields say of its odds; NaN where there is none.
    """
    stated = calls["probability"].to_numpy(float)
    own = len(calls) > 0 and not np.isnan(stated).any()
    if own:
        odds = np.log(np.maximum(1 - stated, 1e-9)) - np.log(np.maximum(stated, 1e-9))
        features, prior, weight = np.clip(odds, -MAX_LOG_ODDS, MAX_LOG_ODDS)[:, None], PRIOR_SPOTS, WEIGHT_SPOTS
    else:
        features, prior, weight = call_features(calls), PRIOR_PIXELS, WEIGHT_PIXELS
    is_blank = calls["is_blank"].to_numpy(bool)
    blank_fraction = float(codebook.is_blank.mean())
    if own and blank_fraction == 0:
        wrong = _logistic(prior[0] + features @ prior[1:])
    else:
        wrong = misidentification_probability(features, is_blank, blank_fraction, prior, weight, learn_from)
    return calls.assign(probability=(1 - wrong).astype(np.float32))


def keep_calls(calls: pd.DataFrame, rate: float = MISIDENTIFICATION_RATE) -> pd.DataFrame:
    """The rated calls that may be kept at a misidentification rate, in their order."""
    return calls[keep_at_rate(1 - calls["probability"].to_numpy(float), rate)].reset_index(drop=True)


def few_blanks(n_called: int) -> str | None:
    """What to know of a misidentification rate that hardly any blank has told; None if there are enough."""
    if n_called >= FEWEST_BLANKS:
        return None
    return (
        f"only {n_called} blanks were called, too few to know how many molecules are wrong: "
        "the rate rests on simulated fields"
    )
