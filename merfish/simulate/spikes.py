"""Detection efficiency by spike-in: simulated molecules are put into a field's own images, and counted again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.imaging.normalize import Normalization, find_spots
from merfish.simulate.scoring import match_calls

BIT_SPREAD = 0.15  # sigma of the logarithm of a molecule's heights in its bits; that of the simulator
SHARE = 0.1  # of the molecules called in the field: so few hardly add to its crowd
FEWEST = 50
RADIUS = 1.5  # sigmas of the PSF, within which a call is the molecule that was put in


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
    """A band-passed stack with some molecules more, and what was put in: barcode_id, x, y, z.

    filtered: (bit, z, y, x) float32, filtered with ``filters`` (pixel). kept: calls of this field, whose words and
    planes the new ones have: each lies beside a kept call, a few spots off, so where it is as crowded. Their heights
    are those of the field's clear spots. lost, gained (bit,): rates of the bits, as `bit_error_rates` tells them.
    sigma: of the PSF, pixel. A molecule between planes is not imitated: each lies in one plane.
    """
    rng = np.random.default_rng(seed)
    n_bits, n_planes, height, width = filtered.shape
    number = min(max(round(SHARE * len(kept)), FEWEST), len(kept))
    model = kept.iloc[rng.permutation(len(kept))[:number]]
    angle, away = rng.uniform(0, 2 * np.pi, number), rng.uniform(4, 8, number) * sigma
    x = np.clip(model["x"].to_numpy(float) + away * np.cos(angle), 0, width - 1)
    y = np.clip(model["y"].to_numpy(float) + away * np.sin(angle), 0, height - 1)
    word = rng.permutation(model["barcode_id"].to_numpy())
    plane = np.clip(np.rint(model["z"].to_numpy(float)), 0, n_planes - 1).astype(int)
    chance = rng.random((number, n_bits))
    shown = np.where(codebook.words[word] == 1, chance >= lost, chance < gained)
    spots = find_spots(filtered)
    alive = normalization.gain[spots.bit] > 0
    heights = (spots.height * normalization.gain[spots.bit])[alive]
    light = rng.choice(heights, number)[:, None] * np.exp(rng.normal(0, BIT_SPREAD, (number, n_bits))) * shown
    out = np.array(filtered, np.float32)
    for bit in range(n_bits):
        for k in np.flatnonzero(light[:, bit]):
            _add(out[bit, plane[k]], y[k], x[k], light[k, bit] * normalization.scale[bit], sigma, filters)
    return out, pd.DataFrame({"barcode_id": word.astype(np.int32), "x": x, "y": y, "z": plane.astype(float)})


def _add(image: np.ndarray, y: float, x: float, top: float, sigma: float, filters: tuple[float, float]) -> None:
    """Add a band-passed Gaussian spot, ``top`` high, to an image (y, x)."""
    near, far = (sigma**2 + 1 / 12 + width**2 for width in filters)
    reach = int(np.ceil(4 * np.sqrt(far)))
    rows = np.arange(max(round(y) - reach, 0), min(round(y) + reach + 1, image.shape[0]))
    columns = np.arange(max(round(x) - reach, 0), min(round(x) + reach + 1, image.shape[1]))
    squares = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    spot = np.exp(-squares / (2 * near)) / near - np.exp(-squares / (2 * far)) / far
    image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += top * spot / (1 / near - 1 / far)


def detected_share(
    spiked: np.ndarray, spikes: pd.DataFrame, decode: Callable[[np.ndarray], pd.DataFrame], sigma: float
) -> np.ndarray:
    """Which of the ``spikes`` are among the calls that ``decode`` keeps of the spiked stack; (spike,) bool."""
    found = np.zeros(len(spikes), bool)
    found[match_calls(decode(spiked), spikes, radius=RADIUS * sigma)[1]] = True
    return found
