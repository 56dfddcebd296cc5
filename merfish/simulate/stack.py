"""One registered stack with molecules at random positions, as used in the benchmarks of the decoders."""

from __future__ import annotations

import numpy as np
import pandas as pd

from merfish.codebook import Codebook
from merfish.errors import InputError
from merfish.simulate.disturbances import leak_light, leak_shares
from merfish.simulate.glow import draw_glow
from merfish.simulate.optics import Imaging, draw_bits, draw_brightness, expose, pack_bits, photons, show_bits

ABUNDANCE_SIGMA = 1.0
COLORS = 2  # of each round, for bleed-through and carry-over
_BORDER = 8  # pixels beyond the field in which molecules still contribute light to it


def simulate_stack(
    codebook: Codebook,
    shape: tuple[int, int] = (512, 512),
    *,
    density: float = 0.01,
    seed: int = 0,
    n_planes: int = 1,
    imaging: Imaging | None = None,
    bit_shift: float = 0.0,
    glow: float = 0.0,
    bleed_through: float = 0.0,
    carry_over: float = 0.0,
    abundance: np.ndarray | None = None,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Render a raw, registered stack of molecules at random positions, and return its truth.

    Molecules lie uniformly over the field and a little beyond it, at sub-pixel positions; their genes are drawn
    with lognormal abundance (sigma 1) from the words that are not blank, or with ``abundance`` (gene,), in the order of
    the codebook. ``imaging``: errors, optics, camera. ``bit_shift``: sigma of the shift of each bit along each axis,
    pixels, that remains after registration. ``glow``: autofluorescence of cells, photons per pixel; molecules are
    then only in cells. ``bleed_through``: share of a spot's light that also appears in the other bit of its round;
    ``carry_over``: in the bit two further on, which is of the same colour in the next round. The first two bits are
    one round, and so on.

    shape: (y, x). density: molecules per pixel (of each plane). n_planes: z planes; molecules then lie between
    z = -0.5 and n_planes - 0.5.

    Returns the stack, uint16 (bit, y, x), or (bit, z, y, x) with several planes; and the truth, one row for
    each molecule whose centre is inside the field (the others only contribute light): barcode_id int32, gene, is_blank,
    x, y, z float64 in pixels (z: planes), brightness, and shown, uint64, the bits that are on, the
    first least significant.

    Raises InputError for a codebook of blanks only, or a density or shape that is not positive.
    """
    imaging = imaging or Imaging()
    genes = np.flatnonzero(~codebook.is_blank)
    if not len(genes):
        raise InputError("the codebook has only blanks: no gene can be simulated")
    if min(*shape, n_planes) < 1 or not density >= 0:
        raise InputError(f"shape, planes and density must be positive, got {shape}, {n_planes} and {density}")
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
