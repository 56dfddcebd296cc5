"""Where a molecule lies between planes, from its light in the plane that shows it best and in the two beside it."""

from __future__ import annotations

import numpy as np

LIGHT_RADIUS = 0.75  # sigmas of the PSF; a molecule's peak in the next plane lies nearer than this to its place
# molecules' height; below it light is noise and what neighbours left. Simulated molecules are placed alike with 0.015
# to 0.03; with twice as much the median error is 0.03 planes larger.
LEAST_LIGHT = 0.03


def depth(light: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """z in planes, between the middles of the planes beside the molecule's own.

    A spot's width grows out of focus as that of a Gaussian beam, so after a band-pass its height falls about as
    1 / (1 + (dz / f)^2)^2, whatever the range of focus f: height^-1/2 is a parabola, whose lowest point three planes
    tell. A plane that is not there is taken as dark.

    light: (molecule, 3) float, below, in and above the plane, molecules' height, NaN where there is none.
    plane: (molecule,) int. Returns (molecule,) float32.
    """
    below, own, above = (np.maximum(np.nan_to_num(light), LEAST_LIGHT) ** -0.5).T
    curvature = below - 2 * own + above
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.where(curvature > 0, 0.5 * (below - above) / curvature, 0.0)
    shift = np.clip(shift, np.where(np.isnan(light[:, 0]), 0.0, -1.0), np.where(np.isnan(light[:, 2]), 0.0, 1.0))
    return (plane + shift).astype(np.float32)
