"""Light of one bit that leaks into another: bleed-through between colours, carry-over from an earlier round.

At the bright peaks of a bit, another bit contains the light of molecules that have both bits, or noise, or the leaked
share of the peak's light. Relative to the peak, the last two are the narrowest group of values, whose centre is the
share. Words, rounds and colours need not be known. The light of each leak that is found is subtracted before the others
are estimated: light that leaks into a bit from two others would otherwise be attributed to bits that are often on
together with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from merfish._jit import map_bits
from merfish.imaging._leak_kernels import FEWEST, locate_groups
from merfish.imaging.normalize import NOISE_TO_SIGMA, FieldSpots, typical_height
from merfish.imaging.preprocess import Bandpassed, in_rows
from merfish.imaging.unmixing import Leak

BRIGHT = 0.6  # height of the peaks that are used, relative to a molecule's; leaked light is dimmer
MOST_PEAKS = 300  # of a bit in a field; a share is then known to about 0.002
ROUNDS = 12  # in each, the clearest new leak into each bit is found; three or four are enough for two into each bit
# Height of leaked light in a bit relative to a molecule's there. Less is below the peaks that decoders look at.
LEAST = 0.03
# In simulated fields without leaks (25 kinds of images and books, seeds 3200-3202, filters of `spots` and `pixels`),
# the only shares above LEAST of more than 7.3 errors were of 0.04 to 0.06: in books of two and five genes, and one with
# bits shifted by 0.8 px.
SIGMAS = 8.0
LEAST_GROUP = 0.1  # share of a bit's peaks that show no more than the leak in the other bit
LIKELY = 3.0  # sigmas with which a leak is subtracted until all others are known


class PeakLight(NamedTuple):
    """Light of bright peaks of a field in all bits: bit (peak,) int64; light (peak, bit) float32, filtered counts.

    The background is subtracted.
    """

    bit: np.ndarray
    light: np.ndarray


def peak_light(filtered: np.ndarray | Bandpassed, spots: FieldSpots) -> PeakLight:
    """Measure the light of the bright peaks among the spots of a stack (bit, ..., y, x), see `find_spots`."""
    chosen = []
    for bit in range(len(filtered)):
        own = np.flatnonzero(spots.bit == bit)
        if len(own):
            own = own[spots.height[own] > BRIGHT * typical_height(spots.height[own])]
            chosen.append(own[:: -(-len(own) // MOST_PEAKS)])
    peak = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    rows = spots.plane[peak] * spots.shape[0] + spots.y[peak]
    stack, _ = in_rows(filtered)
    places = [rows, spots.x[peak]]
    light = np.stack(map_bits(lambda image: map_coordinates(image, places, order=1, mode="nearest"), stack), axis=1)
    return PeakLight(spots.bit[peak], light - spots.background)


def find_leaks(fields: Sequence[PeakLight], scale: np.ndarray) -> tuple[Leak, ...]:
    """Leaks between the bits, from the peaks of several fields; none where a share may be chance.

    scale: (bit,), height of a molecule in each bit, counts; 0 for a dead bit.
    """
    if not len(fields):
        return ()
    bit, seen = (np.concatenate([getattr(field, name) for field in fields]) for name in ("bit", "light"))
    order = np.argsort(bit, kind="stable")
    order = order[scale[bit[order]] > 0]
    start = np.searchsorted(bit[order], np.arange(len(scale) + 1))
    seen = seen[order] / np.where(scale > 0, scale, np.inf)
    share = np.zeros((len(scale), len(scale)))
    for _ in range(ROUNDS):
        more, error = _shares(seen @ np.linalg.inv(np.eye(len(scale)) + share), start)
        share += np.where(share > 0, more, 0)
        fresh = (share == 0) & (more > LEAST) & (more > LIKELY * error)
        fresh &= more / error == (more / error).max(axis=0)
        share[fresh] = more[fresh]
        if not fresh.any():
            break
    found = np.argwhere((share > LEAST) & (share > SIGMAS * error))
    return tuple(Leak(int(a), int(b), float(share[a, b] * scale[b] / scale[a])) for a, b in found)


def _shares(seen: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the light of peaks in other bits, and their errors, (source, target); 0 and infinite if unknown.

    A share is relative to the median over sources, because the rings of neighbours and the background are seen at the
    peaks of all bits. The error includes the scatter of shares below it, which are not leaks.
    """
    n = seen.shape[1]
    centre, error = np.full((2, n, n), np.nan)

    def of_source(source: int) -> None:
        own = seen[start[source] : start[source + 1]]
        if len(own) >= FEWEST:
            relative = np.sort(np.ascontiguousarray((own / own[:, source, None]).T))
            locate_groups(relative, max(float(FEWEST), LEAST_GROUP * len(own)), centre[source], error[source])

    map_bits(of_source, range(n))
    np.fill_diagonal(centre, np.nan)
    known = np.isfinite(centre)
    share = np.zeros((n, n))
    for target in np.flatnonzero(known.any(axis=0)):
        own = known[:, target]
        share[own, target] = centre[own, target] - np.median(centre[own, target])
    below = share[known & (share < 0)]
    scatter = NOISE_TO_SIGMA * np.median(-below) if len(below) else np.inf
    return share, np.where(known, np.hypot(error, scatter), np.inf)
