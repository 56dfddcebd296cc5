"""Quality of the images of each bit, and images that differ from those of other fields and bits.

The quality is measured on images alone; the error rates of bits are known only after decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import special

from merfish._jit import map_bits
from merfish.imaging.normalize import NOISE_TO_SIGMA, PEAK_SIGMAS, locate_peaks, noise_of, sample_of, weighted_median

BANDS, BAND_ROWS = 8, 64  # bands of a field in which spots are found, and their rows; 512 rows suffice for 2048
BLOCKS = 32  # number of blocks along y and x in which the intensities of bits are compared
COLUMNS = ["fov", "bit", "round", "color", "brightness", "spots", "background", "noise", "width", "likeness"]

# A value is an outlier if it deviates by SIGMAS robust standard deviations over all fields and bits, and by one of the
# FACTORS: the first with at least MIN_FIELDS, the second with fewer, when bits can only be compared with each other.
SIGMAS = 6.0
MIN_FIELDS = 3
FACTORS = {"brightness": (2.0, 5.0), "background": (2.0, 8.0), "noise": (2.0, 5.0), "width": (1.2, 1.4)}
# Spots are too few (or too many) if their number differs from the usual one by the first factor, and if a Poisson
# number of the usual mean divided (or multiplied) by the second would be so with a probability below CHANCE: genes
# differ between bits, and cells between fields.
SPOT_FACTORS = ((5.0, 2.0), (20.0, 5.0))
CHANCE = 1e-7
ENOUGH_SPOTS = 15  # needed to measure their height and width
# If the median correlation of a bit's intensities with others is at least the first, a bit that is lower by the second
# was imaged at another position.
COMMON_LIKENESS, LOST_LIKENESS = 0.6, 0.5
# Two rounds are swapped if exchanging them reduces the sum of squares by this factor, and by this many squared sigmas.
SWAP_RATIO, SWAP_GAIN = 4.0, 80.0
# Lower limits of the sigmas of logarithms.
_SWAP_FLOORS = {"brightness": 0.04, "spots": 0.15, "background": 0.01, "noise": 0.02, "width": 0.01}

MIN_CEILING = 255  # camera counts; no camera saturates below
CEILING_SIGMAS = 5.0  # minimum ratio of the number of pixels at the ceiling to the mean at the values just below
_MIN_PILE = 20  # minimum number of pixels at the ceiling
_BELOW = 64  # number of values below the highest with which it is compared


def camera_ceiling(bits: np.ndarray) -> float:
    """Value at which the camera of a field saturates: the highest value of the data, if many pixels have it.

    bits: (bit, ..., y, x), raw counts. Cameras of 12 or 14 bits saturate at 4095 or 16383, or at 65520 if they shift
    their values up. Without such a value, the maximum of the dtype; infinity for real numbers.
    """
    if bits.dtype.kind not in "ui":
        return np.inf
    end = float(np.iinfo(bits.dtype).max)
    highest = int(max(map_bits(np.max, bits)))
    if highest < MIN_CEILING:
        return end
    # a camera that counts in steps of 16 has no values between
    step = int(np.bitwise_or.reduce(bits[..., ::7].ravel()))
    step = max(step & -step, 1)
    low = highest - _BELOW * step
    at, near = np.sum(map_bits(lambda image: _count_top(image, highest, low), bits), axis=0)
    if at == bits.size:  # a single value: saturated, or a lens cap
        full = highest // step + 1
        return float(highest) if full & (full - 1) == 0 else end
    return float(highest) if at >= max(_MIN_PILE, CEILING_SIGMAS * near / _BELOW) else end


def _count_top(image: np.ndarray, highest: int, low: int) -> tuple[int, int]:
    """Numbers of pixels at the highest value, and from ``low`` to below it."""
    at = int(np.count_nonzero(image == highest))
    return at, int(np.count_nonzero(image >= max(low, 0))) - at


def measure_quality(
    fov: int, raw: np.ndarray, filtered: np.ndarray, names: Sequence[str], rounds: Sequence[int], colors: Sequence[str]
) -> pd.DataFrame:
    """Measure the images of each bit of a field, one row for each bit.

    raw: (bit, z, y, x), camera counts; filtered: the same, band-passed, float32; names, rounds, colors: (bit,).
    Returns columns fov, bit, round, color and

    - brightness: height-weighted median height of its spots above the background, camera counts; NaN without spots
    - spots: number of clear spots in the part of the field that is examined, which is the same for every bit
    - background: median of the raw image, camera counts
    - noise: sigma of the filtered image without its spots, camera counts; 0 if all pixels have the same value
    - width: sigma of its spots after the filter, pixel, larger out of focus; NaN without spots
    - likeness: median correlation, over blocks of the field, of its intensity with that of the other bits
    """
    sample = _sampled(filtered)
    rows = map_bits(lambda image: _spots_of(image, sample.shape[-2]), sample)
    # one plane of the raw images is enough for the background
    middle = raw[:, raw.shape[1] // 2]
    background = [float(np.median(sample_of(image))) for image in middle]
    table = pd.DataFrame(rows, columns=["brightness", "spots", "noise", "width"])
    # in a constant image, the corrected illumination is not noise
    table.loc[[np.ptp(sample_of(image)) == 0 for image in middle], "noise"] = 0.0
    table = table.assign(fov=fov, bit=list(names), round=list(rounds), color=list(colors))
    return table.assign(background=background, likeness=likeness(middle))[COLUMNS]


def _sampled(filtered: np.ndarray) -> np.ndarray:
    """Bands (bit, band, row, x) spread over the planes and rows of (bit, z, y, x); all of a small stack."""
    _, planes, height, _ = filtered.shape
    if planes * height <= BANDS * BAND_ROWS:
        return filtered
    rows = min(BAND_ROWS, height)
    starts = np.linspace(0, height - rows, BANDS).astype(int)
    return np.stack([filtered[:, k * planes // BANDS, start : start + rows] for k, start in enumerate(starts)], axis=1)


def _spots_of(image: np.ndarray, height: int) -> tuple[float, int, float, float]:
    """(brightness, spots, noise, width) of one bit (band, row, x), bands of ``height`` rows."""
    rows = image.reshape(-1, image.shape[-1])
    level = float(np.median(sample_of(rows)))
    noise = noise_of(rows, level)
    x, y, top = locate_peaks(rows, height, level + PEAK_SIGMAS * noise)
    if noise == 0 or not len(x):
        return np.nan, len(x) if noise else 0, noise, np.nan
    row = np.clip(np.rint(y).astype(int), 1, len(rows) - 2)
    column = np.clip(np.rint(x).astype(int), 1, rows.shape[1] - 2)
    peak = (rows[row, column] - level).sum(dtype=float)
    around = sum((rows[row + v, column + u] - level).sum(dtype=float) for v, u in ((-1, 0), (1, 0), (0, -1), (0, 1)))
    ratio = around / 4 / peak if peak > 0 else 0.0
    # the direct neighbours of the maximum of a Gaussian have exp(-1 / (2 sigma^2)) of its height
    width = np.sqrt(-0.5 / np.log(ratio)) if 0 < ratio < 1 else np.nan
    return weighted_median(top - level), len(x), noise, float(width)


def likeness(images: np.ndarray) -> np.ndarray:
    """Median correlation (bit,) of each image (bit, y, x) with the others, over blocks; NaN for a constant image."""
    block = max(16, min(images.shape[1:]) // BLOCKS)
    height, width = (side // block * block for side in images.shape[1:])
    if height // block * (width // block) < 2:
        return np.full(len(images), np.nan)
    # every eighth row is enough for the mean of a block
    rows = images[:, 4:height:8, :width].reshape(len(images), height // block, -1, width // block, block)
    light = rows.mean(axis=(2, 4), dtype=np.float32).reshape(len(images), -1).astype(np.float64)
    light -= light.mean(axis=1, keepdims=True)
    size = np.sqrt((light**2).sum(axis=1, keepdims=True))
    light /= np.where(size > 0, size, np.nan)
    together = light @ light.T
    np.fill_diagonal(together, np.nan)
    known = np.isfinite(together).any(axis=1)
    result = np.full(len(images), np.nan)
    result[known] = np.nanmedian(together[known], axis=1)
    return result


# --- comparing fields and bits ------------------------------------------------------------------------------------


def flag_quality(table: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``reasons`` to the rows of `measure_quality` of any number of fields: what is wrong, or "".

    A bit of a field is compared with the same bit in the other fields and with the other bits of the field, by medians;
    with fewer than `MIN_FIELDS` fields only with the other bits, which detects only gross faults. Swapped rounds of a
    field are detected if each resembles the other one in the other fields; this needs at least `MIN_FIELDS` fields, and
    rounds that differ in brightness, number of spots, background, noise or width.
    """
    fovs, bits = table["fov"].unique(), table["bit"].unique()
    grid = {
        name: table.pivot(index="fov", columns="bit", values=name).loc[fovs, bits].to_numpy(float)
        for name in COLUMNS[4:]
    }
    reasons: list[list[list[str]]] = [[[] for _ in bits] for _ in fovs]
    dark = ~(grid["noise"] > 0)
    for f, b in np.argwhere(dark):
        reasons[f][b].append("no image: all pixels have the same value")
    enough = len(fovs) >= MIN_FIELDS
    _flag_spots(grid["spots"], dark, enough, reasons)
    clear = grid["spots"] >= ENOUGH_SPOTS
    for name in FACTORS:
        usable = clear if name in ("brightness", "width") else ~dark
        _flag_value(name, np.where(usable, grid[name], np.nan), enough, reasons)
    _flag_likeness(grid["likeness"], reasons)
    if enough:
        first = table.drop_duplicates("bit").set_index("bit").loc[bits]
        _flag_swaps(grid, first["round"].to_numpy(), first["color"].to_numpy(), clear, reasons)
    place = {(fov, bit): "; ".join(reasons[f][b]) for f, fov in enumerate(fovs) for b, bit in enumerate(bits)}
    return table.assign(reasons=[place[key] for key in zip(table["fov"], table["bit"], strict=True)])


