"""Figures that determine whether a run is good, each with its threshold and the source of the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from merfish.calls.fit import FEW_EXACT, MOST_WRONG
from merfish.imaging.field import MOST_SATURATED

Status = Literal["pass", "warn", "fail", "info"]

CHEN = "Chen et al. 2015"
PUBLISHED_LOST = (0.087, 0.177)  # 1->0 error rate: mean of all bits, worst bit; Chen et al. 2015
PUBLISHED_GAINED = (0.032, 0.070)  # the same for 0->1
PUBLISHED_REPLICATES, PUBLISHED_BULK = 0.94, 0.83  # Pearson's r of log10 counts; Chen et al. 2015
# Fractions of molecules whose word has no error, and at most one, at error rates of 10 % 1->0 and 4 % 0->1, for words
# of weight 4 of 16 bits (binomial distribution)
EXACT, CORRECTABLE = 0.40, 0.78
FEW_FIELDS_LOST = 0.05
FEWEST_GENES = 20  # with fewer, the interval of a correlation is too wide
Z95 = 1.96


@dataclass(frozen=True)
class Finding:
    """One figure of a run, compared with its threshold; status "info" if it has none."""

    name: str
    value: str
    status: Status
    threshold: str = "none: for information"
    source: str = ""


def overall(findings: list[Finding]) -> Status:
    """Return the worst status of all findings."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def findings(run: Mapping[str, Any], halves: tuple[float, int], bulk: tuple[float, int] | None = None) -> list[Finding]:
    """Return all findings of a run.

    run: its record. halves: Pearson's r of log10 counts between two halves of the fields, and the number of genes.
    bulk: the same with bulk RNA-seq.
    """
    figures = run["figures"]
    return [
        fields_done(figures["n_fields"], len(run["failed"])),
        codebook_fit(run["codebook_fit"], figures["blanks_in_book"]),
        misidentified(figures, run["parameters"]["misidentification_rate"]),
        *error_rates(run["bit_error_rates"]),
        exact_words(run["words"]),
        efficiency(figures, run["words"], run["codebook"]["is_blank"]),
        correlation("Counts of genes, half of the fields against the other half", *halves, PUBLISHED_REPLICATES),
        *([correlation("Counts of genes against bulk RNA-seq", *bulk, PUBLISHED_BULK)] if bulk else []),
        unusual(run["quality"], run["bits"], figures["n_fields"]),
        saturated(run["fields"], len(run["z"])),
        *stage(run["stage"]),
        Finding("Molecules kept", f"{figures['n_kept']:,}", "info"),
        Finding("Cells", f"{figures['n_cells']:,}", "info"),
        Finding("Molecules per cell, median", f"{figures['transcripts_per_cell']:,.0f}", "info"),
        Finding("Molecules in cells", f"{figures['share_in_cells']:.0%}", "info"),
    ]


def fields_done(n_done: int, n_failed: int) -> Finding:
    """Compare the number of decoded fields with the number requested."""
    share = n_failed / max(n_done + n_failed, 1)
    status: Status = "pass" if not n_failed else "warn" if share <= FEW_FIELDS_LOST else "fail"
    threshold = f"all; fail if more than {FEW_FIELDS_LOST:.0%} failed"
    return Finding("Fields decoded", f"{n_done} of {n_done + n_failed}", status, threshold, "this run")


def codebook_fit(fit: Mapping[str, Any], blanks: bool) -> Finding:
    """Check whether the images fit the codebook."""
    value = f"{fit['wrong']:.1%} wrong" if blanks and fit["wrong"] is not None else "unknown, no blanks"
    return Finding(
        "Wrong calls among the likely ones before filtering, from the blanks",
        value,
        "pass" if fit["fits"] else "fail",
        f"at most {MOST_WRONG:.0%}",
        "simulated and real fields, with correct and wrong codebooks",
    )


def misidentified(figures: Mapping[str, Any], target: float) -> Finding:
    """Compare the misidentification rate of the kept molecules with the chosen rate."""
    rate, held_out = figures["misidentification_rate"], figures["held_out"]
    if rate is None:
        return Finding("Wrong molecules among those kept", "unknown", "warn", f"at most {target:.0%}", "parameter")
    value = f"{rate:.1%}"
    status: Status = "pass"
    if held_out is not None:
        value += f" (held out {held_out['low']:.1%} to {held_out['high']:.1%})"
        status = "fail" if held_out["low"] > target else "warn" if held_out["rate"] > 1.2 * target else "pass"
    elif not figures["blanks_in_book"]:
        status = "warn"
    return Finding(
        "Wrong molecules among those kept",
        value,
        status,
        f"at most {target:.0%}; fail if the whole interval is higher",
        f"parameter misidentification_rate; {CHEN} aim at 5%",
    )


def error_rates(rates: Mapping[str, Any]) -> list[Finding]:
    """Compare the 1->0 and 0->1 error rates of the bits with published rates."""
    found = []
    for name, kind, (mean, worst) in (
        ("Bits lost, 1→0", "lost", PUBLISHED_LOST),
        ("Bits gained, 0→1", "gained", PUBLISHED_GAINED),
    ):
        values, low = np.array(rates[kind], float), np.array(rates[f"{kind}_low"], float)
        known = np.flatnonzero(np.isfinite(values))
        threshold = f"no bit's 95% interval above {worst:.1%}; fail if the mean of the lower ends is above it"
        source = f"{CHEN}: mean {mean:.1%}, worst bit {worst:.1%}"
        if not len(known):
            found.append(Finding(name, "unknown", "warn", threshold, source))
            continue
        top = known[np.argmax(low[known])]
        status: Status = "pass" if low[top] <= worst else "warn" if low[known].mean() <= worst else "fail"
        value = f"mean {values[known].mean():.1%}, {rates['bit'][top]} {values[top]:.1%}"
        found.append(Finding(name, value, status, threshold, source))
    return found


