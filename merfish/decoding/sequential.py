"""Genes imaged one by one: every spot of the image is a molecule."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from merfish.decoding.peaks import fit_peaks
from merfish.decoding.psf import psf_sigma
from merfish.imaging.normalize import NoiseMap, peak_normalization

SPOT_SIGMAS = 6.0  # minimum height of a spot relative to the local noise, since no other bit confirms it
SPOT_HEIGHT = 0.2  # and relative to the height of a typical spot
SAME_SPOT = 1.5  # sigmas of the PSF; peaks of adjacent planes closer than this are one spot
SPOT_DTYPE = np.dtype([("x", "f4"), ("y", "f4"), ("z", "f4"), ("height", "f4")])


def find_molecules(planes: np.ndarray) -> np.ndarray:
    """Find the molecules of a gene that is imaged by itself.

    planes: (z, y, x) float32, band-passed. Returns `SPOT_DTYPE` (molecule,): x, y in pixels; z, the index of the plane
    in which the spot is brightest; height in units of a typical spot. A spot seen in adjacent planes counts once.
    """
    n_planes, height, width = planes.shape
    scale = peak_normalization(planes[None])
    if not scale.gain[0]:
        return np.empty(0, SPOT_DTYPE)
    image = ((planes - scale.background[0]) * scale.gain[0]).reshape(-1, width)
    sigma = psf_sigma(image[None], height)
    noise = NoiseMap.of(image, height)
    fit = fit_peaks(image, height, sigma)
    clear = fit.height > np.maximum(SPOT_HEIGHT, noise.level(fit.x, fit.y) + SPOT_SIGMAS * noise.sigma(fit.x, fit.y))
    spots = np.empty(int(clear.sum()), SPOT_DTYPE)
    plane = np.clip(np.rint(fit.y[clear]).astype(int) // height, 0, n_planes - 1)
    spots["x"], spots["y"], spots["z"] = fit.x[clear], fit.y[clear] - plane * height, plane
    spots["height"] = fit.height[clear]
    return spots[~brighter_beside(spots, SAME_SPOT * sigma)]


def brighter_beside(spots: np.ndarray, radius: float) -> np.ndarray:
    """Mark the spots, `SPOT_DTYPE`, with a brighter one within ``radius`` pixels in an adjacent plane; (spot,) bool."""
    place = np.column_stack([spots["x"], spots["y"]])
    worse = np.zeros(len(spots), bool)
    for plane in range(int(spots["z"].max(initial=0))):
        low, high = (np.flatnonzero(spots["z"] == plane + k) for k in (0, 1))
        pairs = cKDTree(place[low]).sparse_distance_matrix(cKDTree(place[high]), radius, output_type="ndarray")
        i, j = low[pairs["i"]], high[pairs["j"]]
        first = spots["height"][i] >= spots["height"][j]
        worse[i[~first]] = True
        worse[j[first]] = True
    return worse
