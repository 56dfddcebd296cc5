"""Scale of the bits from fields of which some have few molecules, or misleading spots."""

from __future__ import annotations

import numpy as np
import pytest

from merfish.imaging import normalize
from merfish.imaging.normalize import FieldSpots, peak_normalization, shared_normalization

SCALE = np.array([100.0, 200.0, 300.0, 400.0])


def field(seed: int, n: int, heights: np.ndarray = SCALE) -> FieldSpots:
    """Return n spots in each bit that is not dark, half of whose light lies above the heights (bit,)."""
    rng = np.random.default_rng(seed)
    bit = np.repeat(np.flatnonzero(heights), n)
    # the light-weighted median of a lognormal of sigma 0.3 is exp(0.3 ** 2) times its median
    height = heights[bit] * np.exp(rng.normal(-(0.3**2), 0.3, len(bit)))
    none = np.zeros(len(bit))
    return FieldSpots(bit, none.astype(int), none, none, height.astype(np.float32), np.ones(4, np.float32), (9, 9))


def test_shared_normalization__fields_without_cells_or_too_bright_do_not_count():
    cells = [field(seed, 2000) for seed in range(3)]
    empty = [field(seed, 5, 9 * SCALE) for seed in range(4)]
    found = shared_normalization([*cells, *empty, field(9, 2000, 300 * SCALE)], 4)
    assert found.scale == pytest.approx(SCALE, rel=0.1)
    assert (found.background == 1).all()


def test_shared_normalization__a_dead_bit_stays_dead():
    dead = SCALE * [1, 0, 1, 1]
    assert (shared_normalization([field(0, 2000, dead)], 4).scale > 0).tolist() == [True, False, True, True]
    spikes = field(1, 3, SCALE * [0, 0.1, 0, 0])  # noise, in a separate field and beside molecules
    assert shared_normalization([field(0, 2000, dead), spikes], 4).scale[1] == 0
    assert shared_normalization([field(0, 2000, SCALE * [1, 0.1, 1, 1])], 4).scale[1] > 0  # dim, but detectable


def test_shared_normalization__of_nothing():
    for fields in ([], [field(0, 0)]):
        assert (shared_normalization(fields, 4).gain == 0).all()


@pytest.mark.parametrize("rows", [(2, 510), (66, 126)])
def test_peak_normalization__of_a_part_is_that_of_the_whole(rows, monkeypatch):
    rng = np.random.default_rng(0)
    stack = rng.normal(0, 0.01, (2, 512, 256)).astype(np.float32)
    y, x = rng.integers(*rows, 1000), rng.integers(2, 254, 1000)
    stack[:, y, x] += rng.lognormal(0, 0.3, 1000).astype(np.float32)
    whole = peak_normalization(stack)
    monkeypatch.setattr(normalize, "PART", 2 * normalize.BAND * 256)  # bands 0 and 4, where the second stack is dark
    np.testing.assert_allclose(peak_normalization(stack).scale, whole.scale, rtol=0.05 if rows[0] == 2 else 0.0)
