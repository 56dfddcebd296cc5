"""Band-pass filter that preserves spots and removes the background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merfish._jit import map_bits
from merfish.imaging._kernels import bandpass_rows
from merfish.imaging.unmixing import Leak, subtract_leaks, unmixing, weighted_sum


def bandpass(stack: np.ndarray, *, smoothing: float, background: float, out: np.ndarray | None = None) -> np.ndarray:
    """Difference of Gaussians of each image of a stack (..., y, x), any real dtype.

    Returns float32 of the same shape: the image smoothed with ``smoothing`` minus the image smoothed with
    ``background`` (both sigma in pixels), approximately 0 where there is no spot. Images are mirrored at their edges.
    The result is written to ``out`` if given, C-contiguous float32, which may be the stack itself.
    """
    out = np.empty(stack.shape, np.float32) if out is None else out
    images, filtered = (array.reshape(-1, *stack.shape[-2:]) for array in (stack, out))
    taps = filled_taps(gaussian_taps(smoothing)), filled_taps(gaussian_taps(background))
    _filter_rows(images, 0, images.shape[1], taps, filtered)
    return out


def _filter_rows(
    images: np.ndarray, first: int, last: int, taps: tuple[np.ndarray, np.ndarray], out: np.ndarray
) -> None:
    """Band-pass rows ``first`` to ``last`` - 1 of each image (bit, y, x) into ``out`` (bit, row, x)."""
    map_bits(lambda bit: bandpass_rows(images[bit], first, last, *taps, out[bit]), range(len(images)))


class Bandpassed:
    """A stack (bit, [z,] y, x) as `bandpass` would return it, with planes stacked along y: (bit, plane * y, x).

    It is filtered when it is indexed, ``stack[bit]`` or ``stack[:, first:last]``, so that no filtered copy is kept.
    leaks: between bits, which are subtracted. sigma: of the PSF, pixel; None until `merfish.decoding.psf.psf_sigma` has
    measured it.
    """

    def __init__(self, stack: np.ndarray, *, smoothing: float, background: float, leaks: Sequence[Leak] = ()) -> None:
        self.height, self.smoothing, self.background, self.leaks = stack.shape[-2], smoothing, background, leaks
        self.images = stack.reshape(len(stack), -1, *stack.shape[-2:])
        self.shape = (len(stack), self.images.shape[1] * self.height, stack.shape[-1])
        self.sigma: float | None = None
        self.taps = filled_taps(gaussian_taps(smoothing)), filled_taps(gaussian_taps(background))
        self.weights = unmixing(leaks, len(stack)) if leaks else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | tuple[slice, slice]) -> np.ndarray:
        if not isinstance(key, tuple):
            image = np.empty(self.shape[1:], np.float32)
            for plane, out in enumerate(image.reshape(self.images.shape[1:])):
                bandpass_rows(self._raw(key, plane), 0, self.height, *self.taps, out)
            return image
        first, last, _ = key[1].indices(self.shape[1])
        strip = np.empty((len(self), last - first, self.shape[2]), np.float32)
        for plane in range(first // self.height, -(-last // self.height)):
            top = plane * self.height
            a, b = max(first, top), min(last, top + self.height)
            _filter_rows(self.images[:, plane], a - top, b - top, self.taps, strip[:, a - first : b - first])
        if self.leaks:
            subtract_leaks(strip, self.leaks)
        return strip

    def _raw(self, bit: int, plane: int) -> np.ndarray:
        """The image (y, x) of a plane of a bit; without the light of other bits, which the filter leaves linear."""
        if self.weights is None:
            return self.images[bit, plane]
        return weighted_sum(self.images[:, plane], self.weights[bit])


def in_rows(filtered: np.ndarray | Bandpassed) -> tuple[np.ndarray | Bandpassed, int]:
    """Reshape a filtered stack (bit, [z,] y, x) to (bit, plane * y, x) for decoding; also return the plane height."""
    if isinstance(filtered, Bandpassed):
        return filtered, filtered.height
    return filtered.reshape(len(filtered), -1, filtered.shape[-1]), filtered.shape[-2]


def gaussian_taps(sigma: float) -> np.ndarray:
    """Weights of a Gaussian of ``sigma`` px, truncated at 4 sigma, (tap,) float32, sum 1."""
    radius = int(np.ceil(4 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (taps / taps.sum()).astype(np.float32)


def filled_taps(taps: np.ndarray) -> np.ndarray:
    """Pad taps (tap,) with zeros at their end to a multiple of 4, as required by the kernels."""
    return np.pad(taps, (0, -len(taps) % 4))