def _expected(values: np.ndarray, enough: bool, per_field: bool = True) -> np.ndarray:
    """Expected values (fov, bit), logarithms: effects of the bit and of the field, by medians."""
    bit = np.zeros(values.shape[1])
    if enough:
        bit = _median(values - (_median(values, 1)[:, None] if per_field else 0.0), 0)
    field = _median(values - bit, 1) if per_field or not enough else np.zeros(len(values))
    return bit + field[:, None]


def _median(values: np.ndarray, axis: int) -> np.ndarray:
    """Median along an axis without NaN; 0 if all values are NaN."""
    known = np.isfinite(values)
    lines = known.any(axis=axis)
    shape = np.where(np.expand_dims(lines, axis), np.where(known, values, np.nan), 0.0)
    return np.asarray(np.nanmedian(shape, axis=axis))


def _sigma(off: np.ndarray) -> float:
    known = np.abs(off[np.isfinite(off)])
    return NOISE_TO_SIGMA * float(np.median(known)) if len(known) else 0.0


def _flag_spots(spots: np.ndarray, dark: np.ndarray, enough: bool, reasons: list[list[list[str]]]) -> None:
    log = np.log(np.where(dark, np.nan, spots) + 0.5)
    expected = np.exp(_expected(log, enough))
    factor, margin = SPOT_FACTORS[0 if enough else 1]
    few = (spots * factor < expected) & (special.pdtr(spots, expected / margin) < CHANCE)
    many = (spots > expected * factor) & (special.pdtrc(np.maximum(spots - 1, 0), expected * margin) < CHANCE)
    for f, b in np.argwhere((few | many) & ~dark):
        what = "few spots" if few[f, b] else "many spots"
        reasons[f][b].append(f"{what}: {spots[f, b]:.0f}, usually {expected[f, b]:.0f}")


