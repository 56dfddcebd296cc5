"""Detection efficiency by spike-in: simulated molecules are added to the images of a field, which is decoded again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from merfish.calls.error_model import bit_error_rates, tally_words
from merfish.calls.filtering import keep_at_rate, rate_calls
from merfish.codebook import Codebook
from merfish.decoding._peak_kernels import Spots, add_spots
from merfish.decoding.alignment import shifts_at
from merfish.decoding.candidates import Peaks, joined
from merfish.decoding.peaks import BIN, REACH, Fit, Profile, shape_of
from merfish.decoding.spots import gather_peaks, measure_shifts
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed, bandpass
from merfish.imaging.unmixing import subtract_leaks
from merfish.simulate.scoring import match_calls

BIT_SPREAD = 0.15  # sigma of the logarithm of a molecule's heights in its bits, as in `merfish.simulate.optics`
SHARE = 0.1  # added molecules relative to those called in the field; so few hardly change its density
FEWEST = 50  # molecules kept in the field, and added molecules
RADIUS = 1.5  # sigmas of the PSF; largest distance of a call from the added molecule that it matches
DIMMEST = 0.5  # minimum height of a model peak, relative to the median of the peaks of calls
SIDE = 1024  # pixel; the part of the field that is decoded again has at most SIDE**2 pixels over all planes


def spike_in(
    filtered: np.ndarray | Bandpassed,
    codebook: Codebook,
    normalization: Normalization,
    calls: pd.DataFrame,
    decode: Callable[[np.ndarray], pd.DataFrame],
    *,
    sigma: float,
    seed: int,
) -> pd.DataFrame:
    """Add molecules to the centre of a field, decode it again, and match the calls with the added molecules.

    filtered: (bit, [z,] y, x) real, band-passed, or a stack that is filtered when it is indexed. calls: those of the
    field, not calibrated. decode: from (bit, z, y, x) float32 to its calls, not calibrated. sigma: of the PSF, pixel.
    Returns one row per added molecule: ``spike``, its barcode_id, and the columns of the call that matches it, NaN if
    there is none. Empty if the field has fewer than `FEWEST` kept molecules.
    """
    part, top, left = _middle(filtered)
    x, y = calls["x"] - left, calls["y"] - top
    calls = calls.assign(x=x, y=y)[(x >= 0) & (x < part.shape[3]) & (y >= 0) & (y < part.shape[2])]
    rated = rate_calls(calls, codebook)
    keep = keep_at_rate(1 - rated["probability"].to_numpy(float))
    kept = rated[keep]
    if len(kept) < FEWEST:
        return pd.DataFrame({"spike": np.empty(0, np.int32)})
    word, shown = (rated[name].to_numpy() for name in ("barcode_id", "shown"))
    rates = bit_error_rates(tally_words(word, shown, rated["probability"].to_numpy(), keep, codebook), codebook)
    lost, gained = (np.nan_to_num(rates[name].to_numpy()) for name in ("lost", "gained"))
    spiked, spikes = add_spikes(part, codebook, normalization, kept, lost=lost, gained=gained, sigma=sigma, seed=seed)
    again = decode(spiked)
    call, spike = match_calls(again, spikes, radius=RADIUS * sigma)
    found = again.iloc[call].set_axis(spike).reindex(range(len(spikes)))
    return found.assign(spike=spikes["barcode_id"].to_numpy(np.int32))


def _middle(filtered: np.ndarray | Bandpassed) -> tuple[np.ndarray, int, int]:
    """Part of a stack that is decoded again, (bit, z, y, x) band-passed, and its first row and column."""
    whole = filtered.images if isinstance(filtered, Bandpassed) else filtered
    whole = whole.reshape(len(whole), -1, *whole.shape[-2:])
    n_planes, *shape = whole.shape[1:]
    side = int(SIDE / np.sqrt(n_planes))
    top, left = ((n - min(n, side)) // 2 for n in shape)
    part = whole[:, :, top : top + side, left : left + side]
    if isinstance(filtered, Bandpassed):
        part = bandpass(part, smoothing=filtered.smoothing, background=filtered.background)
        subtract_leaks(part, filtered.leaks)
    return part, top, left


def add_spikes(
    filtered: np.ndarray,
    codebook: Codebook,
    normalization: Normalization,
    kept: pd.DataFrame,
    *,
    lost: np.ndarray,
    gained: np.ndarray,
    sigma: float,
    seed: int = 0,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Copy a band-passed stack and add molecules to it; return the copy and a table of barcode_id, x, y, z.

    filtered: (bit, z, y, x) float32. kept: calls of this field, whose words the added molecules have. Heights, profiles
    and shifts between bits are those of the field's peaks, which are fitted jointly. Each molecule is placed 4 to 8
    ``sigma`` from a bright peak, so that molecules are equally crowded. lost, gained (bit,): error rates of the bits,
    from `bit_error_rates`. sigma: of the PSF, pixel. Each molecule lies in a single plane; molecules between planes are
    not simulated.
    """
    rng = np.random.default_rng(seed)
    n_bits, _, plane_height, width = filtered.shape
    number = min(max(round(SHARE * len(kept)), FEWEST), len(kept))
    rows = filtered.reshape(n_bits, -1, width)
    fits = gather_peaks(rows, normalization, plane_height, sigma, np.empty(rows.shape, np.int8))
    warp = measure_shifts(fits, plane_height, sigma).warp
    peaks = joined(fits)
    # peaks of molecules, called or not; dimmer ones are noise or far out of focus
    own = belong(peaks, plane_height, kept, sigma)
    bright = np.flatnonzero(peaks.height > DIMMEST * np.median(peaks.height[own]))
    model = rng.choice(bright, number)
    plane = (peaks.y[model] / plane_height).astype(np.int64)
    angle, away = rng.uniform(0, 2 * np.pi, number), rng.uniform(4, 8, number) * sigma
    x = np.clip(peaks.x[model] + away * np.cos(angle), 0, width - 1)
    y = np.clip(peaks.y[model] - plane * plane_height + away * np.sin(angle), 0, plane_height - 1)
    word = rng.choice(kept["barcode_id"].to_numpy(), number)
    chance = rng.random((number, n_bits))
    shown = np.where(codebook.words[word] == 1, chance >= lost, chance < gained)
    log = np.log(peaks.height[bright])
    # the spread between bits, which is added below, is part of the variance of the peaks' heights
    middle, share = np.median(log), 1 - BIT_SPREAD**2 / max(float(log.var()), BIT_SPREAD**2)
    light = np.exp(middle + np.sqrt(share) * (rng.choice(log, number) - middle))
    light = light[:, None] * np.exp(rng.normal(0, BIT_SPREAD, (number, n_bits))) * shown * normalization.scale
    out = np.array(rows, np.float32)
    for bit, profile in enumerate(profiles(fits)):
        on = np.flatnonzero(light[:, bit])
        down, across = shifts_at(warp, bit, y[on], x[on])
        row = plane[on] * plane_height + np.clip(y[on] + down, 0, plane_height - 1)
        spots = Spots(x[on] + across, row, light[on, bit])
        add_spots(out[bit], plane_height, spots, shape_of(profile, sigma))
    added = pd.DataFrame({"barcode_id": word.astype(np.int32), "x": x, "y": y, "z": plane.astype(float)})
    return out.reshape(filtered.shape), added