def exact_words(words: Mapping[str, Any]) -> Finding:
    """Compute the share of kept molecules without bit errors."""
    name, kept = "Kept molecules without bit errors", sum(words["n_kept"])
    expected = EXACT / CORRECTABLE
    threshold, source = (
        f"at least {EXACT:.0%}; fail below {FEW_EXACT:.0%}",
        (f"{expected:.0%} at errors of 10% and 4%; {FEW_EXACT:.0%}: simulated and real fields, with wrong codebooks"),
    )
    if not kept:
        return Finding(name, "no molecules", "fail", threshold, source)
    share = sum(words["n_exact"]) / kept
    status: Status = "pass" if share >= EXACT else "warn" if share >= FEW_EXACT else "fail"
    return Finding(name, f"{share:.0%}", status, threshold, source)


def efficiency(figures: Mapping[str, Any], words: Mapping[str, Any], is_blank: list[bool]) -> Finding:
    """Return the share of molecules found and kept: of added molecules, else computed from error rates of the bits."""
    threshold = f"at least {CORRECTABLE:.0%}; fail below {EXACT:.0%}"
    source = "share of words with at most one error, or none, at error rates of 10% and 4%"
    spiked = figures.get("spike_in")
    if spiked is not None:
        status: Status = "pass" if spiked["high"] >= CORRECTABLE else "warn" if spiked["high"] >= EXACT else "fail"
        value = "{rate:.0%} ({low:.0%} to {high:.0%})".format(**spiked) + f" of {figures['n_spikes']:,}"
        threshold += ", by the upper end of the interval"
        return Finding("Detected share of the molecules added to the images", value, status, threshold, source)
    name = "Detected share of molecules, median gene, from the error rates of the bits alone"
    middle = median_efficiency(words, is_blank)
    if np.isnan(middle):
        return Finding(name, "unknown", "warn", threshold, source)
    status = "pass" if middle >= CORRECTABLE else "warn" if middle >= EXACT else "fail"
    return Finding(name, f"{middle:.0%}; too high where spots overlap", status, threshold, source)


def median_efficiency(words: Mapping[str, Any], is_blank: list[bool]) -> float:
    """Return the detection efficiency of the median gene, NaN if it is unknown for all."""
    values = np.array(words["detection_efficiency"], float)[~np.array(is_blank, bool)]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def correlation(name: str, r: float, n_genes: int, published: float) -> Finding:
    """Compare a correlation over genes with a published one, with the 95% interval of Fisher's transformation."""
    threshold = f"at least {published}; fail if the interval contains 0"
    source = f"{CHEN}; interval of this run"
    if not np.isfinite(r) or n_genes < FEWEST_GENES:
        return Finding(name, f"too few genes, {n_genes}", "info", threshold, source)
    low, high = np.tanh(np.arctanh(np.clip(r, -0.999999, 0.999999)) + np.array([-Z95, Z95]) / np.sqrt(n_genes - 3))
    status: Status = "pass" if r >= published else "warn" if low > 0 else "fail"
    return Finding(name, f"r = {r:.3f} ({low:.2f} to {high:.2f}), {n_genes} genes", status, threshold, source)


def unusual(quality: Mapping[str, Any], bits: Mapping[str, Any], n_fields: int) -> Finding:
    """Count images that differ from those of the same bit in other fields, and bits without signal."""
    n, dead = len(quality.get("fov", [])), sum(scale == 0 for scale in bits["scale"])
    value = f"{n} of {n_fields * len(bits['names']):,}" + (f", {dead} dead bits" if dead else "")
    status: Status = "fail" if dead else "warn" if n else "pass"
    source = "this run: more than six robust sigmas from the other fields"
    return Finding(
        "Images that differ from the others of their bit", value, status, "none; fail if a bit is dead", source
    )


def saturated(fields: Mapping[str, Any], n_planes: int) -> Finding:
    """Compute the share of saturated pixels in the worst bit of the worst field."""
    shares = [max(f["saturated"], default=0) / (np.prod(f["shape"]) * n_planes) for f in fields.values()]
    worst = max(shares, default=0.0)
    status: Status = "pass" if worst <= MOST_SATURATED / 10 else "warn" if worst <= MOST_SATURATED else "fail"
    threshold = f"at most {MOST_SATURATED / 10:.1%}; fail above {MOST_SATURATED:.0%}"
    source = f"a field whose median bit has {MOST_SATURATED:.0%} is excluded"
    return Finding("Saturated pixels, worst bit of a field", f"{worst:.2%}", status, threshold, source)


def stage(found: Mapping[str, Any]) -> list[Finding]:
    """Count overlaps of fields in which both show the same molecules."""
    used, n_links, untied = sum(found["links"]["used"]), len(found["links"]["used"]), found["untied"]
    if not n_links + untied:
        return []
    status: Status = "fail" if untied >= max(used, 1) else "warn" if untied or used < n_links else "pass"
    return [
        Finding(
            "Overlaps of fields that show the same molecules",
            f"{used} of {n_links + untied}",
            status,
            "all; fail if at least half of them do not",
            "this run",
        )
    ]
