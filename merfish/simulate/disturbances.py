"""Disturbances of real experiments, each off by default."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter


@dataclass(frozen=True)
class Disturbances:
    """Disturbances of a simulated experiment; by default there are none.

    stage_error: sigma of the difference between true and recorded position of a field along each axis, micrometre.
    chromatic: displacement of a bit's colour relative to the beads' colour at the worst corner of the field, pixels.
    vignetting: fraction of light lost in the corners of each frame.
    loose_beads: fraction of beads that move, by about 20 pixels, in each round after the first.
    autofluorescence: photons per pixel that cells add to the bead images.
    haze: out-of-focus light in the bit images, relative to the light of all molecules, blurred by 15 pixels.
    bleaching: fraction of a spot's light lost in every round.
    dead_bit: number of a bit without signal, from 0.
    saturated_fov: field illuminated 300 times too strongly, beyond the range of the camera.
    hot_pixels: number of camera pixels that are 2,000 counts too bright in every frame.
    bleed_through: share of a spot's light that also appears in the other bits of its round.
    carry_over: share of it that also appears in the bit of the same colour of the next round.
    """

    stage_error: float = 0.0
    chromatic: float = 0.0
    vignetting: float = 0.0
    loose_beads: float = 0.0
    autofluorescence: float = 0.0
    haze: float = 0.0
    bleaching: float = 0.0
    dead_bit: int | None = None
    saturated_fov: int | None = None
    hot_pixels: int = 0
    bleed_through: float = 0.0
    carry_over: float = 0.0


def draw_chromatic(n_colors: int, shape: tuple[int, int], largest: float, rng: np.random.Generator) -> np.ndarray:
    """Affine maps (color, 2, 3) of (y, x, 1) from positions in the beads' colour to positions in each colour.

    Mostly magnification about the centre, with a little shear and a shift; the displacement at the worst corner is
    ``largest`` / (color + 1) pixels.
    """
    maps = np.tile(np.eye(2, 3), (n_colors, 1, 1))
    middle = (np.array(shape) - 1) / 2.0
    corners = np.array([(sy, sx) for sy in (-1, 1) for sx in (-1, 1)]) * middle
    for color in range(n_colors):
        linear = (np.eye(2) + rng.normal(0.0, 0.2, (2, 2))) * (-1) ** color
        shift = rng.normal(0.0, 0.2, 2) * middle.mean()
        worst = np.linalg.norm(corners @ linear.T + shift, axis=1).max()
        scale = largest / (color + 1) / max(worst, 1e-9)
        maps[color, :, :2] += scale * linear
        maps[color, :, 2] = scale * (shift - linear @ middle)
    return maps


def illumination(shape: tuple[int, int], vignetting: float) -> np.ndarray:
    """Relative illumination (y, x) float32 of each pixel: 1 in the centre, 1 - vignetting in the corners."""
    y, x = (np.linspace(-1.0, 1.0, n) for n in shape)
    return (1.0 - vignetting * (y[:, None] ** 2 + x[None, :] ** 2) / 2.0).astype(np.float32)


def leak_shares(
    round_of_bit: np.ndarray, color_of_bit: np.ndarray, bleed_through: float, carry_over: float
) -> np.ndarray:
    """Share of the light of each bit that also appears in each other bit, (from, to); see `Disturbances`."""
    later = round_of_bit - round_of_bit[:, None]
    same = color_of_bit == color_of_bit[:, None]
    return bleed_through * ((later == 0) & ~same) + carry_over * ((later == 1) & same)


def leak_light(brightness: np.ndarray, flux: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Brightness of molecules in their bits (molecule, bit) with the light of other bits.

    flux: (bit,), photons of a spot of brightness 1; a bit that shows none stays dark. shares: from `leak_shares`.
    """
    light = (brightness * flux) @ shares
    return brightness + np.divide(light, flux, out=np.zeros_like(light), where=flux > 0)


def add_haze(expected: np.ndarray, background: float, share: float) -> None:
    """Add to each frame of ``expected`` (bit, z, y, x) photons ``share`` of its light above ``background``, blurred."""
    for frame in expected.reshape(-1, *expected.shape[-2:]):
        light = frame - background
        for _ in range(3):  # three boxes of 30 pixels are nearly a Gaussian of sigma 15, in a third of the time
            light = uniform_filter(light, 30, mode="nearest")
        frame += share * light


def heat_pixels(counts: np.ndarray, pixels: np.ndarray, by: np.ndarray | int = 2_000) -> None:
    """Add ``by``, (pixel,), to ``pixels`` (pixel, 2) y, x of every frame of ``counts`` (frame, y, x) uint16."""
    rows, columns = pixels.T
    counts[:, rows, columns] = np.minimum(counts[:, rows, columns] + np.asarray(by, np.int64), 65_535)
