"""Filter calls at a chosen misidentification rate, which is estimated from the blanks.

No function needs all calls of an experiment at once: `tally_calls` bins those of one field by the features that
separate right calls from wrong ones, tallies are summed over fields, and `fit_log_odds` and `threshold_at_rate` work on
the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from merfish.codebook import MAX_BITS, Codebook
from merfish.config import MISIDENTIFICATION_RATE

MAX_LOG_ODDS = 12.0
FEW_CALLS = 1.0  # prior number of molecules of a gene: a few calls must not decide which words are confused
SETTLING = 10  # alternations between the molecules of each word and its wrong calls; half as many converge to 1 %
FEWEST_BLANKS = 10  # blanks called; with fewer the 95 % interval of the rate spans more than a factor of 3


@dataclass(frozen=True, eq=False)
class Evidence:
    """Features that separate right calls from wrong ones, and their prior.

    steps: (feature,) bin widths of a tally, too small to change the odds noticeably. prior: (1 + feature,) expected log
    odds of being wrong if all features are 0, and their change for each unit of a feature. weight: approximate number
    of blanks needed to outweigh the slopes of the prior; its constant has a quarter of this weight. unchecked:
    (1 + feature,) log odds used if the codebook has no blanks. fair: whether a wrong call of the decoder is as likely
    to be a given blank as a given gene, whatever the abundances.
    """

    steps: tuple[float, ...]
    prior: tuple[float, ...]
    weight: float
    unchecked: tuple[float, ...]
    fair: bool = True


HALF = 0.5  # of a typical molecule's height; dimmer calls are often residual light of other molecules
# The decoder's own log odds of being wrong, which are nearly calibrated, and the log ratio of `HALF` to the intensity
# of dimmer calls. Priors are from simulated fields of 0.003-0.03 molecules per pixel with known truth, in one and five
# planes.
POSTERIOR = Evidence(steps=(0.02, 0.02), prior=(0.0, 0.9, 3.0), weight=64.0, unchecked=(0.0, 0.9, 3.0))
# Patches of pixels: log area, distance, log intensity, corrected bits. The odds without blanks are from patches of
# `pixels` and `hamming` in simulated fields of 0.003-0.03 molecules per pixel without blanks, with known truth.
PATCHES = Evidence(
    steps=(0.05, 0.02, 0.1, 1.0),
    prior=(-3.5, -0.8, 4.0, 0.0, 2.0),
    weight=4.0,
    unchecked=(-4.66, -0.64, -0.74, -1.98, 2.54),
    fair=False,
)


@dataclass(frozen=True, eq=False)
class Tally:
    """Calls binned by features: values (bin, feature) float64; calls, blanks (bin,) int64."""

    values: np.ndarray
    calls: np.ndarray
    blanks: np.ndarray


def call_features(calls: pd.DataFrame) -> tuple[np.ndarray, Evidence]:
    """Features (call, feature) float64 of a transcript table, and their description.

    If the decoder gives a probability, the features are its log odds of being wrong, and the log ratio of `HALF` to the
    intensity, at least 0; otherwise log area, distance, log intensity and corrected bits (at most 2).
    """
    stated = calls["probability"].to_numpy(float)
    light = np.log(np.maximum(calls["intensity"].to_numpy(float), 1e-2))
    if len(calls) and not np.isnan(stated).any():
        odds = np.log(np.maximum(1 - stated, 1e-9)) - np.log(np.maximum(stated, 1e-9))
        dimmer = np.maximum(np.log(HALF) - light, 0.0)
        return np.column_stack([np.clip(odds, -MAX_LOG_ODDS, MAX_LOG_ODDS), dimmer]), POSTERIOR
    features = [
        np.log(np.maximum(calls["area"].to_numpy(float), 1)),
        np.nan_to_num(calls["distance"].to_numpy(float)),
        light,
        np.minimum(calls["hamming_distance"].to_numpy(float), 2),
    ]
    return np.column_stack(features), PATCHES


def tally_calls(features: np.ndarray, is_blank: np.ndarray, evidence: Evidence) -> Tally:
    """Count calls in bins of the steps of the evidence; features (call, feature), is_blank (call,) bool."""
    return _counted(np.rint(features / evidence.steps).astype(np.int64), is_blank, np.ones(len(is_blank)), evidence)


def add_tallies(tallies: Sequence[Tally], evidence: Evidence) -> Tally:
    """Add tallies. Counts are integers, so the order of fields does not matter."""
    values = np.concatenate([np.empty((0, len(evidence.steps))), *(tally.values for tally in tallies)])
    calls, blanks = (np.concatenate([[], *(getattr(t, name) for t in tallies)]) for name in ("calls", "blanks"))
    return _counted(np.rint(values / evidence.steps).astype(np.int64), blanks, calls, evidence)


def _counted(bins: np.ndarray, blanks: np.ndarray, calls: np.ndarray, evidence: Evidence) -> Tally:
    if not len(bins):
        none = np.empty(0, np.int64)
        return Tally(np.empty((0, len(evidence.steps))), none, none)
    unique, place = np.unique(bins, axis=0, return_inverse=True)
    count, blank = (np.bincount(place.ravel(), weights).astype(np.int64) for weights in (calls, blanks))
    return Tally(unique * np.array(evidence.steps), count, blank)


def blank_share(found: np.ndarray, codebook: Codebook, evidence: Evidence) -> float:
    """Expected fraction of blanks among the wrong calls; 0 without blanks. found: (word,) number of calls.

    With a fair decoder it is the fraction of blanks among the words. Otherwise a wrong call usually has one of the
    words nearest to the true one, each with equal probability, so that the wrong calls of blanks depend on the
    abundances of the genes near them. These abundances are the calls minus the wrong ones, whose number follows from
    the blanks called.
    """
    blank = codebook.is_blank
    if evidence.fair or not blank.any() or blank.all():
        return float(blank.mean())
    genes = np.flatnonzero(~blank)
    near = nearest_words(codebook.codes, genes)
    molecules = found[genes].astype(float)
    for _ in range(SETTLING):
        received = near @ (molecules + FEW_CALLS)
        of_blanks = received[blank].sum()
        if of_blanks == 0.0:
            return float(blank.mean())
        molecules = np.maximum(found[genes] - received[genes] * (found[blank].sum() / of_blanks), 0.0)
    return float(of_blanks / received.sum())


def nearest_words(codes: np.ndarray, chosen: np.ndarray) -> csr_array:
    """Words nearest to each of the ``chosen`` ones, (word, chosen) float64 of 0 and 1; codes (word,) uint64."""
    rows = []
    for word in chosen:
        distance = np.bitwise_count(codes ^ codes[word])
        distance[word] = MAX_BITS
        rows.append(np.flatnonzero(distance == distance.min()))
    column = np.repeat(np.arange(len(chosen)), [len(row) for row in rows])
    return csr_array((np.ones(len(column)), (np.concatenate(rows), column)), (len(codes), len(chosen)))


def fit_log_odds(tally: Tally, blank_fraction: float, evidence: Evidence) -> np.ndarray:
    """Fit the log odds of a call being wrong, (1 + feature,): a constant and the change for each unit of a feature.

    A call that is wrong with probability p is a blank with probability p times ``blank_fraction``, see `blank_share`
    (used bin by bin in Moffitt et al. 2016). p is a logistic function of the features, which needs far fewer parameters
    than bins.

    Returns the unchecked odds of the evidence if the codebook has no blanks, and its prior if there are no calls.
    """
    if blank_fraction <= 0:
        return np.array(evidence.unchecked)
    prior = np.array(evidence.prior)
    n = tally.calls.sum()
    if not n:
        return prior
    mean = tally.calls @ tally.values / n
    spread = np.sqrt(tally.calls @ (tally.values - mean) ** 2 / n)
    spread[spread == 0] = 1
    design = np.column_stack([np.ones(len(tally.calls)), (tally.values - mean) / spread])
    start = np.concatenate([[prior[0] + mean @ prior[1:]], prior[1:] * spread])
    slope = _wrong_given_blanks(design, tally, blank_fraction, start, evidence.weight)
    raw = slope[1:] / spread
    return np.concatenate([[slope[0] - mean @ raw], raw])


def _wrong_given_blanks(
    design: np.ndarray, tally: Tally, blank_fraction: float, prior: np.ndarray, weight: float
) -> np.ndarray:
    """Logistic regression of a latent label: P(wrong) = s(design @ slope), P(blank) = blank_fraction * P(wrong).

    Fisher scoring with a normal prior; the first column of ``design`` is the constant. Returns the slopes.
    """
    stiffness = np.full(len(prior), weight)
    stiffness[0] /= 4
    slope = prior.copy()
    for _ in range(100):
        wrong = _logistic(design @ slope)
        blank = blank_fraction * wrong
        # if the codebook has only blanks, every call is a blank, whatever the odds
        rest = np.maximum(1 - blank, 1e-12)
        gradient = design.T @ ((tally.blanks - tally.calls * blank) * (1 - wrong) / rest)
        gradient -= stiffness * (slope - prior)
        curvature = tally.calls * blank * (1 - wrong) ** 2 / rest
        information = (design * curvature[:, None]).T @ design + np.diag(stiffness)
        step = np.clip(np.linalg.solve(information, gradient), -1, 1)
        slope += step
        if np.abs(step).max() < 1e-8:
            break
    return slope


def log_odds_wrong(features: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """Log odds (call,) of calls being wrong, features (call, feature), from the result of `fit_log_odds`."""
    return np.asarray(odds[0] + features @ odds[1:])


def probability_wrong(features: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """Probability (call,) float64 of calls being wrong, features (call, feature), from the result of `fit_log_odds`."""
    return _logistic(log_odds_wrong(features, odds))


def _logistic(log_odds: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))))


def threshold_at_rate(tally: Tally, odds: np.ndarray, rate: float) -> float:
    """Largest log odds of being wrong of the calls to keep, such that the expected fraction of wrong ones is ``rate``.

    The calls kept are the largest set of most probable calls with at most that fraction; -inf if there is none.
    """
    level = log_odds_wrong(tally.values, odds)
    order = np.argsort(level, kind="stable")
    level, calls = level[order], tally.calls[order]
    share = np.cumsum(calls * _logistic(level)) / np.cumsum(calls)
    n = int(np.searchsorted(share, rate, side="right"))
    if n == len(level):
        return np.inf
    # half-way to the first bin that is excluded: calls of a bin lie on both sides of its centre
    return float((level[n - 1] + level[n]) / 2) if n else -np.inf


def keep_at_rate(probability_wrong: np.ndarray, rate: float = MISIDENTIFICATION_RATE) -> np.ndarray:
    """Largest set of most probable calls whose expected fraction of wrong ones is at most ``rate``; (call,) bool."""
    order = np.argsort(probability_wrong, kind="stable")
    share = np.cumsum(probability_wrong[order], dtype=float) / np.arange(1, len(order) + 1)
    keep = np.zeros(len(order), bool)
    if len(order):
        keep[order[: np.searchsorted(share, rate, side="right")]] = True
    return keep


def learn_odds(calls: pd.DataFrame, codebook: Codebook) -> tuple[np.ndarray, float]:
    """Results of `fit_log_odds` and of `blank_share` for a transcript table."""
    features, evidence = call_features(calls)
    tally = tally_calls(features, calls["is_blank"].to_numpy(bool), evidence)
    share = blank_share(np.bincount(calls["barcode_id"], minlength=codebook.n_words), codebook, evidence)
    return fit_log_odds(tally, share, evidence), share


def with_odds(calls: pd.DataFrame, odds: np.ndarray) -> pd.DataFrame:
    """Copy of a transcript table with ``probability``, that a call is right, from the result of `fit_log_odds`."""
    return calls.assign(probability=(1 - probability_wrong(call_features(calls)[0], odds)).astype(np.float32))


def rate_calls(calls: pd.DataFrame, codebook: Codebook) -> pd.DataFrame:
    """Copy of a transcript table with ``probability``, that a call is right, calibrated by the blanks."""
    return with_odds(calls, learn_odds(calls, codebook)[0])


def keep_calls(calls: pd.DataFrame, rate: float = MISIDENTIFICATION_RATE) -> pd.DataFrame:
    """Keep the calls of a table with calibrated ``probability`` at a misidentification rate, in their order."""
    return calls[keep_at_rate(1 - calls["probability"].to_numpy(float), rate)].reset_index(drop=True)


def few_blanks(n_called: int, blanks_in_book: bool = True) -> str | None:
    """Message about a misidentification rate that is based on few blanks; None if there are enough."""
    if not blanks_in_book:
        return "the codebook has no blanks: the rate is the decoder's own estimate and has not been checked"
    if n_called >= FEWEST_BLANKS:
        return None
    return (
        f"too few blanks called ({n_called}) to measure how many molecules are wrong: "
        "the rate is based on simulated fields"
    )
