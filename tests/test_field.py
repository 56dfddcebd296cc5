"""Stains of a field: the same when registered together or one by one, and a message if they cannot be aligned."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from merfish.errors import InputError
from merfish.imaging.field import aligned_stain, stain_shifts
from merfish.imaging.opening import open_experiment
from merfish.simulate import simulate_experiment


def test_stain_shifts__together_as_one_by_one_and_says_what_is_not_aligned(tmp_path):
    raw = simulate_experiment(tmp_path / "raw", fields=(1, 1), shape=(256, 256), seed=1)
    opened = open_experiment(raw)
    shifts, faults = stain_shifts(opened, 0, ["DAPI", "polyT"])
    assert faults == {}
    drift = pd.read_csv(raw / "truth" / "drift.csv").iloc[-1]
    for name, shift in shifts.items():
        np.testing.assert_allclose(shift, drift[["dy", "dx"]].to_numpy(float), atol=0.1)
        np.testing.assert_array_equal(shift, stain_shifts(opened, 0, [name])[0][name])
    (path,) = raw.glob("stains_*.tif")
    frames = tifffile.imread(path)
    frames[-1] = np.random.default_rng(0).poisson(100, frames[-1].shape)
    tifffile.imwrite(path, frames, photometric="minisblack")
    shifts, faults = stain_shifts(opened, 0, ["DAPI"])
    np.testing.assert_array_equal(aligned_stain(opened, 0, "DAPI", shifts["DAPI"]), frames[:1])
    assert faults == {"DAPI": "its beads do not match those of round 0 at any drift"}
    with pytest.raises(InputError, match="no stain 'GFP'"):
        stain_shifts(opened, 0, ["GFP"])
