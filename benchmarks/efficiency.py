"""Detection efficiency estimated by a run, compared with the truth: python benchmarks/efficiency.py.

Writes benchmarks/results/efficiency.md. Each stack is filtered, decoded and rated like a field of a run. Molecules are
then added to it, and the share that is found is compared with the share of the true molecules that are kept.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from tables import RESULTS, as_markdown

from merfish import mhd4_codebook, simulate_stack
from merfish.calls.error_model import tally_words, word_statistics
from merfish.calls.filtering import keep_at_rate, learn_odds, with_odds
from merfish.config import MISIDENTIFICATION_RATE
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.imaging.normalize import peak_normalization
from merfish.imaging.preprocess import bandpass
from merfish.pipeline.fields import spikes_of
from merfish.pipeline.single import keeps_spikes
from merfish.simulate import match_calls

BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
SEEDS = range(800, 804)
FIELDS = {0.003: 768, 0.01: 512, 0.03: 320}  # molecules per pixel: side in pixels


def measure(method: str, density: float, seed: int) -> dict[str, float]:
    """Return the true efficiency, its estimate from spikes, and its estimate from the error rates of the bits alone."""
    side = FIELDS[density]
    stack, truth = simulate_stack(BOOK, shape=(side, side), density=density, seed=seed)
    filters = METHODS[method].smoothing, METHODS[method].background
    filtered = bandpass(stack, smoothing=filters[0], background=filters[1])[:, None]
    scale = peak_normalization(filtered)

    def decode(images: np.ndarray) -> pd.DataFrame:
        return decode_filtered(images, BOOK, scale, method=method)

    calls = decode(filtered)
    odds, share = learn_odds(calls, BOOK)
    rated = with_odds(calls, odds)
    keep = keep_at_rate(1 - rated["probability"].to_numpy(float), MISIDENTIFICATION_RATE)
    word, shown, probability = (rated[name].to_numpy() for name in ("barcode_id", "shown", "probability"))
    words = tally_words(word, shown, probability, keep, BOOK)
    spikes = spikes_of(filtered, calls, BOOK, scale, method, filters)
    kept = keeps_spikes(spikes, odds, float(probability[keep].min()))
    return {
        "true": len(match_calls(calls[keep], truth)[0]) / len(truth),
        "stated": float(kept.mean()),
        "by error rates alone": float(
            np.average(word_statistics(words, BOOK, share)["detection_efficiency"], weights=words.kept)
        ),
        "spikes": len(spikes),
    }


def main() -> None:
    """Measure every method at every density, and write the table."""
    rows = [
        {"method": method, "molecules/px": density, **measure(method, density, seed)}
        for method in METHODS
        for density in FIELDS
        for seed in SEEDS
    ]
    table = pd.DataFrame(rows).groupby(["method", "molecules/px"], sort=False).mean().round(3).reset_index()
    table["spikes"] = table["spikes"].round().astype(int)
    text = f"""Made by `python benchmarks/efficiency.py`.

Share of true molecules that are kept at {MISIDENTIFICATION_RATE:.0%} misidentification; `stated`: the share of
the molecules added to the same images that are kept, as reported by a run; `by error rates alone`: the value that it
would report without them. Means of {len(SEEDS)} simulated fields; `spikes`: molecules added to each.

{as_markdown(table)}
"""
    (RESULTS / "efficiency.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
