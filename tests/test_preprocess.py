from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from merfish.imaging.preprocess import Bandpassed, bandpass


@pytest.mark.parametrize("sigmas", [(0.7, 1.6), (1.0, 3.0)])
@pytest.mark.parametrize("shape", [(3, 70, 45), (2, 3, 33, 5)])
def test_bandpass_is_the_difference_of_two_gaussians(sigmas, shape):
    stack = np.random.default_rng(0).integers(0, 60_000, shape).astype(np.uint16)
    got = bandpass(stack, smoothing=sigmas[0], background=sigmas[1])
    assert got.dtype == np.float32
    for index in np.ndindex(*shape[:-2]):
        near, far = (
            ndimage.gaussian_filter(stack[index].astype(float), s, mode="mirror", truncate=np.ceil(4 * s) / s)
            for s in sigmas
        )
        assert got[index] == pytest.approx(near - far, abs=0.05)


def test_bandpassed_gives_what_bandpass_gives():
    stack = np.random.default_rng(1).integers(0, 9_000, (4, 3, 40, 31)).astype(np.uint16)
    whole = bandpass(stack, smoothing=0.7, background=1.6).reshape(4, 120, 31)
    seen = Bandpassed(stack, smoothing=0.7, background=1.6)
    assert seen.shape == whole.shape
    assert len(seen) == 4
    for bit in range(4):
        assert (seen[bit] == whole[bit]).all()
    for first, last in ((0, 120), (0, 7), (35, 90), (79, 81), (100, 200)):
        assert (seen[:, first:last] == whole[:, first:last]).all()


@pytest.mark.parametrize("shape", [(2, 70, 45), (2, 3, 5)])
def test_bandpass_in_place(shape):
    stack = np.random.default_rng(2).normal(100, 20, shape).astype(np.float32)
    expected = bandpass(stack, smoothing=1.0, background=3.0)
    assert bandpass(stack, smoothing=1.0, background=3.0, out=stack) is stack
    np.testing.assert_array_equal(stack, expected)
