"""Detection efficiency by spike-in: simulated molecules are added to a field's own images, and looked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from merfish.calls.error_model import bit_error_rates, tally_words
from merfish.calls.filtering import keep_at_rate, rate_calls
from merfish.codebook import Codebook
from merfish.imaging.normalize import FieldSpots, Normalization, find_spots
from merfish.simulate.scoring import match_calls

BIT_SPREAD = 0.15  # sigma of the logarithm of a molecule's heights in its bits; that of the simulator
SHARE = 0.1  # of the molecules called in the field: so few hardly add to its crowd
FEWEST = 50
RADIUS = 1.5  # sigmas of the PSF, within which a call is the molecule that was added
DIMMEST = 0.5  # of the median height of the spots of calls
SIDE = 1024  # pixel; a part of the field of this many squared, over all planes, is decoded again


def spike_in(
    filtered: np.ndarray,
    codebook: Codebook,
    normalization: Normalization,
    calls: pd.DataFrame,
    decode: Callable[[np.ndarray], pd.DataFrame],
    *,
    sigma: float,
    filters: tuple[float, float],
    seed: int,
) -> pd.DataFrame:
    """Add molecules to the middle of a field, decode it again, and say which of them were found.

    filtered: (bit, z, y, x) float32, band-passed with ``filters`` (pixel). calls: those of the field, not yet rated.
    decode: from such a stack to its calls, not yet rated. sigma: of the PSF, pixel.
    Returns one row a molecule that was added: ``spike``, its barcode_id, and the columns of the call that found it,
    NaN where none did. Empty where the field shows fewer than `FEWEST` molecules.
    """
    top, left, side = _middle(filtered.shape)
    x, y = calls["x"] - left, calls["y"] - top
    calls = calls.assign(x=x, y=y)[(x >= 0) & (x < side[1]) & (y >= 0) & (y < side[0])]
    rated = rate_calls(calls, codebook)
    keep = keep_at_rate(1 - rated["probability"].to_numpy(float))
    kept = rated[keep]
    if len(kept) < FEWEST:
        return pd.DataFrame({"spike": np.empty(0, np.int32)})
    word, shown = (rated[name].to_numpy() for name in ("barcode_id", "shown"))
    rates = bit_error_rates(tally_words(word, shown, rated["probability"].to_numpy(), keep, codebook), codebook)
    lost, gained = (np.nan_to_num(rates[name].to_numpy()) for name in ("lost", "gained"))
    part = filtered[:, :, top : top + side[0], left : left + side[1]]
    spiked, spikes = add_spikes(
        part, codebook, normalization, kept, lost=lost, gained=gained, sigma=sigma, filters=filters, seed=seed
    )
    again = decode(spiked)
    call, spike = match_calls(again, spikes, radius=RADIUS * sigma)
    found = again.iloc[call].set_axis(spike).reindex(range(len(spikes)))
    return found.assign(spike=spikes["barcode_id"].to_numpy(np.int32))


def _middle(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, int]]:
    """First row, first column and size (y, x) of the part of a stack (bit, z, y, x) that is decoded again."""
    side = int(SIDE / np.sqrt(shape[1]))
    size = min(side, shape[2]), min(side, shape[3])
    return (shape[2] - size[0]) // 2, (shape[3] - size[1]) // 2, size


def add_spikes(
    filtered: np.ndarray,
    codebook: Codebook,
    normalization: Normalization,
    kept: pd.DataFrame,
    *,
    lost: np.ndarray,
    gained: np.ndarray,
    sigma: float,
    filters: tuple[float, float],
    seed: int = 0,
) -> tuple[np.ndarray, pd.DataFrame]:
    """A copy of a band-passed stack with molecules added, and what was added: barcode_id, x, y, z.

    filtered: (bit, z, y, x) float32, filtered with ``filters`` (pixel). kept: calls of this field, whose words the
    added molecules have. Places and heights are those of the field's bright spots: each molecule lies a few spots off
    one of them, where it is as crowded. lost, gained (bit,): rates of the bits, as `bit_error_rates` estimates them.
    sigma: of the PSF, pixel. Molecules between planes are not imitated: each lies in one plane.
    """
    rng = np.random.default_rng(seed)
    n_bits, last_y, last_x = len(filtered), filtered.shape[-2] - 1, filtered.shape[-1] - 1
    number = min(max(round(SHARE * len(kept)), FEWEST), len(kept))
    spots = find_spots(filtered)
    height = spots.height * normalization.gain[spots.bit]
    # spots of molecules, whether these are called or not; dimmer ones are noise or far out of focus
    bright = np.flatnonzero(height > DIMMEST * np.median(height[belong(spots, kept, sigma)]))
    model = rng.choice(bright, number)
    angle, away = rng.uniform(0, 2 * np.pi, number), rng.uniform(4, 8, number) * sigma
    x = np.clip(spots.x[model] + away * np.cos(angle), 0, last_x)
    y = np.clip(spots.y[model] + away * np.sin(angle), 0, last_y)
    word = rng.choice(kept["barcode_id"].to_numpy(), number)
    plane = spots.plane[model]
    chance = rng.random((number, n_bits))
    shown = np.where(codebook.words[word] == 1, chance >= lost, chance < gained)
    log = np.log(height[bright])
    # heights of single bits vary by the spread between bits as well, which is added below
    middle, share = np.median(log), 1 - BIT_SPREAD**2 / max(float(log.var()), BIT_SPREAD**2)
    light = np.exp(middle + np.sqrt(share) * (rng.choice(log, number) - middle))
    light = light[:, None] * np.exp(rng.normal(0, BIT_SPREAD, (number, n_bits))) * shown
    out = np.array(filtered, np.float32)
    for bit in range(n_bits):
        for k in np.flatnonzero(light[:, bit]):
            _add(out[bit, plane[k]], y[k], x[k], light[k, bit] * normalization.scale[bit], sigma, filters)
    return out, pd.DataFrame({"barcode_id": word.astype(np.int32), "x": x, "y": y, "z": plane.astype(float)})


def belong(spots: FieldSpots, calls: pd.DataFrame, sigma: float) -> np.ndarray:
    """Which spots (spot,) are part of one of the calls (x, y, z in pixels and planes, and the bits ``shown``).

    They lie within ``sigma``, pixel, of the PSF. All spots if none does.
    """
    bits = np.arange(64, dtype=np.uint64)
    call, bit = np.nonzero((calls["shown"].to_numpy(np.uint64)[:, None] >> bits) & np.uint64(1))
    apart = 4.0 * sigma  # of planes and of bits
    x, y, z = (calls[name].to_numpy(float)[call] for name in ("x", "y", "z"))
    tree = cKDTree(np.column_stack([x, y, np.rint(z) * apart, bit * apart]))
    places = np.column_stack([spots.x, spots.y, spots.plane * apart, spots.bit * apart])
    near = np.isfinite(tree.query(places, distance_upper_bound=sigma)[0])
    return near if near.any() else np.ones(len(near), bool)


def _add(image: np.ndarray, y: float, x: float, top: float, sigma: float, filters: tuple[float, float]) -> None:
    """Add a band-passed Gaussian spot, ``top`` high, to an image (y, x)."""
    near, far = (sigma**2 + 1 / 12 + width**2 for width in filters)
    reach = int(np.ceil(4 * np.sqrt(far)))
    rows = np.arange(max(round(y) - reach, 0), min(round(y) + reach + 1, image.shape[0]))
    columns = np.arange(max(round(x) - reach, 0), min(round(x) + reach + 1, image.shape[1]))
    squares = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    spot = np.exp(-squares / (2 * near)) / near - np.exp(-squares / (2 * far)) / far
    image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += top * spot / (1 / near - 1 / far)
