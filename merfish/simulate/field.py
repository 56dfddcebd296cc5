"""Images of one field of view as recorded by the camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from merfish.simulate._kernels import add_spot
from merfish.simulate.disturbances import Disturbances, add_haze, heat_pixels, illumination, leak_light, leak_shares
from merfish.simulate.optics import Imaging, expose, photons
from merfish.simulate.tissue import NUCLEUS_HEIGHT, Tissue

MICRONS_PER_PIXEL = 0.108
STAIN_BACKGROUND = 60.0  # photons per pixel
DAPI_LIGHT = 500.0  # photons per pixel of nucleus
POLYT_LIGHT = 350.0  # photons per pixel of cytoplasm
STAIN_BLUR = 2.0  # sigma, pixels
GRAIN_SIGMA = 4.0  # pixels
N_GRAINS = (8, 20)  # grains per nucleus and per cell
STAIN_AXIAL_BLUR = 0.8  # sigma along z of stains in several layers, micrometre; a real PSF is narrower with wider tails
BEAD_SIGMA = 1.4  # pixels
BEAD_LIGHT = 3000.0  # photons at the centre of a bead
BEAD_DENSITY = 1.5e-4  # beads per pixel


@dataclass(frozen=True, eq=False)
class Plan:
    """True geometry and optics of the imaging. Positions are of the centre of the first pixel, micrometre.

    shape: (y, x). nominal, actual: (fov, 2) x, y, recorded and true positions.
    drift: (fov, round, 2) dy, dx in pixels; the round of the stains is last.
    sigma, peak, round_of_bit, color_of_bit: (bit,). chromatic: (color, 2, 3), affine maps of (y, x, 1).
    hot_pixels: (pixel, 2) y, x.
    """

    shape: tuple[int, int]
    n_planes: int
    nominal: np.ndarray
    actual: np.ndarray
    drift: np.ndarray
    sigma: np.ndarray
    peak: np.ndarray
    round_of_bit: np.ndarray
    color_of_bit: np.ndarray
    chromatic: np.ndarray
    hot_pixels: np.ndarray
    imaging: Imaging
    disturbances: Disturbances

    def pixels(self, fov: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Convert positions (micrometre) to pixels x, y in a field, without drift."""
        x0, y0 = self.actual[fov]
        return (x - x0) / MICRONS_PER_PIXEL, (y - y0) / MICRONS_PER_PIXEL

    def near(self, fov: int, x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
        """Rows of the positions (micrometre) that are within ``reach`` pixels of the field."""
        px, py = self.pixels(fov, x, y)
        height, width = self.shape
        return np.flatnonzero((px > -reach) & (px < width + reach) & (py > -reach) & (py < height + reach))


@dataclass(frozen=True, eq=False)
class Scene:
    """Imaged objects: molecules (x, y, z in micrometres, brightness by bit), beads, tissue."""

    molecules: pd.DataFrame
    bit_brightness: np.ndarray  # (molecule, bit), 0 = dark
    beads: np.ndarray  # (bead, 3): x, y, light
    bead_moves: np.ndarray  # (round, bead, 2): x, y in pixels, of loose beads
    tissue: Tissue
    stain_light: np.ndarray  # as from `draw_stains`
    grains: np.ndarray


def field_counts(
    plan: Plan, scene: Scene, fov: int, seed: np.random.SeedSequence
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Camera counts uint16 of a field: bits (bit, z, y, x), beads (round, y, x), stains (stain, z, y, x)."""
    wrong, imaging = plan.disturbances, plan.imaging
    bits = _bits(plan, scene, fov)
    beads = _beads(plan, scene, fov)
    stains = _stain_planes(plan, scene, fov)
    groups = [image.reshape(-1, *plan.shape) for image in (bits, beads, stains)]
    light = np.concatenate(groups)
    light *= illumination(plan.shape, wrong.vignetting)
    if fov == wrong.saturated_fov:
        light *= 300.0  # beyond the full range of the camera
    counts = expose(light, imaging, seed)
    heat_pixels(counts, plan.hot_pixels)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    first, second, third = np.split(counts, ends)
    return first.reshape(bits.shape), second, third.reshape(stains.shape)


def _bits(plan: Plan, scene: Scene, fov: int) -> np.ndarray:
    imaging, wrong = plan.imaging, plan.disturbances
    table = scene.molecules
    reach = 10.0 + np.abs(plan.drift[fov]).max() + wrong.chromatic
    rows = plan.near(fov, table["x"].to_numpy(), table["y"].to_numpy(), reach)
    px, py = plan.pixels(fov, table["x"].to_numpy()[rows], table["y"].to_numpy()[rows])
    place = plan.drift[fov, plan.round_of_bit][:, :, None] + np.stack([py, px])  # (bit, yx, molecule)
    maps = plan.chromatic[plan.color_of_bit]  # (bit, 2, 3)
    place = maps[:, :, :2] @ place + maps[:, :, 2:]
    peak = plan.peak * (1.0 - wrong.bleaching) ** plan.round_of_bit
    if wrong.dead_bit is not None:
        peak = np.where(np.arange(len(peak)) == wrong.dead_bit, 0.0, peak)
    z = table["z"].to_numpy()[rows] / imaging.plane_step
    brightness = scene.bit_brightness[rows]
    shares = leak_shares(plan.round_of_bit, plan.color_of_bit, wrong.bleed_through, wrong.carry_over)
    if shares.any():
        brightness = leak_light(brightness, peak * plan.sigma**2, shares)
    light = photons(
        place[:, 0], place[:, 1], z, brightness, plan.sigma, peak,
        (plan.n_planes, *plan.shape), imaging,
    )  # fmt: skip
    if wrong.haze:
        add_haze(light, imaging.background, wrong.haze)
    return light


def _beads(plan: Plan, scene: Scene, fov: int) -> np.ndarray:
    drift = plan.drift[fov]
    image = np.full((len(drift), *plan.shape), plan.imaging.background, np.float32)
    rows = plan.near(fov, scene.beads[:, 0], scene.beads[:, 1], 100.0 + np.abs(drift).max())
    px, py = plan.pixels(fov, scene.beads[rows, 0], scene.beads[rows, 1])
    flux = scene.beads[rows, 2] * 2.0 * np.pi * BEAD_SIGMA**2
    for frame, wander, (dy, dx) in zip(image, scene.bead_moves[:, rows], drift, strict=True):
        for x, y, light in zip(px + wander[:, 0] + dx, py + wander[:, 1] + dy, flux, strict=True):
            add_spot(frame, y, x, light, BEAD_SIGMA)
        if plan.disturbances.autofluorescence:
            cells = _paint(plan, scene.tissue.outlines, np.ones(len(scene.tissue.outlines)), fov, dy, dx)
            frame += plan.disturbances.autofluorescence * gaussian_filter(cells, 2.0 * STAIN_BLUR)
    return image


def draw_beads(
    bounds: tuple[float, float, float, float], n_rounds: int, loose: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw beads (bead, 3) as x, y (micrometre) and photons, and displacements (round, bead, 2) x, y in pixels."""
    x0, y0, x1, y1 = bounds
    n = round(BEAD_DENSITY * (x1 - x0) * (y1 - y0) / MICRONS_PER_PIXEL**2)
    light = BEAD_LIGHT * np.exp(rng.normal(0.0, 0.3, n))
    beads = np.column_stack([rng.uniform(x0, x1, n), rng.uniform(y0, y1, n), light])
    gone = rng.random((n_rounds, n, 1)) < loose
    gone[0] = False
    return beads, gone * rng.normal(0.0, 20.0, (n_rounds, n, 2))


def draw_stains(tissue: Tissue, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the light (stain, cell) of each nucleus and cell, photons per pixel, and grains in them (grain, 4).

    The columns of a grain are stain, x, y (micrometre) and total photons. Grains are texture at the same position in
    all fields that contain it.
    """
    n = len(tissue.outlines)
    light = np.array([[DAPI_LIGHT], [POLYT_LIGHT]]) * np.exp(rng.normal(0.0, 0.25, (2, n)))
    grains = []
    for stain, (shapes, number) in enumerate(zip((tissue.nuclei, tissue.outlines), N_GRAINS, strict=True)):
        spread = np.sqrt(shapely.area(shapes))[:, None, None] * rng.normal(0.0, 0.25, (n, number, 2))
        place = shapely.get_coordinates(shapely.centroid(shapes))[:, None, :] + spread
        flux = light[stain][:, None] * rng.uniform(0.1, 0.4, (n, number)) * 2.0 * np.pi * GRAIN_SIGMA**2
        grains.append(np.dstack([np.full((n, number), stain), place, flux]).reshape(-1, 4))
    return light, np.concatenate(grains)


def _stain_planes(plan: Plan, scene: Scene, fov: int) -> np.ndarray:
    """DAPI and polyT (2, z, y, x), photons; the same in all planes unless there are several layers of cells."""
    tissue, step = scene.tissue, plan.imaging.plane_step
    if tissue.n_layers == 1:
        every = np.ones((2, len(tissue.outlines)), bool)
        return np.repeat(_stains(plan, scene, fov, every)[:, None], plan.n_planes, axis=1)
    low, high = tissue.span((plan.n_planes - 1) * step)
    reach = np.array([[NUCLEUS_HEIGHT], [1.0]]) * (high - low) / 2
    planes = [_stains(plan, scene, fov, np.abs(z * step - (low + high) / 2) <= reach) for z in range(plan.n_planes)]
    return gaussian_filter1d(np.stack(planes, axis=1), STAIN_AXIAL_BLUR / step, axis=1, mode="nearest")


def _stains(plan: Plan, scene: Scene, fov: int, there: np.ndarray) -> np.ndarray:
    """DAPI and polyT (2, y, x), photons. The nucleus contains less messenger RNA than the cytoplasm.

    there: (2, cell) bool, whether the plane intersects the nucleus and the cell.
    """
    dy, dx = plan.drift[fov, -1]
    tissue = scene.tissue
    light = scene.stain_light * there
    dapi = _paint(plan, tissue.nuclei, light[0], fov, dy, dx)
    polyt = _paint(plan, tissue.outlines, light[1], fov, dy, dx)
    polyt -= _paint(plan, tissue.nuclei, 0.4 * light[1] * there[0], fov, dy, dx)
    image = np.stack([gaussian_filter(dapi, STAIN_BLUR), gaussian_filter(polyt, STAIN_BLUR)])
    image += STAIN_BACKGROUND
    grains = scene.grains[np.concatenate([np.repeat(*pair) for pair in zip(there, N_GRAINS, strict=True)])]
    grains = grains[plan.near(fov, grains[:, 1], grains[:, 2], 30.0)]
    px, py = plan.pixels(fov, grains[:, 1], grains[:, 2])
    for stain, x, y, flux in zip(grains[:, 0], px + dx, py + dy, grains[:, 3], strict=True):
        add_spot(image[int(stain)], y, x, flux, GRAIN_SIGMA)
    return image


def _paint(plan: Plan, shapes: np.ndarray, light: np.ndarray, fov: int, dy: float, dx: float) -> np.ndarray:
    """Image (y, x) float32 with ``light`` added within each shape (micrometre), shifted by the drift (pixels)."""
    from skimage.draw import polygon

    image = np.zeros(plan.shape, np.float32)
    center = shapely.get_coordinates(shapely.centroid(shapes))
    for row in plan.near(fov, center[:, 0], center[:, 1], 200.0):
        if shapes[row].is_empty:
            continue
        corners = shapely.get_coordinates(shapely.get_exterior_ring(shapes[row]))
        px, py = plan.pixels(fov, corners[:, 0], corners[:, 1])
        image[polygon(py + dy, px + dx, plan.shape)] += light[row]
    return image
