"""Whole spots to words: localise them in each bit, link them across bits, weigh each candidate's words.

A molecule is one object seen in several bits. Around a peak the nearest free peak of each bit is gathered; what a bit
shows (a peak, how near the centre and how bright against the others; or no peak, and how bright the place is) is
scored by how much likelier it is in a bit that is on in the word than in one that is off. The two distributions
hold everything that happens to a bit (1->0 and 0->1 errors, accidental neighbours, peaks hidden in a neighbour's
flank) and are learnt from the data, with the abundance of words, by expectation-maximisation: calls, weighted by
their posterior, refill the histograms. Within a round the most certain molecule is called first and takes its
peaks; the others are scored again without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from merfish._jit import map_bits
from merfish.codebook import Codebook
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.peaks import fit_peaks
from merfish.decoding.pixels import on_bits
from merfish.decoding.planes import LIGHT_RADIUS, depth
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

RADIUS = 1.5  # pixel; peaks of one molecule lie nearer to its centre, registration error included
EXPLAINED = 0.6  # pixel; a peak of another bit this near is the molecule's own 0->1 error
FLOOR = -4.0  # log odds of a candidate against no molecule below which it is not worth a call
ROUNDS = 3  # of expectation-maximisation; a fourth changes recall and precision by less than 0.003
LIGHT_STEP = 1 / 32  # molecules; of the light around peaks, a quarter of the bins it is sorted into
CELL = 2.0  # pixel, of the grid, at least RADIUS
# where the histograms start from: Chen et al. 2015, and peaks located to 0.22 px
START_LOST, START_GAINED, START_SIGMA, START_SPREAD, START_CROWD = 0.10, 0.04, 0.22, 0.3, 0.04
# of every word before any is seen: in a field of few molecules chance must not make its own abundant genes
PRIOR_CALLS = 5.0
START_WEIGHT = 20.0  # calls that the start counts for


@dataclass(frozen=True, eq=False)
class Spots:
    """Molecules called; arrays (molecule,).

    word: int32. x, y: float64 pixel, y within the plane. plane: int32, where it was seen. z: float32 in planes, between
    them by its light in the planes beside. intensity: float32, mean height of its peaks.
    log_odds: float64, of the word against all other words. errors: uint64, the bits that differ from the word.
    """

    word: np.ndarray
    x: np.ndarray
    y: np.ndarray
    plane: np.ndarray
    z: np.ndarray
    intensity: np.ndarray
    log_odds: np.ndarray
    errors: np.ndarray


def decode_spots(
    stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization, *, height: int
) -> Spots:
    """Call molecules from whole spots.

    stack: (bit, plane * height, x) real, band-passed; normalised here by ``normalization``.
    Deterministic: the same input gives the same calls.
    """
    values = np.empty(stack.shape, np.int8)
    peaks = gather_peaks(stack, normalization, height, values)
    grid = make_grid(peaks, values.shape)
    live = normalization.gain > 0  # a dead bit says nothing about any word
    ratio = np.outer(live, start_log_ratio())
    abundance = np.full(codebook.n_words, 1 / codebook.n_words)
    for _ in range(ROUNDS - 1):
        table, evidence, observed = _call(values, height, peaks, grid, codebook, ratio, abundance)
        weight = 1 / (1 + np.exp(-np.clip(table[:, 4], -30, 30)))
        abundance = word_abundance(evidence[:, 0].astype(np.int64), weight, codebook.is_blank)
        words = codebook.words[evidence[:, 0]]
        ratio = np.outer(live, _log_ratio(observed[:, live], words[:, live], weight))
    table, evidence, _ = _call(values, height, peaks, grid, codebook, ratio, abundance)
    plane = (table[:, 1] / height).astype(np.int32)
    word, errors = evidence[:, 0].astype(np.int32), evidence[:, 1]
    z = plane.astype(np.float32)
    if len(values[0]) > height:
        bits = codebook.codes[word] & ~errors
        light = np.empty((len(word), 3))
        x, row = table[:, 0], table[:, 1]
        light_by_plane(x, row, bits, *peaks, *grid, CELL, LIGHT_RADIUS, values, LIGHT_STEP, height, light)
        z = depth(light, plane)
    return Spots(
        word=word,
        x=table[:, 0],
        y=table[:, 1] - plane * height,
        plane=plane,
        z=z,
        intensity=table[:, 2].astype(np.float32),
        log_odds=table[:, 4],
        errors=errors,
    )


def word_abundance(word: np.ndarray, weight: np.ndarray, is_blank: np.ndarray) -> np.ndarray:
    """Share of each word (word,) among weighted calls; the blanks are spread over the abundances that genes have.

    Were blanks given their own, hardly any wrong call would fall on them. As it is, chance meets a blank as often as a
    gene, however it depends on abundance: the blanks' share of the wrong calls is their share of the words.
    """
    abundance = np.bincount(word, weight, len(is_blank)) + PRIOR_CALLS
    n_blanks = int(is_blank.sum())
    if 0 < n_blanks < len(is_blank):
        genes = np.sort(abundance[~is_blank])
        abundance[is_blank] = np.repeat(genes, n_blanks).reshape(n_blanks, -1).mean(axis=1)
    return abundance / abundance.sum()


class Peaks(NamedTuple):
    """Peaks of all bits, one bit after the other: x, y (rows), height float64 (peak,), bit int64 (peak,)."""

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    bit: np.ndarray


def gather_peaks(stack: np.ndarray | Bandpassed, normalization: Normalization, height: int, left: np.ndarray) -> Peaks:
    """Peaks of every bit; into ``left`` (bit, row, x) int8 what they leave of the light, in steps of `LIGHT_STEP`."""

    def one_bit(bit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image = np.array(stack[bit], np.float32, copy=isinstance(stack, np.ndarray))
        image -= normalization.background[bit]
        image *= normalization.gain[bit]
        peaks = fit_peaks(image, height)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return peaks

    found = map_bits(one_bit, range(len(stack)))
    x, y, top = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Peaks(x, y, top, np.repeat(np.arange(len(stack)), [len(peaks[0]) for peaks in found]))


class Grid(NamedTuple):
    """Square cells: order (peak,) int64 lists the peaks cell by cell, start (cell + 1,) int64 where each begins."""

    start: np.ndarray
    order: np.ndarray
    n_across: int


def make_grid(peaks: Peaks, shape: tuple[int, ...]) -> Grid:
    """The grid of the peaks of a stack of a shape (bit, row, x)."""
    n_across, n_down = int(shape[2] / CELL) + 1, int(shape[1] / CELL) + 1
    start, order = np.empty(n_across * n_down + 1, np.int64), np.empty(len(peaks.bit), np.int64)
    kernels.fill_grid(peaks.x, peaks.y, CELL, n_across, start, order)
    return Grid(start, order, n_across)


def _call(
    values: np.ndarray,
    height: int,
    peaks: Peaks,
    grid: Grid,
    codebook: Codebook,
    ratio: np.ndarray,
    abundance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One round of calls: table (x, y, brightness, score, log odds), evidence (word, wrong bits), bins observed."""
    most = len(peaks.x)
    table, evidence = np.empty((most, 5)), np.empty((most, 2), np.uint64)
    observed = np.empty((most, codebook.n_bits), np.int16)
    scene = (
        peaks.x,
        peaks.y,
        peaks.bit,
        peaks.height,
        grid.start,
        grid.order,
        CELL,
        grid.n_across,
        RADIUS,
        values,
        LIGHT_STEP,
    )
    model = (ratio, np.log(abundance), *on_bits(codebook))
    first = np.empty(most)
    kernels.score_seeds(*scene, height, *model, first)
    n = kernels.call_molecules(
        *scene, height, *model, codebook.words, first, FLOOR, EXPLAINED, table, evidence, observed
    )
    return table[:n], evidence[:n], observed[:n]


