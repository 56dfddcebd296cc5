"""Candidates: peaks of all bits around a common centre, and the molecules called from them.

Peaks that are linked to each other form clusters. Clusters do not share peaks, so they are called in parallel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish._jit import in_parts, map_bits
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding._plane_kernels import light_by_plane
from merfish.decoding.alignment import shifts_at
from merfish.decoding.peaks import Fit
from merfish.decoding.planes import USUAL_FOCUS, depth, focus_of

# lengths in sigmas of the PSF
RADIUS = 0.9  # peaks of one molecule are closer than this to its centre, including registration error
EXPLAINED = 0.45  # a peak of an off-bit closer than this is a 0->1 error of the molecule
CELL = 1.5  # side of a grid cell, at least RADIUS
PART = 1024  # approximate number of peaks that a thread processes at once; results do not depend on it
LIGHT_STEP = 1 / 32  # of a molecule's height; quantisation of the residual, a quarter of the bins of its brightness


class Peaks(NamedTuple):
    """Peaks of all bits, (peak,): x, y (rows), height float64, and bit int64."""

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    bit: np.ndarray


def joined(fits: list[Fit]) -> Peaks:
    """Concatenate the peaks of all bits, bit by bit."""
    x, y, height = (np.concatenate([getattr(fit, name) for fit in fits]) for name in ("x", "y", "height"))
    return Peaks(x, y, height, np.repeat(np.arange(len(fits)), [len(fit.x) for fit in fits]))


class Called(NamedTuple):
    """Molecules called in one round, the most certain first, and sums over all candidates.

    table (call, 5), evidence (call, 2), owner (peak,) int64, share (class,), shows (2, bit, bin), light (2, step): see
    `_spot_kernels.Calls`. Here ``owner`` is the row of the call in ``table``, and the peaks are in the order of the
    fits.
    """

    table: np.ndarray
    evidence: np.ndarray
    owner: np.ndarray
    share: np.ndarray
    shows: np.ndarray
    light: np.ndarray


def make_scene(fits: list[Fit], left: np.ndarray, height: int, sigma: float, warp: np.ndarray) -> kernels.Scene:
    """Correct peaks for the shifts of their bits, and sort them into a grid.

    left: see `gather_peaks`. warp: see `BitShifts`.
    """
    _, n_rows, width = left.shape
    x, y, top, bit = joined(fits)
    first = (y / height).astype(np.int64) * height
    down, across = shifts_at(warp, bit, y - first, x)
    x = np.clip(x - across, 0, width - 1)
    y = np.clip(y - down, first, first + height - 1)
    cell = CELL * sigma
    n_across, n_down = int(width / cell) + 1, int(n_rows / cell) + 1
    start, order = np.empty(n_across * n_down + 1, np.int64), np.empty(len(x), np.int64)
    kernels.fill_grid(x, y, cell, n_across, start, order)
    x, y, top, bit, first = x[order], y[order], top[order], bit[order], first[order]  # neighbours close in memory
    plane = (first // height).astype(np.int32)
    cluster, seeds, part = np.empty((3, len(x)), np.int64)
    scene = kernels.Scene(
        x, y, top, bit, plane.astype(np.float32), start, order, cell, n_across, RADIUS * sigma, left, LIGHT_STEP,
        warp, height, cluster, seeds, part, *USUAL_FOCUS,
    )  # fmt: skip
    if n_rows > height:
        light = np.empty((len(x), 3))
        bits = np.uint64(1) << bit.astype(np.uint64)
        in_parts(lambda first, last: light_by_plane(first, last, x, y, bits, scene, light), len(x))
        tail, tail_planes, depth_step = focus_of(light)
        scene = scene._replace(pz=depth(light, plane), tail=tail, tail_planes=tail_planes, depth_step=depth_step)
    begins = np.empty(kernels.find_clusters(scene, RADIUS * sigma) + 1, np.int64)
    kernels.group(cluster, begins, seeds)
    firsts = np.searchsorted(begins, np.append(np.arange(0, len(x), PART), len(x)))
    return scene._replace(part=begins[np.unique(firsts)])


def look(scene: kernels.Scene) -> kernels.Views:
    """Observe the bits around each peak of a scene."""
    n, n_bits = len(scene.px), len(scene.light)
    views = kernels.Views(np.empty((n, n_bits), np.int32), np.empty((n, n_bits), np.uint8), np.empty((n, 3)))
    free = np.zeros(n, bool)
    map_bits(lambda part: kernels.observe_part(scene, part, free, views), range(len(scene.part) - 1))
    return views


def call(scene: kernels.Scene, views: kernels.Views, classes: kernels.Classes, sigma: float) -> Called:
    """Run one round of calls; sigma: of the PSF, pixel."""
    n, n_bits, n_parts = len(scene.px), len(scene.light), len(scene.part) - 1
    out = kernels.Calls(
        called=np.zeros(n, bool),
        table=np.empty((n, 5)),
        evidence=np.empty((n, 2), np.uint64),
        owner=np.full(n, -1),
        share=np.zeros((n_parts, len(classes.weight))),
        shows=np.zeros((n_parts, 2, n_bits, kernels.N_BINS)),
        light=np.zeros((n_parts, 2, kernels.N_STEPS)),
    )
    taken = np.zeros(n, bool)
    map_bits(lambda part: kernels.call_part(scene, part, views, classes, EXPLAINED * sigma, taken, out), range(n_parts))
    chosen = np.flatnonzero(out.called)
    chosen = chosen[np.lexsort((scene.order[chosen], -out.table[chosen, 3]))]
    number = np.full(n + 1, -1)  # the last element is for peaks without an owner
    number[chosen] = np.arange(len(chosen))
    owner = np.empty(n, np.int64)
    owner[scene.order] = number[out.owner]
    return Called(
        out.table[chosen],
        out.evidence[chosen],
        owner,
        out.share.sum(axis=0),
        out.shows.sum(axis=0),
        out.light.sum(axis=0),
    )
