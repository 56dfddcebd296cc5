"""Images of molecules: bit errors, brightness, blur and camera noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from merfish._jit import in_parts
from merfish.simulate._kernels import render_spots


@dataclass(frozen=True)
class Imaging:
    """Chemistry, optics and camera of a simulated experiment. Lengths in pixels, light in photons.

    psf_sigma: range from which the PSF width of each bit is drawn. psf_ratio: width along y relative to that along x,
    whose geometric mean is the PSF width. peak: photons per pixel at the centre of a
    spot of brightness 1, before integration over pixels. background: photons per pixel.
    Counts are camera_offset + camera_gain * Poisson(photons) + read_noise * N(0, 1), rounded, within uint16.
    molecule_spread, bit_spread: sigma of the lognormal brightness of molecules, and of their bits relative to it.
    bit_ratio: largest ratio of the brightness of two bits, which is log-uniform.
    lost, gained: probability that an on-bit is dark and that an off-bit is bright, for each molecule and bit; one
    number, or one for each bit.
    plane_step: distance between z planes, micrometre. focal_range: distance from focus, micrometre, at which
    a spot is sqrt(2) wider.
    """

    psf_sigma: tuple[float, float] = (1.2, 1.5)
    psf_ratio: float = 1.0
    peak: float = 400.0
    background: float = 100.0
    camera_offset: float = 100.0
    camera_gain: float = 1.0
    read_noise: float = 5.0
    molecule_spread: float = 0.3
    bit_spread: float = 0.15
    bit_ratio: float = 2.0
    lost: float | tuple[float, ...] = 0.10
    gained: float | tuple[float, ...] = 0.04
    plane_step: float = 1.5
    focal_range: float = 0.6


def show_bits(
    words: np.ndarray, lost: float | tuple[float, ...], gained: float | tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Draw the bits that are on, (molecule, bit) bool: ``words`` (molecule, bit) with both types of error."""
    chance = rng.random(words.shape)
    return np.where(words == 1, chance >= np.asarray(lost), chance < np.asarray(gained))


def pack_bits(shown: np.ndarray) -> np.ndarray:
    """Pack bits (molecule, bit) bool into (molecule,) uint64, the first bit least significant."""
    return shown.astype(np.uint64) @ (np.uint64(1) << np.arange(shown.shape[1], dtype=np.uint64))


def draw_bits(imaging: Imaging, n_bits: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw PSF sigma (bit,) in pixels and peak (bit,) in photons of each bit."""
    sigma = rng.uniform(*imaging.psf_sigma, n_bits)
    peak = imaging.peak * imaging.bit_ratio ** rng.uniform(-0.5, 0.5, n_bits)
    return sigma, peak


def draw_brightness(imaging: Imaging, shown: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the brightness of molecules (molecule,), median 1, and of their bits (molecule, bit), 0 = dark."""
    molecule = np.exp(rng.normal(0.0, imaging.molecule_spread, len(shown)))
    bits = molecule[:, None] * np.exp(rng.normal(0.0, imaging.bit_spread, shown.shape))
    return molecule, np.where(shown, bits, 0.0)


def photons(
    y: np.ndarray, x: np.ndarray, z: np.ndarray, brightness: np.ndarray, sigma: np.ndarray, peak: np.ndarray,
    shape: tuple[int, int, int], imaging: Imaging,
) -> np.ndarray:  # fmt: skip
    """Expected photons (bit, z, y, x) float32 of background and molecules.

    y, x (bit, molecule) or (molecule,) pixels; z (molecule,) plane index; brightness (molecule, bit);
    sigma, peak (bit,) as from `draw_bits`; shape (z, y, x).
    """
    n_bits = len(sigma)
    image = np.full((n_bits, *shape), imaging.background, np.float32)
    flux = np.ascontiguousarray((brightness * (peak * 2.0 * np.pi * sigma**2)).T)
    places = [np.ascontiguousarray(np.broadcast_to(a, flux.shape), dtype=np.float64) for a in (y, x)]
    focal_range = imaging.focal_range / imaging.plane_step
    spots = *places, np.asarray(z, np.float64), flux, sigma, imaging.psf_ratio, focal_range
    in_parts(lambda first, last: render_spots(first, last, *spots, image), n_bits)
    return image


def expose(expected: np.ndarray, imaging: Imaging, seed: np.random.SeedSequence) -> np.ndarray:
    """Draw camera counts uint16 for ``expected`` photons (frame, ...); each frame has its own random stream."""
    counts = np.empty(expected.shape, np.uint16)

    def one(frame: int, stream: np.random.SeedSequence) -> None:
        rng = np.random.Generator(np.random.SFC64(stream))
        light = draw_photons(expected[frame], rng)
        light *= np.float32(imaging.camera_gain)
        light += np.float32(imaging.read_noise) * rng.standard_normal(light.shape, np.float32)
        light += np.float32(imaging.camera_offset)
        np.clip(np.rint(light, out=light), 0, 65535, out=light)
        counts[frame] = light

    with ThreadPoolExecutor(2) as threads:  # numpy releases the GIL while it draws
        list(threads.map(one, range(len(expected)), seed.spawn(len(expected))))
    return counts


def draw_photons(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw Poisson random numbers, float32, for ``expected`` photons of any shape.

    Above 16 photons the Cornish-Fisher expansion of a normal z is used, lambda + sqrt(lambda) z + (z^2 - 1) / 6 +
    (z - z^3) / (72 sqrt(lambda)), which has the Poisson mean, variance and skewness: it takes a seventh of the time of
    an exact draw, and differs from it by less than the rounding of the camera.
    """
    light = np.asarray(expected, np.float32)
    z = rng.standard_normal(light.shape, np.float32)
    root = np.sqrt(np.maximum(light, np.float32(1.0)))
    square = z * z
    drawn = (square - np.float32(1.0)) * np.float32(1 / 6)
    drawn += light
    drawn += z * (root + (np.float32(1.0) - square) * np.float32(1 / 72) / root)
    dim = light <= 16.0
    if dim.any():
        drawn[dim] = rng.poisson(light[dim])
    return drawn
