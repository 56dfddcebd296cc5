"""Test whether the images fit the codebook, based on the calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from merfish.calls.error_model import wilson
from merfish.codebook import Codebook
from merfish.errors import CodebookMisfit

LIKELY = 0.5  # posterior above which a call is likely
FEWEST_CALLS = 100  # calls found; with fewer there is no verdict
# From simulated fields of ten kinds (densities, autofluorescence, shifts, error rates, weak signal, distances 1 to 4)
# and two real ones, decoded with their own codebook and with its bits reordered. As estimated from the blanks, 0 to
# 17 % of the likely calls are wrong with the right codebook and 30 to 150 % with a wrong one; 10 to 90 % of all calls
# are likely with the right codebook, 1 to 61 % with a wrong one; 20 to 95 % of these have no bit error with the right
# codebook, and 1 to 30 % with a wrong one of distance 4.
MOST_WRONG = 0.25
FEW_LIKELY, HARDLY_ANY = 0.45, 0.05
FEW_EXACT = 0.18


@dataclass(frozen=True)
class FitCounts:
    """Numbers of calls found, of calls more likely right than wrong, and of blanks and exact calls among the latter."""

    found: int = 0
    likely: int = 0
    blank: int = 0
    exact: int = 0

    def __add__(self, other: FitCounts) -> FitCounts:
        return FitCounts(
            self.found + other.found,
            self.likely + other.likely,
            self.blank + other.blank,
            self.exact + other.exact,
        )


@dataclass(frozen=True)
class Verdict:
    """fits: False if the calls contradict the codebook, True if they support it or are too few.

    wrong: fraction of the likely calls that are wrong, estimated from the blanks; NaN without blanks. likely: fraction
    of likely calls among all found; exact: fraction of these without bit errors. cause: what to check first, empty if
    the codebook fits.
    """

    fits: bool
    wrong: float
    likely: float
    exact: float
    cause: str


def count_fit(calls: pd.DataFrame) -> FitCounts:
    """Count calls by the posterior of the decoder `spots`, before it is calibrated by the blanks.

    Calls without a posterior, from other decoders, are ignored.
    """
    calls = calls[calls["probability"].notna()]
    likely = calls[calls["probability"] > LIKELY]
    return FitCounts(
        len(calls), len(likely), int(likely["is_blank"].sum()), int((likely["hamming_distance"] == 0).sum())
    )


def codebook_fits(counts: FitCounts, codebook: Codebook, dead_bits: tuple[str, ...] = ()) -> Verdict:
    """Decide from the counts of calls, summed over fields, whether the images fit the codebook.

    With a wrong codebook, words are found by chance: blanks as often as genes, few likely calls, and almost none
    without errors. dead_bits: names of bits without molecules, which are then the most likely cause.
    """
    blank_share = float(codebook.is_blank.mean())
    likely, exact = counts.likely / max(counts.found, 1), counts.exact / max(counts.likely, 1)
    wrong = low = np.nan
    if blank_share:
        wrong, low, _ = (share / blank_share for share in wilson(counts.blank, counts.likely - counts.blank))
    if blank_share and counts.likely:
        against = low > MOST_WRONG or (wrong > MOST_WRONG and likely < FEW_LIKELY and exact < FEW_EXACT)
    else:
        against = likely < FEW_LIKELY and exact < FEW_EXACT
    against = counts.found >= FEWEST_CALLS and (against or likely < HARDLY_ANY)
    cause = ""
    if against:
        cause = (
            f"{', '.join(dead_bits)}, which show no molecules"
            if dead_bits
            else "the codebook and the order of its bits"
        )
    return Verdict(not against, wrong, likely, exact, cause)


def refuse_misfit(verdict: Verdict) -> None:
    """Raise CodebookMisfit if the calls contradict the codebook."""
    if verdict.fits:
        return
    by_blanks = "" if np.isnan(verdict.wrong) else f"{min(verdict.wrong, 1):.0%} are wrong according to the blanks and "
    raise CodebookMisfit(
        f"the images do not fit the codebook: {verdict.likely:.0%} of the molecules found are more likely right than "
        f"wrong; of these, {by_blanks}{verdict.exact:.0%} have no bit error. Check {verdict.cause}. No table is "
        "written; with a misidentification rate of 1, every call is written anyway"
    )
