"""Position of a molecule between planes, from its brightness in its brightest plane and in the two adjacent ones."""

from __future__ import annotations

import numpy as np

# relative to a molecule's height; smaller values are noise and residuals of neighbours. Positions of simulated
# molecules are the same with 0.015 to 0.03; with 0.06 the median error is 0.03 planes larger.
LEAST_LIGHT = 0.03


def depth(light: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Position z in planes, interpolated between the centres of the two adjacent planes.

    Out of focus, a spot widens like a Gaussian beam, so that its height after a band-pass falls approximately as
    1 / (1 + (dz / f)^2)^2, with focal range f: height^-1/2 is a parabola, whose minimum follows from three planes for
    any f. A missing plane is treated as dark.

    light: (molecule, 3) float, height in the plane below, in ``plane`` and in the plane above, relative to a typical
    molecule, NaN without a plane. plane: (molecule,) int. Returns (molecule,) float32.
    """
    below, own, above = (np.maximum(np.nan_to_num(light), LEAST_LIGHT) ** -0.5).T
    curvature = below - 2 * own + above
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.where(curvature > 0, 0.5 * (below - above) / curvature, 0.0)
    shift = np.clip(shift, np.where(np.isnan(light[:, 0]), 0.0, -1.0), np.where(np.isnan(light[:, 2]), 0.0, 1.0))
    return (plane + shift).astype(np.float32)
