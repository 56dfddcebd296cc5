"""Quality of each bit's images: normal fields give no reasons, single faults do; saturation of the camera."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from merfish.config import RunConfig
from merfish.imaging.field import register_field
from merfish.imaging.frames import read_bits
from merfish.imaging.opening import open_experiment
from merfish.imaging.preprocess import bandpass
from merfish.imaging.quality import camera_ceiling, flag_quality, measure_quality
from merfish.simulate import simulate_experiment


@pytest.fixture(scope="module", params=[5])
def healthy(request, tmp_path_factory):
    """Return an experiment and the quality of its fields."""
    raw = tmp_path_factory.mktemp("quality") / "raw"
    simulate_experiment(raw, fields=(1, 4), shape=(256, 256), seed=request.param)
    opened = open_experiment(raw)
    tables = [register_field(opened, fov, RunConfig()).quality for fov in opened.fovs]
    return opened, pd.concat(tables, ignore_index=True)


def test_flag_quality__healthy_fields_give_no_reasons(healthy):
    _, table = healthy
    assert (flag_quality(table)["reasons"] == "").all()
    for _, field in table.groupby("fov"):
        assert (flag_quality(field)["reasons"] == "").all()


def zero(image, rng):
    return np.zeros_like(image)


def noise(image, rng):
    return rng.poisson(np.median(image), image.shape)


def unfocused(image, rng):
    return gaussian_filter(image.astype(float), (0, 2, 2)) + rng.normal(0, 10, image.shape)


@pytest.mark.parametrize(
    ("fault", "reason"), [(zero, "no image"), (noise, "few spots"), (unfocused, "out of focus|few spots")]
)
def test_flag_quality__one_bit_of_one_field(healthy, fault, reason):
    opened, table = healthy
    bits = read_bits(opened, 2).copy()
    bits[5] = np.clip(fault(bits[5], np.random.default_rng(0)), 0, 65535)
    first = table[table["fov"] == 2]
    filtered = bandpass(bits, smoothing=0.7, background=2.0)
    worse = measure_quality(2, bits, filtered, first["bit"], first["round"], first["color"])
    flagged = flag_quality(pd.concat([table[table["fov"] != 2], worse]))
    flagged = flagged[flagged["reasons"] != ""]
    assert flagged[["fov", "bit"]].to_numpy().tolist() == [[2, "bit6"]]
    assert flagged["reasons"].str.contains(reason).all()


def test_flag_quality__rounds_swapped_in_one_field(healthy):
    _, table = healthy
    table = table.copy()
    # rounds with different bits: the values of one colour in rounds 1 and 6 are made to differ in every field
    values = ["brightness", "spots", "background", "noise", "width"]
    table.loc[table["round"] == 6, ["brightness", "noise"]] *= 1.8
    place = {r: table[(table["fov"] == 1) & (table["round"] == r)].sort_values("color").index for r in (1, 6)}
    before = table.copy()
    table.loc[place[1], values] = before.loc[place[6], values].to_numpy()
    table.loc[place[6], values] = before.loc[place[1], values].to_numpy()
    flagged = flag_quality(table)
    swapped = flagged[flagged["reasons"].str.contains("rounds 1 and 6 appear to be swapped")]
    assert set(swapped.index) == set(place[1]) | set(place[6])


@pytest.mark.parametrize(("ceiling", "step"), [(4095, 1), (16383, 1), (65520, 16), (65535, 1)])
def test_camera_ceiling__of_clipped_images(ceiling, step):
    rng = np.random.default_rng(1)
    light = rng.gamma(0.5, ceiling / 4, (4, 1, 128, 128)) + 100
    bits = (np.minimum(light, ceiling) // step * step).astype(np.uint16)
    assert camera_ceiling(bits) == ceiling
    assert (bits == ceiling).sum() > 50


@pytest.mark.parametrize("level", [3, 100, 3000])
def test_camera_ceiling__of_images_that_are_not(level):
    rng = np.random.default_rng(2)
    assert camera_ceiling(rng.poisson(level, (4, 1, 128, 128)).astype(np.uint16)) == 65535
    assert camera_ceiling(np.full((4, 1, 16, 16), level, np.uint16)) == 65535
    assert camera_ceiling(np.zeros((2, 1, 8, 8), np.float32)) == np.inf


def test_camera_ceiling__of_nothing_but_full_pixels():
    assert camera_ceiling(np.full((4, 1, 16, 16), 4095, np.uint16)) == 4095
