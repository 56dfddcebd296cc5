"""Filters that turn a camera image into one where only spots stand out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

# pixel; wider than any diffraction-limited spot (sigma 1.2-1.5 px), narrower than cells' glow
BACKGROUND_SIGMA = 3.0
# pixel; near the spot's own width, so that noise averages out and the spot's peak does not
SMOOTHING_SIGMA = 1.0


def bandpass(
    stack: np.ndarray, *, smoothing: float = SMOOTHING_SIGMA, background: float = BACKGROUND_SIGMA
) -> np.ndarray:
    """Difference of Gaussians of each image of a stack (..., y, x), any real dtype.

    Returns float32 of the same shape: the image smoothed with ``smoothing`` minus the image smoothed with
    ``background`` (both sigma in pixel), about 0 where there is no spot. Images are mirrored at their edges.
    """
    out = np.empty(stack.shape, np.float32)
    planes = stack.reshape(-1, *stack.shape[-2:])
    filtered = out.reshape(planes.shape)

    def filter_plane(index: int) -> None:
        image = planes[index].astype(np.float32)
        ndimage.gaussian_filter(image, smoothing, output=filtered[index])
        filtered[index] -= ndimage.gaussian_filter(image, background)

    with ThreadPoolExecutor() as pool:  # SciPy's filters release the interpreter lock
        list(pool.map(filter_plane, range(len(planes))))
    return out
