"""Autofluorescence of cells: textured cytoplasm and bright granules, the same in every bit up to a factor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from merfish.simulate._kernels import add_spot

CELLS = 30 / 512**2  # discs per pixel
CELL_RADIUS = (30.0, 55.0)  # pixels
NUCLEUS_SHARE = 0.45  # radius of the nucleus relative to that of the cell
NUCLEUS_LIGHT = 0.4  # relative to the cytoplasm
EDGE = 2.0  # pixels; sigma of the blur of outlines
TEXTURE = ((6.0, 0.25), (15.0, 0.3))  # sigma of the grain (pixels), and of the logarithm of the light
GRANULES = 5  # per cell
GRANULE_SIGMA = (1.2, 2.0)  # pixels
GRANULE_LIGHT = (0.5, 3.0)  # at the centre, relative to the cytoplasm
BIT_RANGE = (0.7, 1.3)  # range of the factor of each bit


@dataclass(frozen=True, eq=False)
class Glow:
    """Autofluorescence. light: (bit, y, x) float32, photons; cells: (y, x) bool, True within cells."""

    light: np.ndarray
    cells: np.ndarray


def draw_glow(n_bits: int, shape: tuple[int, int], photons: float, rng: np.random.Generator) -> Glow:
    """Simulate cells as discs at random positions in a field of ``shape`` (y, x), with ``photons`` per pixel."""
    height, width = shape
    number = max(round(CELLS * height * width), 1)
    places = np.column_stack([rng.uniform(0, height, number), rng.uniform(0, width, number)])
    radii = rng.uniform(*CELL_RADIUS, number)
    y, x = np.mgrid[:height, :width]
    cells, nuclei = np.zeros(shape, bool), np.zeros(shape, bool)
    granules = np.zeros(shape, np.float32)
    for (cy, cx), radius in zip(places, radii, strict=True):
        distance = np.hypot(y - cy, x - cx)
        cells |= distance < radius
        nuclei |= distance < NUCLEUS_SHARE * radius
        angle = rng.uniform(0, 2 * np.pi, GRANULES)
        out = radius * np.sqrt(rng.uniform(NUCLEUS_SHARE**2, 1, GRANULES))
        sigma = rng.uniform(*GRANULE_SIGMA, GRANULES)
        flux = photons * rng.uniform(*GRANULE_LIGHT, GRANULES) * 2 * np.pi * sigma**2
        for k in range(GRANULES):
            add_spot(granules, cy + out[k] * np.sin(angle[k]), cx + out[k] * np.cos(angle[k]), flux[k], sigma[k])
    light = gaussian_filter(np.where(nuclei, NUCLEUS_LIGHT, 1.0) * cells, EDGE)
    for grain, spread in TEXTURE:
        texture = gaussian_filter(rng.standard_normal(shape), grain)
        light *= np.exp(spread * texture / texture.std())
    image = (photons * light + granules * cells).astype(np.float32)
    return Glow(rng.uniform(*BIT_RANGE, n_bits).astype(np.float32)[:, None, None] * image, cells)
