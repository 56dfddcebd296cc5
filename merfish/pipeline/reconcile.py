"""Reduce over fields: error rates and filter, stage positions, and cells seen in several fields.

Every step is a map over fields that reads a field and those that overlap it, followed by a small reduction. Memory
grows only by a few numbers per field and cell.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish.calls.error_model import WordTally, add_word_tallies, held_out_rate, tally_words
from merfish.calls.filtering import (
    PATCHES,
    POSTERIOR,
    add_tallies,
    blank_share,
    call_features,
    fit_log_odds,
    log_odds_wrong,
    probability_wrong,
    threshold_at_rate,
)
from merfish.calls.stitching import MOST_ERROR, FieldPlaces, Links, Stitching, link_field, overlapping_fields, stitch
from merfish.cells.merging import NO_LINKS, CellNumbers, field_frame, in_stage_frame, number_cells, same_cells
from merfish.imaging.experiment import Experiment
from merfish.pipeline.cluster import Failure, RunMap, StepError, Work
from merfish.pipeline.fields import read_calls, read_found, read_outlines, read_spikes, read_tally
from merfish.pipeline.progress import Display

KEPT_DTYPE = np.dtype(
    [("row", "i8"), ("word", "i4"), ("x", "f4"), ("y", "f4"), ("z", "f4"), ("probability", "f4"), ("nuclear", "?")]
)


@dataclass(frozen=True, eq=False)
class Fields:
    """The fields from which the results are computed.

    out: folder of the run. work: folder for files of the steps after decoding. shape: (y, x) of a field, in pixels.
    outlines: number of cell outlines of each field. planes: heights of the planes in which cells have separate
    outlines, in micrometres; None if each cell has one outline for all.
    """

    out: Path
    work: Path
    experiment: Experiment
    fovs: tuple[int, ...]
    shape: tuple[int, int]
    outlines: dict[int, int]
    planes: np.ndarray | None = None

    @property
    def size(self) -> tuple[float, float]:
        """(x, y) of a field, in micrometres."""
        scale = self.experiment.microns_per_pixel
        return self.shape[1] * scale, self.shape[0] * scale

    def near(self, positions: np.ndarray, beyond: float) -> dict[int, list[int]]:
        """Return for each field those that overlap it or lie at most ``beyond`` micrometres away."""
        return overlapping_fields(self.fovs, positions, self.size, beyond)

    def file(self, name: str, fov: int, kind: str = "rows") -> Path:
        """Return the file in which a step stores its result for a field; kind: its suffix."""
        return self.work / f"{name}_{fov:04d}.{kind}"

    def write_rows(self, name: str, fov: int, rows: np.ndarray) -> None:
        """Store an array (row,) for a later step, without a header, which would take longer to read than a few rows."""
        rows.tofile(self.file(name, fov))

    def read_rows(self, name: str, fov: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Read what `write_rows` wrote."""
        return np.fromfile(self.file(name, fov), dtype)


@dataclass(frozen=True, eq=False)
class Filter:
    """Log odds of a call being wrong (see `merfish.calls.filtering.fit_log_odds`), and the threshold of kept calls.

    blank_share: fraction of wrong calls that are blanks. held_out: misidentification rate of calls that were not used
    to fit the filter, with its interval.
    """

    odds: np.ndarray
    threshold: float
    blank_share: float
    held_out: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Reconciled:
    """Quantities that all fields share; words: tallies of all calls."""

    filter: Filter
    words: WordTally
    stitching: Stitching
    cells: CellNumbers


def reconcile(fields: Fields, rate: float, run_map: RunMap, display: Display) -> Reconciled:
    """Estimate the filter, the positions and the cells of all fields."""
    experiment, fovs = fields.experiment, fields.fovs

    def each(name: str, work: Work) -> list[Any]:
        found = map_all(name, work, fovs, run_map, display)
        return [found[fov] for fov in fovs]

    learnt = learn_filter(fields, rate)
    words = add_word_tallies(each("filter", RateWork(fields, learnt)), experiment.codebook)
    near = fields.near(experiment.positions, MOST_ERROR)
    stitching = stitch(experiment.positions, each("stitch", LinkWork(fields, near)))
    overlapping = fields.near(stitching.positions, 0.0)
    pairs = each("match cells", SameCellsWork(fields, stitching.positions, overlapping))
    cells = number_cells(fields.outlines, np.concatenate([NO_LINKS, *pairs]))
    return Reconciled(learnt, words, stitching, cells)


def map_all(name: str, work: Work, fovs: Sequence[int], run_map: RunMap, display: Display) -> dict[int, Any]:
    """Return the result of every field. Raises StepError if one fails: after decoding, its data are not at fault."""
    found = {}
    with display.step(name):
        for fov, outcome in display.track(run_map(work, fovs), len(fovs), name):
            if isinstance(outcome, Failure):
                if outcome.disk_full:
                    raise OSError(errno.ENOSPC, "no space left", name)
                raise StepError(f"{name}, field {fov}: {outcome.reason}", outcome)
            found[fov] = outcome
    return found


