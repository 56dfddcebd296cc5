"""Spot decoder: localise spots in each bit, link them across bits, and score the words of each candidate.

A molecule is one object seen in several bits. Around a peak, the nearest free peak of each bit is collected. The
observation of a bit (a peak, its distance from the centre and its brightness relative to the others; or no peak, and
the brightness there) is scored by its likelihood ratio between bits that are on in the word and bits that are off. The
two distributions include all sources of error (1->0 and 0->1 errors, chance neighbours, peaks hidden by a neighbour).
They are learnt from the data, with the abundances of words, by expectation-maximisation: the histograms are estimated
again from the candidates, weighted by their posterior. Within a round the most certain molecule is called first and
takes its peaks; the others are scored again without them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish._jit import in_parts, map_bits
from merfish.codebook import Codebook
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.alignment import BitShifts, bit_shifts
from merfish.decoding.candidates import LIGHT_STEP, Called, call, joined, look, make_scene
from merfish.decoding.crowds import crowded_share, refit
from merfish.decoding.evidence import learn_classes, start_classes
from merfish.decoding.peaks import Fit, fit_peaks
from merfish.decoding.planes import depth
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed

ROUNDS = 3  # of expectation-maximisation
# refits of the peaks of crowded molecules; at 0.01 molecules per pixel, a third adds 0.002 to the recall
REFITS = 2
# in crowded images; the additional two add 0.006 to the recall at 0.03 molecules per pixel, and 0.02 at 0.1
CROWDED_REFITS = 4
# `crowded_share` above which an image is crowded. It is 0.51 at 0.03 molecules per pixel and 0.73 at 0.1. At 0.02 in
# autofluorescent cells (0.39), and in real images where most calls are background (0.05), more refits find fewer
# molecules.
CROWDED_SHARE = 0.45
BAND = 64.0  # height of a band of rows from which distributions are learnt, sigmas of the PSF
LEARN_PEAKS = 20_000  # peaks of all bits; about a thousand molecules, hundreds in each bit


class Spots(NamedTuple):
    """Molecules called; arrays (molecule,).

    word: int32, row of the codebook. x, y: float64 pixel, y within the plane. plane: int32, in which it is brightest.
    z: float32 in planes, interpolated from the brightness in the adjacent planes. intensity: float32, mean height of
    the peaks. log_odds: float64, of the word against all other classes. errors: uint64, the bits that differ from the
    word. tail_planes: see `merfish.decoding.planes.Focus`.
    """

    word: np.ndarray
    x: np.ndarray
    y: np.ndarray
    plane: np.ndarray
    z: np.ndarray
    intensity: np.ndarray
    log_odds: np.ndarray
    errors: np.ndarray
    tail_planes: int


def decode_spots(
    stack: np.ndarray | Bandpassed, codebook: Codebook, normalization: Normalization, *, height: int, sigma: float
) -> Spots:
    """Call molecules from whole spots.

    After the first calls, the peaks of molecules that are close together are fitted again, and all molecules are called
    again.

    stack: (bit, plane * height, x) real, band-passed; normalised here by ``normalization``. sigma: of the PSF, pixel.
    Deterministic: the same input gives the same calls.
    """
    left = np.empty(stack.shape, np.int8)
    fits = gather_peaks(stack, normalization, height, sigma, left)
    shifts = measure_shifts(fits, height, sigma)
    live = normalization.gain > 0  # a dead bit is no evidence for or against any word
    classes = start_classes(codebook, live)
    some = make_scene(_some(fits, sigma), left, height, sigma, shifts.warp)
    views = look(some)
    for _ in range(ROUNDS):
        called = call(some, views, classes, sigma)
        classes = learn_classes(codebook, live, called.share, called.shows, called.light)
    scene = make_scene(fits, left, height, sigma, shifts.warp)
    if len(scene.px) > len(some.px):
        called = call(scene, look(scene), classes, sigma)
    for _ in range(CROWDED_REFITS if crowded_share(called, height, sigma) > CROWDED_SHARE else REFITS):
        classes = learn_classes(codebook, live, called.share, called.shows, called.light)
        fits = refit(fits, called, shifts.warp, left, height, sigma)
        scene = make_scene(fits, left, height, sigma, shifts.warp)
        called = call(scene, look(scene), classes, sigma)
    return _molecules(called, scene, codebook)


def _molecules(called: Called, scene: kernels.Scene, codebook: Codebook) -> Spots:
    height = scene.height
    table, (word, errors) = called.table, called.evidence.T
    word = word.astype(np.int32)
    plane = (table[:, 1] / height).astype(np.int32)
    z = plane.astype(np.float32)
    if scene.light.shape[1] > height:
        bits = codebook.codes[word] & ~errors
        light = np.empty((len(word), 3))
        in_parts(lambda a, b: light_by_plane(a, b, table[:, 0], table[:, 1], bits, scene, light), len(word))
        z = depth(light, plane)
    return Spots(
        word, table[:, 0], table[:, 1] - plane * height, plane, z, table[:, 2].astype(np.float32), table[:, 4], errors,
        scene.tail_planes,
    )  # fmt: skip


def gather_peaks(
    stack: np.ndarray | Bandpassed, normalization: Normalization, height: int, sigma: float, left: np.ndarray
) -> list[Fit]:
    """Fit the peaks of every bit; write the residual to ``left`` (bit, row, x) int8, in units of `LIGHT_STEP`."""

    def one_bit(bit: int) -> Fit:
        image = np.array(stack[bit], np.float32, copy=isinstance(stack, np.ndarray))
        image -= normalization.background[bit]
        image *= normalization.gain[bit]
        fit = fit_peaks(image, height, sigma)
        kernels.in_steps(image, LIGHT_STEP, left[bit])
        return fit

    return map_bits(one_bit, range(len(stack)))


def _some(fits: list[Fit], sigma: float) -> list[Fit]:
    """About `LEARN_PEAKS` peaks in evenly spaced bands of rows; enough to learn the distributions of a large field."""
    every = sum(len(fit.x) for fit in fits) // LEARN_PEAKS
    if every < 2:
        return fits
    parts = []
    for fit in fits:
        chosen = (fit.y / (BAND * sigma)).astype(np.int64) % every == 0
        parts.append(fit._replace(x=fit.x[chosen], y=fit.y[chosen], height=fit.height[chosen]))
    return parts


def measure_shifts(fits: list[Fit], height: int, sigma: float) -> BitShifts:
    """Estimate the shifts of the bits of a field from their peaks."""
    x, y, _, bit = joined(fits)
    plane = (y / height).astype(np.int64)
    return bit_shifts(x, y - plane * height, plane, bit, len(fits), sigma)
