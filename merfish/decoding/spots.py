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

import numpy as np
from scipy.spatial import cKDTree

from merfish._jit import map_bits
from merfish.codebook import Codebook
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.alignment import bit_shifts
from merfish.decoding.evidence import learn_classes, start_classes
from merfish.decoding.peaks import Fit, fit_peaks, share_peaks
from merfish.decoding.planes import LIGHT_RADIUS, depth
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

# lengths in sigmas of the PSF
RADIUS = 0.9  # peaks of one molecule lie nearer to its centre, registration error included
EXPLAINED = 0.45  # a peak of another bit this near is the molecule's own 0->1 error
CELL = 1.5  # of the grid, at least RADIUS
CROWDED = 2.5
REFITS = 2
ROUNDS = 4  # of expectation-maximisation
LIGHT_STEP = 1 / 32  # molecules; of the light around peaks, a quarter of the bins it is sorted into


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
    stack: np.ndarray | Bandpassed,
    codebook: Codebook,
    normalization: Normalization,
    *,
    height: int,
    sigma: float,
) -> Spots:
    """Call molecules from whole spots.

    stack: (bit, plane * height, x) real, band-passed; normalised here by ``normalization``. sigma: of the PSF, pixel.
    Deterministic: the same input gives the same calls.
    """
    left = np.empty(stack.shape, np.int8)
    fits = gather_peaks(stack, normalization, height, sigma, left)
    scene = make_scene(fits, left, height, sigma)
    live = normalization.gain > 0  # a dead bit says nothing about any word
    classes = start_classes(codebook, live)
    for _ in range(ROUNDS - 1):
        *_, share, shows = _call(scene, classes, sigma)
        classes = learn_classes(codebook, live, share, shows)
    for _ in range(REFITS):
        table, _, owner, _, _ = _call(scene, classes, sigma)
        fits = refit(fits, scene, table, owner, left, sigma)
        scene = make_scene(fits, left, height, sigma)
        *_, share, shows = _call(scene, classes, sigma)
        classes = learn_classes(codebook, live, share, shows)
    table, evidence, _, _, _ = _call(scene, classes, sigma)
    plane = (table[:, 1] / height).astype(np.int32)
    word, errors = evidence[:, 0].astype(np.int32), evidence[:, 1]
    z = plane.astype(np.float32)
    if len(left[0]) > height:
        bits = codebook.codes[word] & ~errors
        light = np.empty((len(word), 3))
        light_by_plane(table[:, 0], table[:, 1], bits, scene, LIGHT_RADIUS * sigma, light)
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


def gather_peaks(
    stack: np.ndarray | Bandpassed, normalization: Normalization, height: int, sigma: float, left: np.ndarray
) -> list[Fit]:
    """Peaks of every bit; into ``left`` (bit, row, x) int8 what they leave of the light, in steps of `LIGHT_STEP`."""

    def one_bit(bit: int) -> Fit:
        image = np.array(stack[bit], np.float32, copy=isinstance(stack, np.ndarray))
        image -= normalization.background[bit]
        image *= normalization.gain[bit]
        fit = fit_peaks(image, height, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(stack)))


def refit(
    fits: list[Fit], scene: kernels.Scene, table: np.ndarray, owner: np.ndarray, left: np.ndarray, sigma: float
) -> list[Fit]:
    """Peaks of every bit, with those of molecules that lie close together fitted at the molecules' places."""
    ends = np.cumsum([0, *(len(fit.x) for fit in fits)])
    places = table[:, :2]
    plane = (table[:, 1] / scene.height).astype(np.int64)
    tree = cKDTree(np.column_stack([places, plane * 10. * sigma]))
    pairs = tree.query_pairs(CROWDED * sigma, output_type="ndarray")
    crowded = np.unique(pairs)

    def one_bit(bit: int) -> Fit:
        fit, mine = fits[bit], owner[ends[bit] : ends[bit + 1]]
        if fit.profile is None or not len(crowded):
            return fit
        has = np.zeros(len(table), bool)
        has[mine[mine >= 0]] = True
        # of two, one of which shows the bit, or both
        bright = np.unique(pairs[has[pairs].any(axis=1)])
        if not len(bright):
            return fit
        chosen = np.zeros(len(table), bool)
        chosen[bright] = True
        first = plane[bright] * scene.height
        x = np.clip(places[bright, 0] + scene.shift_x[bit], 0, left.shape[2] - 1)
        y = np.clip(places[bright, 1] + scene.shift_y[bit], first, first + scene.height - 1)
        image = left[bit] * np.float32(LIGHT_STEP)
        fit = share_peaks(image, scene.height, fit, chosen[mine] & (mine >= 0), x, y, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(fits)))


def make_scene(fits: list[Fit], left: np.ndarray, height: int, sigma: float) -> kernels.Scene:
    """Peaks with the shifts of their bits taken out, sorted into a grid; left (bit, row, x): see `gather_peaks`."""
    n_bits, n_rows, width = left.shape
    px, py, top = (np.concatenate(parts) for parts in list(zip(*fits, strict=True))[:3])
    bit = np.repeat(np.arange(n_bits), [len(fit.x) for fit in fits])
    plane = (py / height).astype(np.int64)
    shift = bit_shifts(px, py - plane * height, plane, bit, n_bits, sigma).shift
    first = plane * height
    x = np.clip(px - shift[bit, 1], 0, width - 1)
    y = np.clip(py - shift[bit, 0], first, first + height - 1)
    cell = CELL * sigma
    n_across, n_down = int(width / cell) + 1, int(n_rows / cell) + 1
    start, order = np.empty(n_across * n_down + 1, np.int64), np.empty(len(x), np.int64)
    kernels.fill_grid(x, y, cell, n_across, start, order)
    return kernels.Scene(
        x, y, top, bit, start, order, cell, n_across, RADIUS * sigma, left, LIGHT_STEP,
        np.ascontiguousarray(shift[:, 0]), np.ascontiguousarray(shift[:, 1]), height,
    )  # fmt: skip


def _call(
    scene: kernels.Scene, classes: kernels.Classes, sigma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One round of calls: table (x, y, brightness, score, log odds), evidence (word, wrong bits), owner, share and shows."""
    most = len(scene.px)
    table, evidence = np.empty((most, 5)), np.empty((most, 2), np.uint64)
    share, shows = np.zeros(len(classes.weight)), np.zeros((2, len(scene.light), kernels.N_BINS))
    first, owner = np.empty(most), np.empty(most, np.int64)
    kernels.score_seeds(scene, classes, first)
    n = kernels.call_molecules(scene, classes, first, EXPLAINED * sigma, table, evidence, owner, share, shows)
    return table[:n], evidence[:n], owner, share, shows
