"""Background and scale of each bit, such that the spot of one molecule has height 1 in every bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merfish._jit import map_bits
from merfish.imaging._kernels import between_tiles, find_peaks, tile_noise
from merfish.imaging.preprocess import Bandpassed, in_rows

NOISE_TO_SIGMA = 1.4826  # ratio of the sigma of a Gaussian to its median absolute deviation
SAMPLE = 2**17  # pixels of an image; enough to estimate its noise to 0.3 %
TILE = 32.0  # pixel; many spots wide, but smaller than cells, whose autofluorescence adds noise
PART = 2**18  # pixels of each bit on which background and scale of a large stack are measured
BAND = 64  # rows; two tiles of the noise map
CLEAR_SPOTS = 100  # minimum for each bit in the part; its scale is then known to 3 %
FEW_SPOTS = 0.1  # relative to the field with most spots; fields with fewer are ignored for a bit
# relative to the median number and height of spots over bits; a bit below both is dead
DEAD_SPOTS, DEAD_HEIGHT = 0.01, 1 / 3
# times a molecule's height. In real fields with few molecules the two medians of `typical_height` differ by up to a
# factor of 1.9; where 60 hot pixels outshine 600 spots of a bit, by 16 to 33
OUTSHONE = 4.0
FEW = 0.2  # hot pixels and specks are at most this share of the spots, molecules more
ITERATIONS = 10  # the limited median then changes no more
PEAK_SIGMAS = 6.0  # a local maximum this far above the noise is a spot


@dataclass(frozen=True, eq=False)
class Normalization:
    """value = (intensity - background) / scale; background, scale (bit,) float32 in camera counts."""

    background: np.ndarray
    scale: np.ndarray

    @classmethod
    def identity(cls, n_bits: int) -> Normalization:
        """The identity, for a stack that is already normalised."""
        return cls(np.zeros(n_bits, np.float32), np.ones(n_bits, np.float32))

    def to_dict(self) -> dict[str, list[float]]:
        """Convert to values that JSON stores exactly."""
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
    """Clear spots of each bit of a field, from which the calibration is computed.

    bit, plane: (spot,) int64; y, x: (spot,) float64 pixel; height: (spot,) float32 above the background, camera counts.
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
    """Find the local maxima of each bit that lie 6 sigma of the local noise above the background.

    filtered: (bit, ..., y, x), band-passed.
    """
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
    """Normalisation of one stack: background is the median of each bit, scale the weighted median of its clear maxima.

    The heights of the local maxima are their own weights: maxima above the scale make up half of the total height. The
    many dim rings of out-of-focus molecules have little influence on it, while they would lower a plain median.

    filtered: (bit, ..., y, x), band-passed. Of a large stack, evenly spaced bands of rows are used if they contain
    enough spots in every bit. A bit without clear maxima is dead: its scale is 0.
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
    """Evenly spaced bands of rows, about `PART` pixels of each bit, as (bit, band, y, x); all of a small stack."""
    width = filtered.shape[-1]
    rows, height = in_rows(filtered)
    first = np.arange(0, rows.shape[1], BAND)
    first = first[first % height + BAND <= height]  # whole, in one plane
    every = len(first) * BAND * width // PART
    if every < 2:
        return filtered
    return np.stack([rows[:, top : top + BAND] for top in first[::every]], axis=1)


def shared_normalization(fields: Sequence[FieldSpots], n_bits: int) -> Normalization:
    """Median over fields of the background and scale of each bit, which are as in `peak_normalization`.

    Fields with few spots of a bit, such as those without cells, are ignored for its scale. A bit with few and dim spots
    is dead: its scale is 0.
    """
    background, scale = np.zeros(n_bits, np.float32), np.zeros(n_bits, np.float32)
    for bit in range(n_bits):
        tops = [field.height[field.bit == bit] for field in fields]
        most = max(map(len, tops), default=0)
        scales = [typical_height(top) for top in tops if len(top) and len(top) >= FEW_SPOTS * most]
        if scales:
            scale[bit] = np.median(scales)
        if fields:
            background[bit] = np.median([field.background[bit] for field in fields])
    count = np.sum([np.bincount(field.bit, minlength=n_bits) for field in fields], axis=0)
    if len(fields):
        # a few noise peaks must not make a dead bit look alive
        scale[(count < DEAD_SPOTS * np.median(count)) & (scale < DEAD_HEIGHT * np.median(scale))] = 0.0
    return Normalization(background, scale)


def sample_of(image: np.ndarray) -> np.ndarray:
    """Evenly spaced pixels of an image (row, x), at least `SAMPLE` if it has that many."""
    step = max(int(np.sqrt(image.size / SAMPLE)), 1)
    return image[::step, ::step]


def noise_of(image: np.ndarray, background: float = 0.0) -> float:
    """Noise sigma of a filtered image (row, x), spots excluded."""
    return float(NOISE_TO_SIGMA * np.median(np.abs(sample_of(image) - np.float32(background))))


@dataclass(frozen=True, eq=False)
class NoiseMap:
    """Median and noise of a filtered image (plane * height, x) in tiles, interpolated between them.

    medians, sigmas: (plane, row, column) of the tiles; height: rows of a plane; tile: (y, x) size, pixel.
    """

    medians: np.ndarray
    sigmas: np.ndarray
    height: int
    tile: tuple[int, int]

    @classmethod
    def of(cls, image: np.ndarray, height: int, size: float = TILE) -> NoiseMap:
        """Measure on every third pixel along each axis, in tiles of about ``size`` pixels a side."""
        planes = image.reshape(-1, height, image.shape[-1])
        tile_y, tile_x = (max(int(n / max(round(n / size), 1)), 1) for n in planes.shape[1:])
        down, across = planes.shape[1] // tile_y, planes.shape[2] // tile_x
        medians, deviations = np.empty((2, len(planes), down, across), np.float32)
        tile_noise(planes, tile_y, tile_x, 3, medians, deviations)
        return cls(medians, NOISE_TO_SIGMA * deviations, height, (tile_y, tile_x))

    @property
    def least(self) -> float:
        """Smallest sigma of all tiles."""
        return float(self.sigmas.min())

    def level(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Median at positions x, y (rows), interpolated linearly between the centres of the tiles."""
        return self._at(self.medians, x, y)

    def sigma(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Noise sigma at positions x, y (rows), interpolated linearly between the centres of the tiles."""
        return self._at(self.sigmas, x, y)

    def _at(self, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        out = np.empty(len(x), np.float32)
        between_tiles(values, self.height, *self.tile, x, y, out)
        return out.astype(float)


def locate_peaks(image: np.ndarray, height: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-pixel local maxima above ``threshold`` of one bit (plane * height, x) float32.

    Returns x, y (rows) and value, (peak,) float64 each.
    """
    capacity = max(image.size // 64, 1)
    while True:
        x, y, value = (np.empty(capacity) for _ in range(3))
        n = find_peaks(image, height, threshold, x, y, value)
        if n <= capacity:
            return x[:n], y[:n], value[:n]
        capacity = n


def weighted_median(heights: np.ndarray) -> float:
    """Light-weighted median: heights above it sum to as much as those below; heights (n,), positive, n >= 1."""
    return _median(np.sort(heights), np.inf)


def typical_height(heights: np.ndarray) -> float:
    """Height of a molecule: the light-weighted median, unless a few hot pixels or specks contribute most of the light.

    The median is replaced by one in which no height counts more than `OUTSHONE` times the height of a molecule if it is
    more than `OUTSHONE` times as high as that. heights (n,), positive, n >= 1.
    """
    ordered = np.sort(heights)
    usual, limited = _median(ordered, np.inf), float(np.quantile(ordered, 1 - FEW))
    for _ in range(ITERATIONS):
        limited = _median(ordered, OUTSHONE * limited)
    return limited if usual > OUTSHONE * limited else usual


def _median(ordered: np.ndarray, most: float) -> float:
    """Median of sorted heights (n,), weighted by the heights, which count ``most`` at most."""
    total = np.cumsum(np.minimum(ordered, most), dtype=np.float64)
    return float(ordered[np.searchsorted(total, total[-1] / 2)])
