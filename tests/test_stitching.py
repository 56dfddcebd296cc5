"""Stage positions from simulated molecules in fields with stage errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from merfish.calls import stitching
from merfish.calls.stitching import FieldPlaces, Links, link_field, overlapping_fields, shared_offset, solve_positions

SIZE = 50.0  # micrometres; side of a field
SEEN = 0.7  # share of the molecules that each field shows
PLACED = 0.02  # micrometres; error of a molecule's position


def draw(side: int, stage_error: float, seed: int, density: float = 0.5):
    """Return the molecules seen in each field of a grid, the reported positions of the fields, and the true ones."""
    rng = np.random.default_rng(seed)
    said = np.array([(c, r) for r in range(side) for c in range(side)]) * 0.9 * SIZE
    true = said + rng.normal(0, stage_error, said.shape)
    span = side * SIZE + 20
    places = rng.uniform(-10, span, (int(density * span**2), 2))
    words = rng.choice(60, len(places), p=np.arange(60, 0, -1) / 1830)
    calls = []
    for fov, corner in enumerate(true):
        local = places - corner
        rows = np.flatnonzero(((local > 0) & (local < SIZE)).all(axis=1) & (rng.random(len(places)) < SEEN))
        x, y = (local[rows] + rng.normal(0, PLACED, (len(rows), 2))).T
        calls.append(pd.DataFrame({"word": words[rows], "x": x, "y": y, "fov": fov}))
    table = pd.concat(calls, ignore_index=True)
    return [table[name].to_numpy() for name in ("word", "x", "y", "fov")], said, true


def link(word, x, y, fov, said) -> list[Links]:
    """Return the links of all fields, each with the later ones near it."""

    def read(number: int) -> FieldPlaces:
        return FieldPlaces(word[fov == number], x[fov == number], y[fov == number])

    near = overlapping_fields(range(len(said)), said, (SIZE, SIZE))
    return [link_field(a, [b for b in near[a] if b > a], read, said, (SIZE, SIZE)) for a in range(len(said))]


def stitch(word, x, y, fov, said) -> stitching.Stitching:
    return stitching.stitch(said, link(word, x, y, fov, said))


def error(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    off = found - true
    return np.hypot(*(off - off.mean(axis=0)).T)


def test_stitch__finds_the_fields_again():
    calls, said, true = draw(4, 2.0, seed=0)
    found = stitch(*calls, said)
    assert np.median(error(said, true)) > 1.0
    assert error(found.positions, true).max() < 0.05
    assert found.links["used"].all()
    assert 1.0 < found.stage_error < 3.0
    assert np.allclose(found.positions.mean(axis=0), said.mean(axis=0))


def test_stitch__leaves_fields_that_share_nothing():
    calls, said, _ = draw(2, 2.0, seed=1)
    far = said * 3
    found = stitch(*calls, far)
    assert not len(found.links)
    assert (found.positions == far).all()
    assert found.untied == 0
    assert found.to_dict()["stage_error"] is None


def test_stitch__tells_fields_that_are_mirrored():
    (word, x, y, fov), said, _ = draw(2, 0.1, seed=4)
    found = stitch(word, SIZE - x, y, fov, said)
    assert found.untied >= 2  # at least those side by side


def test_stitch__of_nothing():
    none = np.empty(0, int)
    said = np.zeros((3, 2))
    assert (stitch(none, none.astype(float), none.astype(float), none, said).positions == said).all()


def test_shared_offset__not_from_genes_that_gather_in_the_same_cells():
    rng = np.random.default_rng(2)
    cells = rng.uniform(0, 50, (12, 2))
    kind = rng.integers(0, 12, (2, 800))
    one, other = (cells[k] + rng.normal(0, 3, (800, 2)) for k in kind)
    assert shared_offset(kind[0], one, kind[1], other) is None
    offset, shared, _ = shared_offset(kind[0], one, kind[0], one + np.array([1.5, -4.0]))
    assert np.allclose(offset, [1.5, -4.0])
    assert shared >= 800


def test_solve_positions__leaves_out_a_link_that_contradicts_the_others():
    calls, said, true = draw(3, 2.0, seed=3)
    links = stitch(*calls, said).links
    links.loc[4, ["dx", "dy"]] += [3.0, -2.0]
    positions, judged = solve_positions(said, links)
    assert judged.index[~judged["used"]].tolist() == [4]
    assert judged.loc[4, "residual"] == pytest.approx(np.hypot(3, 2), abs=0.1)
    assert error(positions, true).max() < 0.05
