"""Background and scale of each bit, so that one molecule's spot is 1 high in every bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from merfish._jit import map_bits
from merfish.imaging._kernels import find_peaks, tile_noise
from merfish.imaging.preprocess import Bandpassed, in_rows

NOISE_TO_SIGMA = 1.4826  # a Gaussian's sigma over its median absolute deviation
SAMPLE = 2**17  # pixels of an image; enough to estimate its noise to 0.3 %
TILE = 32.0  # pixel; many spots wide, and smaller than cells, whose autofluorescence adds noise
PART = 2**18  # pixels of a bit, of which a large stack's background and scale are measured
BAND = 64  # rows; two tiles of noise
CLEAR_SPOTS = 100  # of each bit in the part; its scale is then known to 3 %
FEW_SPOTS = 0.1  # relative to the field with most spots; fields with fewer are ignored for a bit
# relative to the median number and height of spots over bits; a bit below both is dead
DEAD_SPOTS, DEAD_HEIGHT = 0.01, 1 / 3
PEAK_SIGMAS = 6.0  # a local maximum this far above the noise is a spot


@dataclass(frozen=True, eq=False)
class Normalization:
    """value = (intensity - background) / scale; background, scale (bit,) float32 in camera counts."""

    background: np.ndarray
    scale: np.ndarray

    @classmethod
    def identity(cls, n_bits: int) -> Normalization:
        """The identity, for a stack that is normalised already."""
        return cls(np.zeros(n_bits, np.float32), np.ones(n_bits, np.float32))

    def to_dict(self) -> dict[str, list[float]]:
        """Convert to values that JSON keeps exactly."""
        return {"background": self.background.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> Normalization:
        """Restore from `to_dict`."""
        return cls(np.array(values["background"], np.float32), np.array(values["scale"], np.float32))

    @property
    def gain(self) -> np.ndarray:
        """(bit,) float32, 1 / scale; 0 for a dead bit, which then contributes to no word."""
        with np.errstate(divide="ignore"):
            return np.where(self.scale > 0, 1 / self.scale, 0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class FieldSpots:
    """Clear spots of a field's bits: the summary from which the calibration is made.

    bit, plane: int64 (spot,); y, x: float64 pixel; height: float32 over the background, camera counts.
    background: (bit,) float32. shape: (y, x) of the field.
    """

    bit: np.ndarray
    plane: np.ndarray
    y: np.ndarray
    x: np.ndarray
    height: np.ndarray
    background: np.ndarray
    shape: tuple[int, int]


def find_spots(filtered: np.ndarray | Bandpassed) -> FieldSpots:
    """Local maxima of each bit, 6 sigma of its noise above its median; filtered (bit, ..., y, x), band-passed."""
    _, height = in_rows(filtered)
    background, x, y, top = zip(*map_bits(lambda image: _clear_spots(image, height), filtered), strict=True)
    rows = np.concatenate(y)
    # a fitted top is at most a pixel from its maximum, which is never in a plane's first or last row
    plane = (rows // height).astype(np.int64)
    return FieldSpots(
        bit=np.repeat(np.arange(len(x)), [len(places) for places in x]),
        plane=plane,
        y=rows - plane * height,
        x=np.concatenate(x),
        height=np.concatenate(top).astype(np.float32),
        background=np.array(background, np.float32),
        shape=(height, filtered.shape[-1]),
    )


def _clear_spots(image: np.ndarray, height: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    rows = image.reshape(-1, image.shape[-1])
    background = float(np.median(sample_of(rows)))
    noise = NoiseMap.of(rows, height)
    x, y, value = locate_peaks(rows, height, background + PEAK_SIGMAS * noise.least)
    clear = value > np.maximum(noise.level(x, y), background) + PEAK_SIGMAS * noise.sigma(x, y)
    return background, x[clear], y[clear], value[clear] - background


def peak_normalization(filtered: np.ndarray | Bandpassed) -> Normalization:
    """Normalise one stack: background is the median of each bit, scale the light-weighted median of clear local maxima.

    Half of the total height of maxima is in those above the scale. The many dim rings of out-of-focus molecules have
    little influence on it, while they would lower a plain median.

    filtered (bit, ..., y, x), band-passed; of a large one, evenly spaced bands of rows are enough if they show spots in
    every bit. A bit without clear maxima is dead: its scale is 0.
    """
    _, spots = some_spots(filtered)
    return shared_normalization([spots], len(filtered))


def some_spots(filtered: np.ndarray | Bandpassed) -> tuple[np.ndarray | Bandpassed, FieldSpots]:
    """Some bands of rows of a stack, or all of it, that show enough spots in every bit, and these spots."""
    part = _bands(filtered)
    spots = find_spots(part)
    if part is not filtered and np.bincount(spots.bit, minlength=len(filtered)).min() < CLEAR_SPOTS:
        part, spots = filtered, find_spots(filtered)
    return part, spots


def _bands(filtered: np.ndarray | Bandpassed) -> np.ndarray | Bandpassed:
    """Some bands of rows of a stack, about `PART` pixels of each bit, as (bit, band, y, x); a small stack as it is."""
    width = filtered.shape[-1]
    rows, height = in_rows(filtered)
    first = np.arange(0, rows.shape[1], BAND)
    first = first[first % height + BAND <= height]  # whole, in one plane
    every = len(first) * BAND * width // PART
    if every < 2:
        return filtered
    return np.stack([rows[:, top : top + BAND] for top in first[::every]], axis=1)


def shared_normalization(fields: Sequence[FieldSpots], n_bits: int) -> Normalization:
    """Median over fields of background and scale as in `peak_normalization`, bit by bit.

    Fields with few spots of a bit, such as those without cells, are ignored for it.
    """
    background, scale = np.zeros(n_bits, np.float32), np.zeros(n_bits, np.float32)
    for bit in range(n_bits):
        tops = [field.height[field.bit == bit] for field in fields]
        most = max(map(len, tops), default=0)
        scales = [weighted_median(top) for top in tops if len(top) and len(top) >= FEW_SPOTS * most]
        if scales:
            scale[bit] = np.median(scales)
        if fields:
            background[bit] = np.median([field.background[bit] for field in fields])
    count = np.sum([np.bincount(field.bit, minlength=n_bits) for field in fields], axis=0)
    if len(fields):
        # a few noise peaks must not hide a dead bit
        scale[(count < DEAD_SPOTS * np.median(count)) & (scale < DEAD_HEIGHT * np.median(scale))] = 0.0
    return Normalization(background, scale)


def sample_of(image: np.ndarray) -> np.ndarray:
    """Some pixels of an image (row, x), evenly spread, at least `SAMPLE` if it has so many."""
    step = max(int(np.sqrt(image.size / SAMPLE)), 1)
    return image[::step, ::step]


def noise_of(image: np.ndarray, background: float = 0.0) -> float:
    """Noise sigma of a filtered image (row, x), spots excluded."""
    return float(NOISE_TO_SIGMA * np.median(np.abs(sample_of(image) - np.float32(background))))


@dataclass(frozen=True, eq=False)
class NoiseMap:
    """Median and noise of a filtered image (plane * height, x) in square tiles, smooth between them.

    medians, sigmas: (plane, row, column) of the tiles; height: rows of a plane; tile: (y, x) size, pixel.
    """

    medians: np.ndarray
    sigmas: np.ndarray
    height: int
    tile: tuple[int, int]

    @classmethod
    def of(cls, image: np.ndarray, height: int, size: float = TILE) -> NoiseMap:
        """Measured on every third pixel along each axis, in tiles of about ``size`` pixels."""
        planes = image.reshape(-1, height, image.shape[-1])
        tile_y, tile_x = (max(int(n / max(round(n / size), 1)), 1) for n in planes.shape[1:])
        down, across = planes.shape[1] // tile_y, planes.shape[2] // tile_x
        medians, deviations = np.empty((2, len(planes), down, across), np.float32)
        tile_noise(planes, tile_y, tile_x, 3, medians, deviations)
        return cls(medians, NOISE_TO_SIGMA * deviations, height, (tile_y, tile_x))

    @property
    def least(self) -> float:
        """The smallest sigma of a tile."""
        return float(self.sigmas.min())

    def level(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Median at positions x, y (rows), linear between the centres of tiles."""
        return self._at(self.medians, x, y)

    def sigma(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Noise at positions x, y (rows), linear between the centres of tiles."""
        return self._at(self.sigmas, x, y)

    def _at(self, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        plane, row = np.divmod(y, self.height)
        places = [plane, (row + 0.5) / self.tile[0] - 0.5, (x + 0.5) / self.tile[1] - 0.5]
        return np.asarray(map_coordinates(values, places, order=1, mode="nearest"), float)


def locate_peaks(image: np.ndarray, height: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-pixel local maxima of one bit (plane * height, x) float32: x, y (rows) and value, float64 (peak,)."""
    capacity = max(image.size // 64, 1)
    while True:
        x, y, value = (np.empty(capacity) for _ in range(3))
        n = find_peaks(image, height, threshold, x, y, value)
        if n <= capacity:
            return x[:n], y[:n], value[:n]
        capacity = n


def weighted_median(heights: np.ndarray) -> float:
    """The light-weighted median: heights above it sum to as much as those below; heights (n,), positive, n >= 1."""
    ordered = np.sort(heights)
    total = np.cumsum(ordered, dtype=np.float64)
    return float(ordered[np.searchsorted(total, total[-1] / 2)])