def _log_ratio(observed: np.ndarray, words: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Log of P(observation | bit on in the word) / P(observation | off), (bin,), from weighted calls.

    observed (call, bit) bins; words (call, bit) of the called words; weight (call,).
    """
    on = words.astype(bool)
    weights = np.broadcast_to(weight[:, None], on.shape)
    seen_on, seen_off = (
        np.bincount(observed[mask], weights[mask], kernels.N_BINS) + START_WEIGHT * start
        for mask, start in zip((on, ~on), start_histograms(), strict=True)
    )
    return np.log(seen_on / seen_on.sum()) - np.log(seen_off / seen_off.sum())


def start_log_ratio() -> np.ndarray:
    """The log ratio (bin,) before anything is learnt."""
    on, off = start_histograms()
    return np.log(on) - np.log(off)


def start_histograms() -> tuple[np.ndarray, np.ndarray]:
    """What bits show that are on in the word, and off, (bin,) each, from published error rates."""
    edges = np.linspace(0, RADIUS, kernels.N_NEAR + 1)
    near = np.diff(-np.exp(-(edges**2) / (2 * START_SIGMA**2)))
    accidental = np.pi * np.diff(edges**2) * START_CROWD
    log_height = kernels.LOWEST_LOG_HEIGHT + kernels.LOG_HEIGHT_STEP * (np.arange(kernels.N_HEIGHT) + 0.5)
    own = np.exp(-(log_height**2) / (2 * START_SPREAD**2))
    own = 0.95 * own / own.sum() + 0.05 / kernels.N_HEIGHT
    any_height = np.full(kernels.N_HEIGHT, 1 / kernels.N_HEIGHT)
    dark = np.exp(-np.arange(kernels.N_EMPTY) / 1.5)
    dark /= dark.sum()
    hidden = 0.05 / kernels.N_EMPTY  # a peak that another one swallowed
    seen = 0.95 * np.outer(near, own)
    stray = np.outer(accidental, any_height)
    both = np.full(kernels.N_USED * kernels.N_EMPTY, hidden)  # a peak that another molecule has taken
    on = np.concatenate(
        [((1 - START_LOST) * seen + START_LOST * stray + 1e-4).ravel(), START_LOST * dark + hidden, both]
    )
    off = np.concatenate(
        [
            (START_GAINED * seen + stray + 1e-4).ravel(),
            0.9 * (1 - START_GAINED - accidental.sum()) * dark + hidden,
            both,
        ]
    )
    return on / on.sum(), off / off.sum()