_WORDS = {
    "brightness": ("dim spots", "bright spots", "counts"),
    "background": ("dark background", "bright background", "counts"),
    "noise": ("little noise", "noise", "counts"),
    "width": ("sharp spots", "out of focus", "px"),
}


def _flag_value(name: str, values: np.ndarray, enough: bool, reasons: list[list[list[str]]]) -> None:
    log = np.log(np.maximum(values, 1e-9))
    # widths are compared over fields only: the optics are the same, and a field with all bits out of focus is detected
    expected = _expected(log, enough, per_field=name != "width")
    off = log - expected
    limit = max(SIGMAS * _sigma(off), np.log(FACTORS[name][0 if enough else 1]))
    low, high, unit = _WORDS[name]
    for f, b in np.argwhere(np.abs(off) > limit):
        what = low if off[f, b] < 0 else high
        reasons[f][b].append(f"{what}: {values[f, b]:.3g} {unit}, usually {np.exp(expected[f, b]):.3g}")


def _flag_likeness(likeness: np.ndarray, reasons: list[list[list[str]]]) -> None:
    usual = _median(likeness, 1)[:, None]
    limit = max(LOST_LIKENESS, SIGMAS * _sigma(likeness - usual))
    for f, b in np.argwhere((likeness < usual - limit) & (usual >= COMMON_LIKENESS)):
        reasons[f][b].append(
            f"imaged at another position: its correlation with other bits is {likeness[f, b]:.2f}, "
            f"usually {usual[f, 0]:.2f}"
        )


