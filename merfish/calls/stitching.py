"""Corrected positions of fields, from the molecules that neighbouring fields share.

The position of a stage differs from the reported one by a few micrometres. Molecules in the overlap of two fields give
the offset between them; the positions that agree best with all offsets and with the stage are computed by least
squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.linalg import spsolve
from scipy.spatial import KDTree
from scipy.special import gammaln

MOST_ERROR = 10.0  # micrometre along each axis, between two fields; stage errors are a few micrometres
BIN = 0.25  # micrometre, of the histogram of offsets
FEWEST_SHARED = 5  # molecules shared by two linked fields
LOG_CHANCE = np.log(1e-4)  # largest probability that two fields are linked by chance
NEAR = 0.4  # micrometre; largest residual of a pair of molecules that agrees with an offset
FLOOR = 0.02  # micrometre; distortion of images limits the agreement of offsets
FEWEST_STAGE_ERROR = 0.1  # micrometre; lower limit of a stage's error
MANY = 30  # molecules of each field in the overlap given by the stage; with so many, some should be the same
CONTRADICTION = 0.5  # micrometre; a link with a larger residual is wrong


@dataclass(frozen=True, eq=False)
class Stitching:
    """Positions of all fields, (fov, 2) x, y in micrometres: as reported by the stage, and corrected; and the links.

    links: one row for each pair of linked fields: a, b (rows of positions), dx, dy (micrometre, displacement of b
    relative to a that is not reported by the stage), shared (molecules), error (micrometre, standard error), used
    (False: it contradicts the others), residual (micrometre, after the correction). untied: number of overlaps in which
    both fields have many molecules, but share too few.
    """

    said: np.ndarray
    positions: np.ndarray
    links: pd.DataFrame
    untied: int

    @property
    def stage_error(self) -> float:
        """Root mean square error of a field's position along one axis, micrometre, from the links; NaN without any."""
        steps = self.links.loc[self.links["used"], ["dx", "dy"]].to_numpy(float)
        return float(np.sqrt((steps**2).mean() / 2)) if len(steps) else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Convert to values for JSON; the stage error is None if it is unknown."""
        error = self.stage_error if self.links["used"].any() else None
        places = {"said": self.said.tolist(), "positions": self.positions.tolist()}
        return {**places, "stage_error": error, "links": self.links.to_dict("list"), "untied": self.untied}


@dataclass(frozen=True, eq=False)
class FieldPlaces:
    """Kept calls of a field: word int (molecule,); x, y float64 (molecule,), micrometre from the field's position."""

    word: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Links:
    """Links of a field with later ones.

    rows: a, b, dx, dy, shared, error of each linked pair, as in `Stitching.links`. untied: as in `Stitching`.
    """

    rows: list[tuple[int, int, float, float, int, float]]
    untied: int


def overlapping_fields(
    fovs: Sequence[int], positions: np.ndarray, size: tuple[float, float], beyond: float = MOST_ERROR
) -> dict[int, list[int]]:
    """For each field, the other fields that may overlap with it, sorted.

    positions: (fov, 2) x, y, indexed by field; size: (x, y) of a field; beyond: largest gap between two such fields;
    all in micrometres.
    """
    known = np.array(sorted(fovs), int)
    near: dict[int, list[int]] = {int(fov): [] for fov in known}
    pairs = KDTree(positions[known] / (np.array(size) + beyond)).query_pairs(1.0, p=np.inf) if len(known) else set()
    for a, b in pairs:
        near[int(known[a])].append(int(known[b]))
        near[int(known[b])].append(int(known[a]))
    return {fov: sorted(others) for fov, others in near.items()}


def link_field(
    fov: int,
    others: Sequence[int],
    read: Callable[[int], FieldPlaces],
    positions: np.ndarray,
    size: tuple[float, float],
) -> Links:
    """Measure the offset of a field to each of the overlapping fields ``others``.

    read: returns the calls of a field. positions: (fov, 2) x, y of the stage, micrometre; size: (x, y) of a field.
    """
    here = read(fov)
    rows, untied = [], 0
    for other in others:
        there = read(other)
        one, its_place, inner = _seen_by(here, positions[fov], positions[other], size)
        two, their_place, their_inner = _seen_by(there, positions[other], positions[fov], size)
        offset = shared_offset(one, its_place, two, their_place)
        if offset is not None:
            (dx, dy), shared, error = offset
            rows.append((fov, other, -float(dx), -float(dy), shared, error))
        elif min(inner, their_inner) >= MANY:
            untied += 1
    return Links(rows, untied)


