"""Filters that turn a camera image into one where only spots stand out."""

from __future__ import annotations

import numpy as np

from merfish.imaging._kernels import filter_planes


def bandpass(stack: np.ndarray, *, smoothing: float, background: float) -> np.ndarray:
    """Difference of Gaussians of each image of a stack (..., y, x), any real dtype.

    Returns float32 of the same shape: the image smoothed with ``smoothing`` minus the image smoothed with
    ``background`` (both sigma in pixel), about 0 where there is no spot. Images are mirrored at their edges.
    """
    out = np.empty(stack.shape, np.float32)
    planes = stack.reshape(-1, *stack.shape[-2:])
    for image, filtered in zip(planes, out.reshape(planes.shape), strict=True):
        np.subtract(gaussian(image, smoothing), gaussian(image, background), out=filtered)
    return out


def gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """An image (y, x) smoothed with a Gaussian of ``sigma`` px, cut at 4 sigma, float32; mirrored at its edges."""
    radius = int(np.ceil(4 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)[None]
    out = np.empty((1, *image.shape), np.float32)
    filter_planes(image[None], np.full((1, 2), -radius), taps, taps, out)
    return out[0]
