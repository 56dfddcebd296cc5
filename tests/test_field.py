"""Stains of a field: registered together as one by one, and said where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from merfish.errors import InputError
from merfish.imaging.field import register_stains
from merfish.imaging.opening import open_experiment
from merfish.simulate import simulate_experiment


def test_register_stains__together_as_one_by_one_and_says_what_is_not_aligned(tmp_path):
    raw = simulate_experiment(tmp_path / "raw", fields=(1, 1), shape=(256, 256), seed=1)
    opened = open_experiment(raw)
    images, faults = register_stains(opened, 0, ["DAPI", "polyT"])
    assert faults == {}
    for name, image in images.items():
        np.testing.assert_array_equal(image, register_stains(opened, 0, [name])[0][name])
    (path,) = raw.glob("stains_*.tif")
    frames = tifffile.imread(path)
    frames[-1] = np.random.default_rng(0).poisson(100, frames[-1].shape)
    tifffile.imwrite(path, frames, photometric="minisblack")
    images, faults = register_stains(opened, 0, ["DAPI"])
    np.testing.assert_array_equal(images["DAPI"], frames[0])
    assert faults == {"DAPI": "its beads do not match those of round 0 at any drift"}
    with pytest.raises(InputError, match="no stain 'GFP'"):
        register_stains(opened, 0, ["GFP"])
