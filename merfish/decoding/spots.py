"""Whole spots to words: localise spots in each bit, link them across bits, and score the words of each candidate.

A molecule is one object seen in several bits. Around a peak, the nearest free peak of each bit is collected. The
observation of a bit (a peak, its distance from the centre and its brightness relative to the others; or no peak, and
the brightness there) is scored by its likelihood ratio between bits that are on in the word and bits that are off. The
two distributions include everything that happens to a bit (1->0 and 0->1 errors, chance neighbours, peaks hidden by a
neighbour). They are learnt from the data, with the abundances of words, by expectation-maximisation: calls, weighted by
their posterior, refill the histograms. Within a round the most certain molecule is called first and takes its peaks;
the others are scored again without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from merfish._jit import map_bits
from merfish.codebook import Codebook
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.alignment import BitShifts, bit_shifts
from merfish.decoding.evidence import learn_classes, start_classes
from merfish.decoding.peaks import Fit, fit_peaks, share_peaks
from merfish.decoding.planes import depth
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

# lengths in sigmas of the PSF
RADIUS = 0.9  # peaks of one molecule are closer than this to its centre, registration error included
EXPLAINED = 0.45  # a peak of another bit this close is the molecule's own 0->1 error
CELL = 1.5  # of the grid, at least RADIUS
CROWDED = 2.5  # molecules this close are fitted together: their spots overlap
ROUNDS = 3  # of expectation-maximisation
REFITS = 2  # fits of the peaks of crowded molecules; a third finds less than half as many more
BAND = 64.0  # of rows, that are learnt from together
LEARN_PEAKS = 20_000  # peaks of all bits; about a thousand molecules, hundreds in each bit
LIGHT_STEP = 1 / 32  # molecules; of the light around peaks, a quarter of the bins it is sorted into


@dataclass(frozen=True, eq=False)
class Spots:
    """Molecules called; arrays (molecule,).

    word: int32. x, y: float64 pixel, y within the plane. plane: int32, where it is brightest. z: float32 in planes,
    interpolated from its brightness in the adjacent planes. intensity: float32, mean height of its peaks.
    log_odds: float64, of the word against all other words. errors: uint64, the bits that differ from the word.
    shifts: of the bits, which were corrected.
    """

    word: np.ndarray
    x: np.ndarray
    y: np.ndarray
    plane: np.ndarray
    z: np.ndarray
    intensity: np.ndarray
    log_odds: np.ndarray
    errors: np.ndarray
    shifts: BitShifts


def decode_spots(
    stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization, *, height: int, sigma: float
) -> Spots:
    """Call molecules from whole spots.

    stack: (bit, plane * height, x) real, band-passed; normalised here by ``normalization``. sigma: of the PSF, pixel.
    Deterministic: the same input gives the same calls.
    """
    left = np.empty(stack.shape, np.int8)
    fits = gather_peaks(stack, normalization, height, sigma, left)
    shifts = measure_shifts(fits, height, sigma)
    live = normalization.gain > 0  # a dead bit is no evidence for or against any word
    classes = start_classes(codebook, live)
    some = make_scene(_some(fits, sigma), left, height, sigma, shifts.shift)
    views = look(some)
    for _ in range(ROUNDS):
        called = call(some, views, classes, sigma)
        classes = learn_classes(codebook, live, called.share, called.shows, called.light)
    scene = make_scene(fits, left, height, sigma, shifts.shift)
    if len(scene.px) > len(some.px):
        called = call(scene, look(scene), classes, sigma)
    for _ in range(REFITS):
        classes = learn_classes(codebook, live, called.share, called.shows, called.light)
        fits = refit(fits, scene, called, left, sigma)
        scene = make_scene(fits, left, height, sigma, shifts.shift)
        called = call(scene, look(scene), classes, sigma)
    return _molecules(called, scene, codebook, shifts)


def _molecules(called: kernels.Calls, scene: kernels.Scene, codebook: Codebook, shifts: BitShifts) -> Spots:
    height = scene.height
    table, (word, errors) = called.table, called.evidence.T
    word = word.astype(np.int32)
    plane = (table[:, 1] / height).astype(np.int32)
    z = plane.astype(np.float32)
    if scene.light.shape[1] > height:
        bits = codebook.codes[word] & ~errors
        light = np.empty((len(word), 3))
        light_by_plane(table[:, 0], table[:, 1], bits, scene, light)
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
        shifts=shifts,
    )


def gather_peaks(
    stack: np.ndarray | Bandpassed, normalization: Normalization, height: int, sigma: float, left: np.ndarray
) -> list[Fit]:
    """Peaks of every bit; writes their residual to ``left`` (bit, row, x) int8, in steps of `LIGHT_STEP`."""

    def one_bit(bit: int) -> Fit:
        image = np.array(stack[bit], np.float32, copy=isinstance(stack, np.ndarray))
        image -= normalization.background[bit]
        image *= normalization.gain[bit]
        fit = fit_peaks(image, height, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(stack)))


def refit(fits: list[Fit], scene: kernels.Scene, called: kernels.Calls, left: np.ndarray, sigma: float) -> list[Fit]:
    """Peaks of every bit, with those of molecules that are close together fitted at the molecules' positions.

    Two molecules closer than the width of a spot have one common peak in bits that they share. Their positions are
    known from the bits that they do not share. left (bit, row, x) int8, the residual, is updated.
    """
    ends = np.cumsum([0, *(len(fit.x) for fit in fits)])
    x, y = called.table[:, 0], called.table[:, 1]
    first = (y / scene.height).astype(np.int64) * scene.height
    apart = first / scene.height * (2 * CROWDED * sigma)
    pairs = cKDTree(np.column_stack([x, y, apart])).query_pairs(CROWDED * sigma, output_type="ndarray")

    def one_bit(bit: int) -> Fit:
        fit, owner = fits[bit], called.owner[ends[bit] : ends[bit + 1]]
        has = np.zeros(len(x), bool)
        has[owner[owner >= 0]] = True
        near = np.unique(pairs[has[pairs].any(axis=1)])  # the bit is on in one of the two, or in both
        if fit.profile is None or not len(near):
            return fit
        chosen = np.zeros(len(x), bool)
        chosen[near] = True
        mx = np.clip(x[near] + scene.shift_x[bit], 0, left.shape[2] - 1)
        my = np.clip(y[near] + scene.shift_y[bit], first[near], first[near] + scene.height - 1)
        image = left[bit] * np.float32(LIGHT_STEP)
        fit = share_peaks(image, scene.height, fit, chosen[owner] & (owner >= 0), mx, my, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(fits)))


def _some(fits: list[Fit], sigma: float) -> list[Fit]:
    """About `LEARN_PEAKS` peaks in evenly spaced bands of rows: enough to learn the distributions in a large field."""
    every = sum(len(fit.x) for fit in fits) // LEARN_PEAKS
    if every < 2:
        return fits
    parts = []
    for fit in fits:
        chosen = (fit.y / (BAND * sigma)).astype(np.int64) % every == 0
        parts.append(fit._replace(x=fit.x[chosen], y=fit.y[chosen], height=fit.height[chosen]))
    return parts


def measure_shifts(fits: list[Fit], height: int, sigma: float) -> BitShifts:
    """Shifts of the bits of a field, from their peaks."""
    x, y, _, bit = joined(fits)
    plane = (y / height).astype(np.int64)
    return bit_shifts(x, y - plane * height, plane, bit, len(fits), sigma)


class Peaks(NamedTuple):
    """Peaks of all bits, (peak,): x, y (rows), height float64, and bit int64."""

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    bit: np.ndarray


def joined(fits: list[Fit]) -> Peaks:
    """The peaks of all bits, bit by bit."""
    x, y, height = (np.concatenate([getattr(fit, name) for fit in fits]) for name in ("x", "y", "height"))
    return Peaks(x, y, height, np.repeat(np.arange(len(fits)), [len(fit.x) for fit in fits]))


def make_scene(fits: list[Fit], left: np.ndarray, height: int, sigma: float, shift: np.ndarray) -> kernels.Scene:
    """Peaks corrected for the shifts (bit, 2) of their bits, sorted into a grid; left: see `gather_peaks`."""
    _, n_rows, width = left.shape
    x, y, top, bit = joined(fits)
    first = (y / height).astype(np.int64) * height
    x = np.clip(x - shift[bit, 1], 0, width - 1)
    y = np.clip(y - shift[bit, 0], first, first + height - 1)
    cell = CELL * sigma
    n_across, n_down = int(width / cell) + 1, int(n_rows / cell) + 1
    start, order = np.empty(n_across * n_down + 1, np.int64), np.empty(len(x), np.int64)
    kernels.fill_grid(x, y, cell, n_across, start, order)
    shift_y, shift_x = np.ascontiguousarray(shift.T)
    plane = (first // height).astype(np.int32)
    scene = kernels.Scene(
        x, y, top, bit, plane.astype(np.float32), start, order, cell, n_across, RADIUS * sigma, left, LIGHT_STEP,
        shift_y, shift_x, height,
    )  # fmt: skip
    if n_rows == height:
        return scene
    light = np.empty((len(x), 3))
    light_by_plane(x, y, np.uint64(1) << bit.astype(np.uint64), scene, light)
    return scene._replace(pz=depth(light, plane))


def look(scene: kernels.Scene) -> kernels.Views:
    """Collect the neighbourhood of each peak of a scene."""
    n, n_bits = len(scene.px), len(scene.light)
    views = kernels.Views(np.empty((n, n_bits), np.int32), np.empty((n, n_bits), np.uint8), np.empty((n, 3)))
    free = np.zeros(n, bool)
    if n <= kernels.CHUNK:
        kernels.observe_some(scene, 0, n, free, views)
    else:
        kernels.observe_all(scene, free, views)
    return views


def call(scene: kernels.Scene, views: kernels.Views, classes: kernels.Classes, sigma: float) -> kernels.Calls:
    """One round of calls."""
    most, n_bits = len(scene.px), len(scene.light)
    out = kernels.Calls(
        table=np.empty((most, 5)),
        evidence=np.empty((most, 2), np.uint64),
        owner=np.empty(most, np.int64),
        share=np.zeros(len(classes.weight)),
        shows=np.zeros((2, n_bits, kernels.N_BINS)),
        light=np.zeros((2, kernels.N_STEPS)),
    )
    first = np.empty(most)
    if most <= kernels.CHUNK:
        kernels.score_some(views, 0, most, classes, first)
    else:
        kernels.score_seeds(views, classes, first)
    n = kernels.call_molecules(scene, views, classes, first, EXPLAINED * sigma, out)
    return out._replace(table=out.table[:n], evidence=out.evidence[:n])
