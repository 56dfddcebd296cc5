"""What an experiment says about its own errors: rates of each bit, confidence of each word, detection efficiency."""

from __future__ import annotations

import numpy as np
import pandas as pd

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


def word_statistics(found: pd.DataFrame, kept: pd.DataFrame, codebook: Codebook) -> pd.DataFrame:
    """One row a word: what was called, how exactly, and which share of its molecules is detected.

    found, kept: transcript tables before and after filtering, ``shown`` in both.
    confidence_ratio: exact calls over exact and corrected ones (Chen et al. 2015; blanks show what chance gives);
    detection_efficiency: probability that a molecule of this word survives errors and filtering. Molecules are
    counted by their exact calls over the probability of being exact, which follows from the rates of the bits.
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
    return pd.DataFrame(
        {
            "gene": codebook.names,
            "n_found": np.bincount(found["barcode_id"], minlength=codebook.n_words),
            "n_kept": calls,
            "n_exact": exact,
            "confidence_ratio": confidence,
            "detection_efficiency": np.minimum(efficiency, 1.0),
        }
    )