def _seen_by(
    places: FieldPlaces, own: np.ndarray, other: np.ndarray, size: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Words and positions (molecule, 2) of molecules that may be in another field, and how many are by the stage."""
    place = np.column_stack([places.x, places.y]) + own
    off = np.abs(place - other - np.array(size) / 2) - np.array(size) / 2
    near = (off <= MOST_ERROR).all(axis=1)
    return places.word[near], place[near], int((off <= 0).all(axis=1).sum())


def stitch(positions: np.ndarray, links: Sequence[Links]) -> Stitching:
    """Correct the positions (fov, 2) of the stage, x, y in micrometres, by the links of all fields, in their order.

    Only differences between fields can be measured: the mean of each group of linked fields is kept.
    """
    rows = [row for part in links for row in part.rows]
    table = pd.DataFrame(rows, columns=["a", "b", "dx", "dy", "shared", "error"])
    return Stitching(positions, *solve_positions(positions, table), sum(part.untied for part in links))


def shared_offset(
    word_a: np.ndarray, place_a: np.ndarray, word_b: np.ndarray, place_b: np.ndarray
) -> tuple[np.ndarray, int, float] | None:
    """Offset (x, y) of the molecules in b relative to a, number of shared molecules, and standard error.

    word: (molecule,); place: (molecule, 2) x, y in micrometres. Of all offsets up to 10 micrometres along each axis,
    the one on which most molecules with the same word agree is refined as their robust mean. None if chance explains
    it.
    """
    if min(len(word_a), len(word_b)) < FEWEST_SHARED:
        return None
    # a third axis on which different words are farther apart than any offset
    a, b = (KDTree(np.column_stack([p, w * 4 * MOST_ERROR])) for w, p in ((word_a, place_a), (word_b, place_b)))
    near = a.sparse_distance_matrix(b, MOST_ERROR, p=np.inf, output_type="ndarray")
    near = near[np.lexsort((near["j"], near["i"]))]
    steps = place_b[near["j"]] - place_a[near["i"]]
    centre = _vote(steps)
    if centre is None:
        return None
    width = NEAR
    for _ in range(10):
        off = np.hypot(*(steps - centre).T)
        agree = steps[off <= width]
        if len(agree) < FEWEST_SHARED:
            return None
        centre = agree.mean(axis=0)
        # the distance of two Gaussian coordinates has the median 1.18 sigma
        width = min(NEAR, 3 * max(float(np.median(np.hypot(*(agree - centre).T))) / 1.18, FLOOR))
    return centre, len(agree), float(np.sqrt(agree.var(axis=0).mean() / len(agree)))


def _vote(steps: np.ndarray) -> np.ndarray | None:
    """Median of the steps (pair, 2) in the most populated bin; None if chance explains their number."""
    n = int(2 * MOST_ERROR / BIN)
    limits = (-MOST_ERROR, MOST_ERROR)
    votes, _, _ = np.histogram2d(steps[:, 0], steps[:, 1], bins=n, range=(limits, limits))
    here = ndimage.uniform_filter(votes, 3, mode="constant") * 9
    best = np.unravel_index(np.argmax(here), here.shape)
    # genes cluster in cells, so chance pairs cluster at small steps: compare with the neighbouring bins
    wide = ndimage.uniform_filter(votes, 21, mode="reflect")[best] * 21**2
    mean = max(9 * (wide - here[best]) / (21**2 - 9), 0.1)
    count = here[best]
    log_tail = count * np.log(mean) - mean - gammaln(count + 1) if count > mean else 0.0
    if count < FEWEST_SHARED or log_tail + np.log(n * n) > LOG_CHANCE:
        return None
    middle = (np.array(best) + 0.5) * BIN - MOST_ERROR
    return np.median(steps[(np.abs(steps - middle) <= 1.5 * BIN).all(axis=1)], axis=0)


def solve_positions(positions: np.ndarray, links: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Positions (fov, 2) that agree best with links and stage, and the links with columns used and residual.

    Links are weighted by their errors, the stage by its error as estimated from the links. Links that contradict the
    others are excluded, the worst first.
    """
    a, b = links["a"].to_numpy(int), links["b"].to_numpy(int)
    steps = links[["dx", "dy"]].to_numpy(float)
    weight = 1 / (links["error"].to_numpy(float) ** 2 + FLOOR**2)
    used = np.ones(len(links), bool)
    change, residual = np.zeros(positions.shape), np.zeros(len(links))
    while used.any():
        stage = 1 / max(float((steps[used] ** 2).mean()) / 2, FEWEST_STAGE_ERROR**2)
        change = _least_squares(a[used], b[used], steps[used], weight[used], stage, len(positions))
        residual = np.hypot(*(steps - change[b] + change[a]).T)
        worst = int(np.argmax(np.where(used, residual, -1)))
        if residual[worst] <= CONTRADICTION:
            break
        used[worst] = False
    return positions + change, links.assign(used=used, residual=residual)


def _least_squares(
    a: np.ndarray, b: np.ndarray, steps: np.ndarray, weight: np.ndarray, stage: float, n: int
) -> np.ndarray:
    """Changes (fov, 2) that minimise sum weight |change_b - change_a - step|^2 + stage sum |change|^2."""
    rows = np.concatenate([a, b, a, b, np.arange(n)])
    columns = np.concatenate([a, b, b, a, np.arange(n)])
    values = np.concatenate([weight, weight, -weight, -weight, np.full(n, stage)])
    normal = coo_array((values, (rows, columns)), shape=(n, n)).tocsc()
    target = np.zeros((n, 2))
    np.add.at(target, b, weight[:, None] * steps)
    np.add.at(target, a, -weight[:, None] * steps)
    return np.column_stack([spsolve(normal, side) for side in target.T])
