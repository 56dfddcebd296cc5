"""Error rates estimated from the calls: rates of each bit, confidence of each word, detection efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from merfish.calls.filtering import Evidence, Tally, fit_log_odds, log_odds_wrong, threshold_at_rate
from merfish.codebook import Codebook

LEVEL = 1.96  # normal quantile of a 95 % interval


@dataclass(frozen=True, eq=False)
class WordTally:
    """Numbers of calls of each word, (word,), and of errors of each bit, (bit,); tallies of fields are additive.

    found, kept, kept_exact: int64, calls before filtering, after filtering, and after filtering without bit errors.
    right: float64, sum of the probabilities of the kept calls. exact: float64, sum of the probabilities of all calls
    without bit errors; lost, gained: the same of the calls that differ from their word in this bit only.
    """

    found: np.ndarray
    kept: np.ndarray
    kept_exact: np.ndarray
    right: np.ndarray
    exact: np.ndarray
    lost: np.ndarray
    gained: np.ndarray


def tally_words(
    word: np.ndarray, shown: np.ndarray, probability: np.ndarray, kept: np.ndarray, codebook: Codebook
) -> WordTally:
    """Count calls: word int, shown uint64, probability float of being right, kept bool; all (call,)."""
    n = codebook.n_words
    error = shown ^ codebook.codes[word]
    exact = error == 0
    single = np.bitwise_count(error) == 1
    bit = np.bitwise_count(error[single] - np.uint64(1)).astype(np.int64)
    on = codebook.words.astype(bool)[word[single], bit]
    weight = np.asarray(probability, float)
    by_bit = (np.bincount(bit[rows], weight[single][rows], codebook.n_bits) for rows in (on, ~on))
    return WordTally(
        np.bincount(word, minlength=n),
        np.bincount(word[kept], minlength=n),
        np.bincount(word[kept & exact], minlength=n),
        np.bincount(word[kept], weight[kept], n),
        np.bincount(word[exact], weight[exact], n),
        *by_bit,
    )


def add_word_tallies(tallies: Sequence[WordTally], codebook: Codebook) -> WordTally:
    """Sum of the tallies of all fields, added in their order."""
    none = np.empty(0, np.int64)
    empty = tally_words(none, none.astype(np.uint64), none, none.astype(bool), codebook)
    return WordTally(*(sum(getattr(t, field.name) for t in (empty, *tallies)) for field in fields(WordTally)))


def bit_error_rates(tally: WordTally, codebook: Codebook) -> pd.DataFrame:
    """Rates of 1->0 and 0->1 errors of each bit, with 95 % intervals.

    Molecules that lost only this bit are compared with those without errors: nearly all of both are found, so their
    ratio is p / (1 - p), independently of molecules with more errors (Moffitt et al. 2016). The same holds for those
    that gained only this bit. Peaks hidden by a neighbour count as lost, chance neighbours as gained: the rates are
    those of the images, which are slightly above those of the chemistry if molecules are crowded.

    Every call found is weighted by its probability of being right, so that molecules with errors, which are less
    certain, are included.
    Returns one row for each bit: bit, lost, lost_low, lost_high, gained, gained_low, gained_high; NaN without data.
    """
    rows = []
    for bit, on in enumerate(codebook.words.T.astype(bool)):
        lost = wilson(tally.lost[bit], tally.exact[on].sum())
        gained = wilson(tally.gained[bit], tally.exact[~on].sum())
        rows.append((codebook.bit_names[bit], *lost, *gained))
    return pd.DataFrame(rows, columns=["bit", "lost", "lost_low", "lost_high", "gained", "gained_low", "gained_high"])


def wilson(hits: float, others: float) -> tuple[float, float, float]:
    """Fraction of hits among hits and others, with Wilson's 95 % interval; NaN if there are none."""
    n = hits + others
    if not n > 0:
        return np.nan, np.nan, np.nan
    share = hits / n
    middle = (share + LEVEL**2 / (2 * n)) / (1 + LEVEL**2 / n)
    half = LEVEL / (1 + LEVEL**2 / n) * np.sqrt(share * (1 - share) / n + LEVEL**2 / (4 * n**2))
    return share, max(middle - half, 0.0), min(middle + half, 1.0)