def _flag_swaps(
    grid: dict[str, np.ndarray],
    rounds: np.ndarray,
    colors: np.ndarray,
    clear: np.ndarray,
    reasons: list[list[list[str]]],
) -> None:
    """Flag pairs of rounds whose values are swapped in one field."""
    values, expected = [], []
    for name, floor in _SWAP_FLOORS.items():
        log = np.log(np.maximum(np.where(clear, grid[name], np.nan), 1e-9))
        usual = _expected(log, True)
        sigma = max(_sigma(log - usual), floor)
        values.append(log / sigma)
        expected.append(usual / sigma)
    seen, usual = np.stack(values), np.stack(expected)  # (value, fov, bit)
    found: list[tuple[float, int, int, int]] = []
    for i, j in combinations(np.unique(rounds), 2):
        a, b = np.flatnonzero(rounds == i), np.flatnonzero(rounds == j)
        a, b = a[np.argsort(colors[a], kind="stable")], b[np.argsort(colors[b], kind="stable")]
        if len(a) != len(b) or (colors[a] != colors[b]).any():
            continue  # they have different files
        here, there = np.concatenate([a, b]), np.concatenate([b, a])
        off = np.nansum((seen[:, :, here] - usual[:, :, here]) ** 2, axis=(0, 2))
        swapped = np.nansum((seen[:, :, here] - usual[:, :, there]) ** 2, axis=(0, 2))
        gain = off - swapped
        found += [
            (-gain[f], f, i, j) for f in np.flatnonzero((gain > SWAP_GAIN) & (off > SWAP_RATIO * swapped)).tolist()
        ]
    taken: set[tuple[int, int]] = set()
    for _, f, i, j in sorted(found):  # among pairs that share a round, the one with the largest gain
        if not taken & {(f, i), (f, j)}:
            taken |= {(f, i), (f, j)}
            for k in np.flatnonzero((rounds == i) | (rounds == j)):
                reasons[f][k].append(f"rounds {i} and {j} appear to be swapped")