def learn_filter(fields: Fields, rate: float) -> Filter:
    """Fit the log odds of calls being wrong to the tallies of all fields; find the threshold for a given ``rate``."""
    tallies = [read_tally(fields.out, fov) for fov in fields.fovs]
    # halves for held-out calls: every other field, or the two sides of a single one
    sides = [[half for halves in tallies[k::2] for half in halves] for k in (0, 1)]
    if len(tallies) == 1:
        sides = [[half] for half in tallies[0]]
    called = [[half for half in side if len(half.calls)] for side in sides]
    widths = {half.values.shape[1] for side in called for half in side}
    evidence = PATCHES if len(PATCHES.steps) in widths else POSTERIOR
    halves = add_tallies(called[0], evidence), add_tallies(called[1], evidence)
    everything, book = add_tallies(halves, evidence), fields.experiment.codebook
    found = sum((read_found(fields.out, fov) for fov in fields.fovs), np.zeros(book.n_words, np.int64))
    share = blank_share(found, book, evidence)
    odds = fit_log_odds(everything, share, evidence)
    held_out = held_out_rate(halves, evidence, share, rate)
    return Filter(odds, threshold_at_rate(everything, odds, rate), share, held_out)


def kept_spikes(fields: Fields, spiked: Collection[int], chosen: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Return the words (spike,) of the added molecules, and whether the filter keeps the calls that find them."""
    words, kept = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for fov in sorted(set(spiked) & set(fields.fovs)):
        word, found, features = read_spikes(fields.out, fov)
        passes = np.zeros(len(word), bool)
        if len(found):
            passes[found] = log_odds_wrong(features, chosen.odds) <= chosen.threshold
        words.append(word)
        kept.append(passes)
    return np.concatenate(words), np.concatenate(kept)


@dataclass(frozen=True, eq=False)
class RateWork:
    """Computes the probability of each call of a field, selects the calls to keep, and counts them by word."""

    fields: Fields
    filter: Filter

    def __call__(self, fov: int) -> WordTally:
        """Return the counts of the field; its kept calls are written to the file ``kept``."""
        calls = read_calls(self.fields.out, fov)
        probability, keep = rate_field(calls, self.filter)
        word, shown = calls["barcode_id"].to_numpy(), calls["shown"].to_numpy()
        kept = np.empty(int(keep.sum()), KEPT_DTYPE)
        kept["row"], kept["word"] = np.flatnonzero(keep), word[keep]
        kept["probability"] = probability[keep]
        for name in ("x", "y", "z", "nuclear"):
            kept[name] = calls[name].to_numpy()[keep]
        self.fields.write_rows("kept", fov, kept)
        return tally_words(word, shown, probability, keep, self.fields.experiment.codebook)


def rate_field(calls: pd.DataFrame, chosen: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each call of a field being correct, float32 (call,), and whether it is kept, bool."""
    if not len(calls):
        return np.empty(0, np.float32), np.empty(0, bool)
    features, _ = call_features(calls)
    keep = log_odds_wrong(features, chosen.odds) <= chosen.threshold
    return (1 - probability_wrong(features, chosen.odds)).astype(np.float32), keep


@dataclass(frozen=True, eq=False)
class LinkWork:
    """Compares a field with the later fields near it."""

    fields: Fields
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> Links:
        """Return the links between them."""
        later = [other for other in self.near[fov] if other > fov]
        return link_field(fov, later, self._places, self.fields.experiment.positions, self.fields.size)

    def _places(self, fov: int) -> FieldPlaces:
        kept, scale = self.fields.read_rows("kept", fov, KEPT_DTYPE), self.fields.experiment.microns_per_pixel
        return FieldPlaces(kept["word"], kept["x"].astype(float) * scale, kept["y"].astype(float) * scale)


@dataclass(frozen=True, eq=False)
class SameCellsWork:
    """Finds the outlines of a field that show the same cells as outlines of later fields."""

    fields: Fields
    positions: np.ndarray
    near: dict[int, list[int]]

    def __call__(self, fov: int) -> np.ndarray:
        """Return links (link, 4): field, outline, field, outline."""
        links = [NO_LINKS]
        here, frame = self._outlines(fov)
        for other in self.near[fov] if len(here) else []:
            if other > fov and self.fields.outlines[other]:
                there, its_frame = self._outlines(other)
                i, j = same_cells(here, there, frame, its_frame)
                links.append(np.column_stack([np.full(len(i), fov), i, np.full(len(j), other), j]))
        return np.concatenate(links)

    def _outlines(self, fov: int) -> tuple[np.ndarray, Any]:
        scale = self.fields.experiment.microns_per_pixel
        frame = field_frame(self.positions[fov], self.fields.shape, scale)
        return stage_outlines(self.fields, self.positions, fov), frame


def stage_outlines(fields: Fields, positions: np.ndarray, fov: int) -> np.ndarray:
    """Return the outlines of a field in the frame of the stage, in micrometres."""
    return in_stage_frame(read_outlines(fields.out, fov), positions[fov], fields.experiment.microns_per_pixel)