def misidentification_rate(n_blank: float, n_calls: float, blank_share: float) -> tuple[float, float, float]:
    """Fraction of calls that are wrong, estimated from the number of blanks alone, with its 95 % interval.

    blank_share: fraction of the wrong calls that are blanks, see `merfish.calls.filtering.blank_share`. NaN without
    blanks in the codebook, or without calls.
    """
    if not blank_share:
        return np.nan, np.nan, np.nan
    rate, low, high = (part / blank_share for part in wilson(n_blank, n_calls - n_blank))
    return rate, low, min(high, 1.0)


def held_out_rate(
    halves: tuple[Tally, Tally], evidence: Evidence, blank_share: float, rate: float
) -> tuple[float, float, float]:
    """Misidentification rate, with its 95 % interval, of held-out calls that are filtered for ``rate``.

    The odds of each half of the calls are fitted to the other half. blank_share: see `misidentification_rate`. NaN if a
    half has no calls.
    """
    n_blank = n_calls = 0
    for one, other in (halves, halves[::-1]):
        if not one.calls.sum():
            return np.nan, np.nan, np.nan
        odds = fit_log_odds(other, blank_share, evidence)
        kept = log_odds_wrong(one.values, odds) <= threshold_at_rate(one, odds, rate)
        n_blank += int(one.blanks[kept].sum())
        n_calls += int(one.calls[kept].sum())
    return misidentification_rate(n_blank, n_calls, blank_share)


FEWEST_SPIKES = 50  # the standard error of a fraction of 0.8 is then 0.06


def word_statistics(
    tally: WordTally,
    codebook: Codebook,
    blank_share: float,
    spike_word: np.ndarray | None = None,
    spike_kept: np.ndarray | None = None,
) -> pd.DataFrame:
    """Statistics of each word, one row each: calls, confidence, and detection efficiency.

    blank_share: see `misidentification_rate`. spike_word int, spike_kept bool (spike,): words of molecules that were
    added to the images, and whether they were found and kept (see `merfish.simulate.spikes`).

    confidence_ratio: exact calls over exact and corrected ones (Chen et al. 2015; for blanks, the value expected by
    chance). misidentification_rate: expected fraction of wrong calls among those kept; the interval has the relative
    width of that of all words, which share the blanks. detection_efficiency: probability that a molecule of this word
    is found and kept. The differences between words follow from the error rates of their bits: the number of molecules
    is the number of exact calls over the probability of no error. This efficiency is too high where spots overlap,
    because molecules hidden by several neighbours are not counted; all words are therefore scaled by the fraction of
    the added molecules that is kept, if there are at least `FEWEST_SPIKES`.
    """
    rates = bit_error_rates(tally, codebook)
    lost, gained = (np.nan_to_num(rates[name].to_numpy()) for name in ("lost", "gained"))
    probability_exact = np.where(codebook.words.astype(bool), 1 - lost, 1 - gained).prod(axis=1)
    n_exact, n_kept = tally.kept_exact.sum(), tally.kept.sum()
    unknown = np.full(codebook.n_words, np.nan)
    # wrong calls, estimated from the blanks, are subtracted from the numerator
    efficiency = probability_exact * tally.right.sum() / n_exact if n_exact else unknown
    if spike_word is not None and spike_kept is not None and len(spike_word) >= FEWEST_SPIKES and n_exact:
        efficiency = efficiency * spike_kept.sum() / np.minimum(efficiency[spike_word], 1.0).sum()
    wrong = tally.kept - tally.right
    _, low, high = misidentification_rate(tally.kept[codebook.is_blank].sum(), n_kept, blank_share)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence = tally.kept_exact / tally.kept
        rate = wrong / tally.kept
        of_all = wrong.sum() / n_kept
        interval = [np.minimum(rate * end / of_all, 1.0) for end in (low, high)]
    return pd.DataFrame(
        {
            "gene": codebook.names,
            "n_found": tally.found,
            "n_kept": tally.kept,
            "n_exact": tally.kept_exact,
            "confidence_ratio": confidence,
            "misidentification_rate": rate,
            "misidentification_low": interval[0],
            "misidentification_high": interval[1],
            "detection_efficiency": np.minimum(efficiency, 1.0),
        }
    )