def profiles(fits: list[Fit]) -> list[Profile]:
    """Profile of a spot in each bit; an unknown one is round and the mean of the others or, without any, a Gaussian."""
    known = [fit.profile.height for fit in fits if fit.profile is not None]
    usual = np.mean(known, axis=0) if known else np.exp(-0.5 * (BIN * np.arange(round(REACH / BIN) + 1)) ** 2)
    return [fit.profile or Profile(usual) for fit in fits]


def belong(peaks: Peaks, plane_height: int, calls: pd.DataFrame, sigma: float) -> np.ndarray:
    """Mark the peaks that belong to one of the calls (x, y in pixels, z in planes, and the bits ``shown``).

    These lie within ``sigma``, of the PSF, pixel, of a call. Returns (peak,) bool, all True if no peak belongs to one.
    """
    bits = np.arange(64, dtype=np.uint64)
    call, bit = np.nonzero((calls["shown"].to_numpy(np.uint64)[:, None] >> bits) & np.uint64(1))
    apart = 4.0 * sigma  # of planes and of bits
    x, y, z = (calls[name].to_numpy(float)[call] for name in ("x", "y", "z"))
    tree = cKDTree(np.column_stack([x, y, np.rint(z) * apart, bit * apart]))
    plane, row = np.divmod(peaks.y, plane_height)
    places = np.column_stack([peaks.x, row, plane * apart, peaks.bit * apart])
    near = np.isfinite(tree.query(places, distance_upper_bound=sigma)[0])
    return near if near.any() else np.ones(len(near), bool)
