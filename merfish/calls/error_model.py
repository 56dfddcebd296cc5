"""What an experiment says about its own errors: rates of each bit, confidence of each word, detection efficiency."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.calls.filtering import keep_calls, rate_calls
from merfish.codebook import Codebook

LEVEL = 1.96  # normal quantile of a 95 % interval


def bit_error_rates(calls: pd.DataFrame, codebook: Codebook) -> pd.DataFrame:
    """Rates of 1->0 and 0->1 errors of each bit, with 95 % intervals.

    Molecules that lost nothing but this bit are compared with those that show their word exactly: both are found
    nearly always, so their ratio is p / (1 - p), whatever becomes of molecules with more errors (Moffitt et al.
    2016). Likewise those that gained nothing but this bit. Peaks hidden by a neighbour count as lost, accidental
    neighbours as gained: the rates are those of the images, in crowds a little above those of the chemistry.

    calls: transcript table with ``shown``, of every call found: each counts with its probability to be right, so that
    molecules with errors, which are less certain, are not left out.
    Returns one row a bit: bit, lost, lost_low, lost_high, gained, gained_low, gained_high; NaN where nothing tells.
    """
    word = calls["barcode_id"].to_numpy()
    weight = np.nan_to_num(calls["probability"].to_numpy(float), nan=1.0)
    error = calls["shown"].to_numpy(np.uint64) ^ codebook.codes[word]
    exact = np.bincount(word[error == 0], weight[error == 0], codebook.n_words)
    rows = []
    for bit, on in enumerate(codebook.words.T.astype(bool)):
        only = error == np.uint64(1) << np.uint64(bit)
        lost = wilson(weight[only & on[word]].sum(), exact[on].sum())
        gained = wilson(weight[only & ~on[word]].sum(), exact[~on].sum())
        rows.append((codebook.bit_names[bit], *lost, *gained))
    return pd.DataFrame(rows, columns=["bit", "lost", "lost_low", "lost_high", "gained", "gained_low", "gained_high"])


def wilson(hits: float, others: float) -> tuple[float, float, float]:
    """Share of hits among hits and others, with Wilson's 95 % interval; NaN of nothing."""
    n = hits + others
    if not n > 0:
        return np.nan, np.nan, np.nan
    share = hits / n
    middle = (share + LEVEL**2 / (2 * n)) / (1 + LEVEL**2 / n)
    half = LEVEL / (1 + LEVEL**2 / n) * np.sqrt(share * (1 - share) / n + LEVEL**2 / (4 * n**2))
    return share, max(middle - half, 0.0), min(middle + half, 1.0)


def misidentification_rate(calls: pd.DataFrame, codebook: Codebook) -> tuple[float, float, float]:
    """Share of wrong calls, from the blanks among them alone, with its 95 % interval.

    Wrong calls fall on any word alike, so there are as many as blanks called times words over blank words. NaN without
    blanks in the codebook or without calls.
    """
    n_blank = int(calls["is_blank"].sum())
    n_words, n_blank_words = codebook.n_words, int(codebook.is_blank.sum())
    if not n_blank_words:
        return np.nan, np.nan, np.nan
    rate, low, high = (share * n_words / n_blank_words for share in wilson(n_blank, len(calls) - n_blank))
    return rate, low, min(high, 1.0)


def held_out_rate(unrated: pd.DataFrame, codebook: Codebook, rate: float) -> tuple[float, float, float]:
    """The misidentification rate, with its interval, that filtering for ``rate`` reaches where it was not fitted.

    Each half of the fields (of one field, its left and its right half) is rated by the blanks of the other half.
    unrated: every call found, as decoders give them: `rate_calls` was not applied yet.
    """
    if unrated.empty:
        return np.nan, np.nan, np.nan
    fov = unrated["fov"].to_numpy()
    place = fov if len(np.unique(fov)) > 1 else unrated["x"].to_numpy()
    second = np.searchsorted(np.unique(place), place) % 2 == 1 if place is fov else place > np.median(place)
    kept = [keep_calls(rate_calls(unrated, codebook, learn_from=~half)[half], rate) for half in (second, ~second)]
    return misidentification_rate(pd.concat(kept), codebook)


def word_statistics(found: pd.DataFrame, kept: pd.DataFrame, codebook: Codebook) -> pd.DataFrame:
    """One row a word: what was called, how exactly, and which share of its molecules is detected.

    found, kept: transcript tables before and after filtering, ``shown`` in both.
    confidence_ratio: exact calls over exact and corrected ones (Chen et al. 2015; blanks show what chance gives);
    misidentification_rate: expected share of wrong ones among the kept; its interval is that of all words, as it comes
    from the same blanks;
    detection_efficiency: probability that a molecule of this word survives errors and filtering. Molecules are
    counted by their exact calls over the probability of being exact, which follows from the rates of the bits. In
    crowds that is too high: molecules whose bits hide in several neighbours count nowhere.
    """
    rates = bit_error_rates(found, codebook)
    lost, gained = (np.nan_to_num(rates[name].to_numpy()) for name in ("lost", "gained"))
    on = codebook.words.astype(bool)
    probability_exact = np.where(on, 1 - lost, 1 - gained).prod(axis=1)
    word = kept["barcode_id"].to_numpy()
    exact = np.bincount(word[kept["shown"].to_numpy(np.uint64) == codebook.codes[word]], minlength=codebook.n_words)
    calls = np.bincount(word, minlength=codebook.n_words)
    # wrong calls are taken out of the numerator, as the blanks tell them
    right = np.nan_to_num(kept["probability"].to_numpy(float), nan=1.0).sum()
    with np.errstate(invalid="ignore"):
        efficiency = probability_exact * right / exact.sum() if exact.sum() else np.full(codebook.n_words, np.nan)
        confidence = exact / calls
    wrong = np.bincount(word, 1 - kept["probability"].to_numpy(float), codebook.n_words)
    _, low, high = misidentification_rate(kept, codebook)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = wrong / calls
        of_all = wrong.sum() / calls.sum()
    return pd.DataFrame(
        {
            "gene": codebook.names,
            "n_found": np.bincount(found["barcode_id"], minlength=codebook.n_words),
            "n_kept": calls,
            "n_exact": exact,
            "confidence_ratio": confidence,
            "misidentification_rate": rate,
            "misidentification_low": np.minimum(rate * low / of_all, 1.0),
            "misidentification_high": np.minimum(rate * high / of_all, 1.0),
            "detection_efficiency": np.minimum(efficiency, 1.0),
        }
    )
