"""Simulated registered stack with molecules at random positions, as used in the benchmarks of the decoders."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.errors import InputError
from merfish.simulate.disturbances import heat_pixels, leak_light, leak_shares
from merfish.simulate.glow import draw_glow
from merfish.simulate.optics import Imaging, draw_bits, draw_brightness, expose, pack_bits, photons, show_bits

ABUNDANCE_SIGMA = 1.0  # of the logarithm of the abundances of genes
COLORS = 2  # of each round, for bleed-through and carry-over
HOT_COUNTS = (1e3, 3e4)  # camera counts that are added to hot pixels
_BORDER = 8  # pixels; width of the region around the field whose molecules contribute light to it


def simulate_stack(
    codebook: Codebook,
    shape: tuple[int, int] = (512, 512),
    *,
    density: float = 0.01,
    seed: int = 0,
    n_planes: int = 1,
    imaging: Imaging | None = None,
    bit_shift: float = 0.0,
    bit_stretch: float = 0.0,
    hot_pixels: int = 0,
    glow: float = 0.0,
    bleed_through: float = 0.0,
    carry_over: float = 0.0,
    abundance: np.ndarray | None = None,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Render a raw, registered stack of molecules at random positions, and return its truth.

    Molecules are uniformly distributed over the field and a border of 8 pixels, at sub-pixel positions. Their genes are
    drawn from the words that are not blank, with lognormal abundances (sigma 1) or ``abundance`` (gene,), in codebook
    order. imaging: errors, optics, camera. bit_shift: sigma of the residual shift of each bit along each axis, pixels.
    bit_stretch: sigma, at the border of the field along each axis, of an additional shift that is linear in the
    position, pixels. glow: autofluorescence of cells, photons per pixel; molecules are then only in cells. hot_pixels:
    number of pixels of each bit that are 1,000 to 30,000 counts too bright. bleed_through: share of a spot's light that
    also appears in the other bit of its round; carry_over: in the bit two further on, of the same colour in the next
    round. The first two bits are one round, and so on.

    shape: (y, x). density: molecules per pixel and plane. n_planes: number of z planes; with several, molecules lie
    between z = -0.5 and n_planes - 0.5.

    Returns the stack, uint16 (bit, y, x), or (bit, z, y, x) with several planes; and the truth, one row for
    each molecule whose centre is inside the field (the others only contribute light): barcode_id int32, gene, is_blank,
    x, y, z float64 in pixels (z: planes), brightness, and shown, uint64, the bits that are on, the
    first least significant.

    Raises InputError for a codebook of blanks only, a negative density, or a shape that is not positive.
    """
    imaging = imaging or Imaging()
    genes = np.flatnonzero(~codebook.is_blank)
    if not len(genes):
        raise InputError("the codebook has only blanks: no gene can be simulated")
    if min(*shape, n_planes) < 1 or not density >= 0:
        raise InputError(
            f"shape and planes must be positive, and density not negative; got {shape}, {n_planes} and {density}"
        )
    molecules, camera, disturbed = np.random.SeedSequence(seed).spawn(3)
    rng = np.random.default_rng(molecules)
    sigma, peak = draw_bits(imaging, codebook.n_bits, rng)
    usual = rng.lognormal(0.0, ABUNDANCE_SIGMA, len(genes))
    abundance = usual if abundance is None else np.asarray(abundance, float)
    height, width = shape
    number = round(density * (height + 2 * _BORDER) * (width + 2 * _BORDER) * n_planes)
    y = rng.uniform(-0.5 - _BORDER, height - 0.5 + _BORDER, number)
    x = rng.uniform(-0.5 - _BORDER, width - 0.5 + _BORDER, number)
    z = rng.uniform(-0.5, n_planes - 0.5, number) if n_planes > 1 else np.zeros(number)
    word = rng.choice(genes, number, p=abundance / abundance.sum())
    shown = show_bits(codebook.words[word], imaging.lost, imaging.gained, rng)
    brightness, bit_brightness = draw_brightness(imaging, shown, rng)
    other = np.random.default_rng(disturbed)
    shift = bit_shift * other.standard_normal((2, codebook.n_bits, 1))
    if bit_stretch:
        off_centre = np.stack([2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1])
        shift = shift + bit_stretch * other.standard_normal((2, codebook.n_bits, 2)) @ off_centre
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    cells = draw_glow(codebook.n_bits, shape, glow, other) if glow else None
    if cells is not None:
        rows, columns = (np.clip(np.rint(at).astype(int), 0, n - 1) for at, n in zip((y, x), shape, strict=True))
        inside &= cells.cells[rows, columns]
        bit_brightness = np.where(inside[:, None], bit_brightness, 0.0)
    bit = np.arange(codebook.n_bits)
    shares = leak_shares(bit // COLORS, bit % COLORS, bleed_through, carry_over)
    if shares.any():
        bit_brightness = leak_light(bit_brightness, peak * sigma**2, shares)
    expected = photons(y + shift[0], x + shift[1], z, bit_brightness, sigma, peak, (n_planes, height, width), imaging)
    if cells is not None:
        expected += cells.light[:, None]
    stack = expose(expected, imaging, camera)
    if hot_pixels:
        for frames in stack:
            counts = np.exp(np.log(HOT_COUNTS[0]) + np.log(HOT_COUNTS[1] / HOT_COUNTS[0]) * other.random(hot_pixels))
            heat_pixels(frames, other.integers(0, shape, (hot_pixels, 2)), counts.astype(int))
    truth = pd.DataFrame(
        {
            "barcode_id": word.astype(np.int32),
            "gene": np.array(codebook.names, dtype=object)[word],
            "is_blank": np.zeros(number, bool),
            "x": x,
            "y": y,
            "z": z,
            "brightness": brightness,
            "shown": pack_bits(shown),
        }
    )
    return stack[:, 0] if n_planes == 1 else stack, truth[inside].reset_index(drop=True)
