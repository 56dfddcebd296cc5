"""Drift of each imaging round against a reference round, and resampling of images to undo it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy import ndimage, spatial, special

from merfish.errors import InputError
from merfish.imaging._kernels import TAPS, remove_hot_pixels, shift_planes

MAX_DRIFT = 40.0  # pixel, along y and along x
# Beads are sought as blobs of this sigma in the image and in copies binned 2 x 2 and 4 x 4: sharp beads in the
# first, rings of beads out of focus in the last.
_BLOB_SIGMA = 1.5
_LEVELS = 3
_DETECTION = 6.0  # height of a blob over the noise
_MAX_BLOBS = 4000
# A drift is believed if chance would bring so many blobs together less often than this.
_CHANCE = 1e-4
_MIN_MATCHES = 3


def measure_drift(images: np.ndarray, reference: int = 0, max_drift: float = MAX_DRIFT) -> pd.DataFrame:
    """Measure how far each round has drifted from a reference round, from images of the same beads.

    images: (round, y, x), any real dtype; images of molecules or stains serve as well if rounds share enough of them.
    Blobs are located in each image at three scales; the shift that brings most of them together, of all up to
    ``max_drift`` px along y and x, is refined to the robust mean of the displacements of the pairs.

    Returns one row a round: round; dy, dx (pixel: what is at (y, x) in the reference is at (y + dy, x + dx) in this
    round; NaN if not ok); quality (share of the reference's blobs found again, 0 to 1); beads (pairs that agree);
    error (pixel, standard error of the drift); ok (whether chance is excluded as the reason of the agreement).

    Raises InputError if ``images`` is not (round, y, x), not finite, or has no round ``reference``.
    """
    images = np.asarray(images)
    if images.ndim != 3 or 0 in images.shape:
        raise InputError(f"bead images: expected (round, y, x), got an array of shape {images.shape}")
    if not 0 <= reference < len(images):
        raise InputError(f"reference: expected a round from 0 to {len(images) - 1}, got {reference}")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise InputError("bead images: expected finite values, got NaN or infinity")
    with ThreadPoolExecutor() as pool:  # SciPy's filters release the interpreter lock
        blobs = list(pool.map(locate_blobs, images))
    rows = []
    for number, found in enumerate(blobs):
        if number == reference:
            usable = len(images) == 1 or any(len(level) >= _MIN_MATCHES for level in found)
            rows.append((number, 0.0, 0.0, 1.0, max(map(len, found)), 0.0, usable))
        else:
            rows.append((number, *_best_match(blobs[reference], found, images.shape[1:], max_drift)))
    return pd.DataFrame(rows, columns=["round", "dy", "dx", "quality", "beads", "error", "ok"])


def locate_blobs(image: np.ndarray) -> list[np.ndarray]:
    """Centres of bright blobs in an image (y, x) at each of three scales: a list of (blob, 2) y, x in pixel."""
    level = np.empty(image.shape, np.float32)
    remove_hot_pixels(image, level)
    found = []
    for number in range(_LEVELS):
        scale = 2**number
        found.append((_blob_centers(level) + 0.5) * scale - 0.5)
        height, width = level.shape[0] // 2, level.shape[1] // 2
        if min(height, width) < 8:
            break
        level = level[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return found


def _blob_centers(image: np.ndarray) -> np.ndarray:
    """Sub-pixel maxima (blob, 2) of an image filtered for blobs of `_BLOB_SIGMA`, brightest first."""
    # Where to look is decided on square roots, whose noise is nearly the same in bright and dark places.
    rooted = _blob_filter(np.sqrt(image - image.min()))
    # Noise from the many pixels without beads, so that beads do not raise the bar; 1.4826 MAD = sigma.
    sample = rooted[:: max(1, image.shape[0] // 256)]
    noise = 1.4826 * np.median(np.abs(sample - np.median(sample)))
    peaks = (rooted == ndimage.maximum_filter(rooted, size=int(4 * _BLOB_SIGMA) | 1)) & (rooted > _DETECTION * noise)
    margin = int(np.ceil(2 * _BLOB_SIGMA))
    inner = np.zeros_like(peaks)
    inner[margin:-margin, margin:-margin] = True
    y, x = np.nonzero(peaks & inner)
    strongest = np.argsort(-rooted[y, x], kind="stable")[:_MAX_BLOBS]
    return _refine(_blob_filter(image), y[strongest], x[strongest])


def _blob_filter(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, _BLOB_SIGMA) - ndimage.gaussian_filter(image, 2 * _BLOB_SIGMA)


def _refine(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Top of the least-squares paraboloid over the 3 x 3 pixels around each maximum, at most 1 px away."""
    v, u = np.mgrid[-1:2, -1:2]
    patch = image[y[:, None, None] + v, x[:, None, None] + u].astype(np.float64)
    gy, gx = (patch * v).sum((1, 2)) / 6, (patch * u).sum((1, 2)) / 6
    hyy = (patch * (3 * v**2 - 2)).sum((1, 2)) / 3
    hxx = (patch * (3 * u**2 - 2)).sum((1, 2)) / 3
    hxy = (patch * v * u).sum((1, 2)) / 4
    det = hyy * hxx - hxy**2
    good = (det > 0) & (hyy < 0)
    det = np.where(good, det, 1)
    shift = np.stack([hxy * gx - hxx * gy, hxy * gy - hyy * gx], axis=1) / det[:, None]
    good &= (np.abs(shift) <= 1).all(axis=1)
    return (np.stack([y, x], axis=1) + shift)[good]


def _best_match(
    fixed: list[np.ndarray], moving: list[np.ndarray], shape: tuple[int, ...], max_drift: float
) -> tuple[float, float, float, int, float, bool]:
    """(dy, dx, quality, beads, error, ok) from the scale whose blobs tell the drift best."""
    best = (np.nan, np.nan, 0.0, 0, np.nan, False)
    for number, (a, b) in enumerate(zip(fixed, moving, strict=True)):
        match = _match(a, b, shape, max_drift, 2.0**number)
        if match[-1] and not (best[-1] and best[-2] <= match[-2]):
            best = match
    return best


def _match(
    fixed: np.ndarray, moving: np.ndarray, shape: tuple[int, ...], max_drift: float, scale: float
) -> tuple[float, float, float, int, float, bool]:
    failed = (np.nan, np.nan, 0.0, 0, np.nan, False)
    if min(len(fixed), len(moving)) < _MIN_MATCHES:
        return failed
    shift = _vote(fixed, moving, max_drift, scale)
    if shift is None:
        return failed
    for radius in (3.0 * scale, 1.5 * scale):
        pairs = _pairs(fixed + shift, moving, radius)
        if len(pairs) < _MIN_MATCHES:
            return failed
        shift = np.median(moving[pairs[:, 1]] - fixed[pairs[:, 0]], axis=0)
    steps = moving[pairs[:, 1]] - fixed[pairs[:, 0]]
    kept, spread = _agreeing(steps)
    count = int(kept.sum())
    if count < _MIN_MATCHES:
        return failed
    shift = steps[kept].mean(axis=0)
    error = spread / np.sqrt(count - 1)
    # How many pairs would chance bring within the same radius, at the best of all shifts tried?
    seen = _inside(fixed + shift, shape).sum(), _inside(moving - shift, shape).sum()
    area = np.prod(np.maximum(np.array(shape) - np.abs(shift), 1))
    radius = min(1.5 * scale, max(3 * spread, 0.3 * scale))
    by_chance = seen[0] * seen[1] * np.pi * radius**2 / area
    tries = max(1.0, (2 * max_drift) ** 2 / (np.pi * radius**2))
    ok = tries * special.gammainc(count, by_chance) < _CHANCE and np.abs(shift).max() <= max_drift
    if not ok:
        return failed
    return float(shift[0]), float(shift[1]), count / max(1, min(seen)), count, float(error), True


def _vote(fixed: np.ndarray, moving: np.ndarray, max_drift: float, scale: float) -> np.ndarray | None:
    """The shift (2,) that brings most blobs together, to about 1.5 ``scale``."""
    reach = max_drift + scale
    near = spatial.KDTree(fixed).sparse_distance_matrix(spatial.KDTree(moving), reach, p=np.inf, output_type="ndarray")
    if not len(near):
        return None
    steps = moving[near["j"]] - fixed[near["i"]]
    n_bins = 2 * int(np.ceil(reach / scale))
    bins = np.clip(((steps / scale) + n_bins / 2).astype(np.int64), 0, n_bins - 1)
    votes = np.bincount(bins[:, 0] * n_bins + bins[:, 1], minlength=n_bins**2).reshape(n_bins, n_bins)
    votes = ndimage.uniform_filter(votes.astype(np.float64), 3, mode="constant")
    best = np.array(np.unravel_index(np.argmax(votes), votes.shape))
    return (best + 0.5 - n_bins / 2) * scale


def _pairs(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Rows (pair, 2) of points that are each other's nearest and at most ``radius`` apart."""
    distance, to_b = spatial.KDTree(b).query(a, distance_upper_bound=radius)
    rows = np.flatnonzero(np.isfinite(distance))
    _, to_a = spatial.KDTree(a).query(b[to_b[rows]])
    mutual = to_a == rows
    return np.stack([rows[mutual], to_b[rows][mutual]], axis=1)


def _agreeing(steps: np.ndarray) -> tuple[np.ndarray, float]:
    """Which displacements (pair, 2) agree with most others, and their spread (sigma along one axis, pixel)."""
    kept = np.ones(len(steps), dtype=bool)
    spread = 0.0
    for _ in range(5):
        off = np.abs(steps - np.median(steps[kept], axis=0))
        # 1.4826 MAD = sigma; the floor keeps a few pairs that agree by luck from throwing out all others
        spread = max(1.4826 * float(np.median(off[kept])), 0.02)
        kept = (off < 3 * spread).all(axis=1)
        if kept.sum() < _MIN_MATCHES:
            break
    return kept, spread


def _inside(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return ((points >= 0) & (points <= np.array(shape) - 1)).all(axis=1)


def align(images: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo drift: resample each image at (y + dy, x + dx), by cubic splines.

    images: (image, y, x) or (image, z, y, x), any real dtype; shifts: (image, 2) dy, dx in pixel, as `measure_drift`
    gives them. Shifts by whole pixels copy values exactly.

    Returns the aligned images, float32 of the same shape, and where all of them were seen, bool (y, x): elsewhere
    some image shows only a mirrored edge, not the sample.

    Raises InputError if shapes do not fit or a shift is not finite.
    """
    images, shifts = np.asarray(images), np.asarray(shifts, dtype=np.float64)
    if images.ndim not in (3, 4) or shifts.shape != (len(images), 2):
        raise InputError(
            f"expected images (image, y, x) or (image, z, y, x) and shifts (image, 2), "
            f"got {images.shape} and {shifts.shape}"
        )
    if not np.isfinite(shifts).all():
        raise InputError(f"shifts: expected finite pixels, got {shifts.tolist()}")
    per_image = int(np.prod(images.shape[1:-2], dtype=np.int64))
    whole = np.floor(shifts)
    starts = np.repeat(whole.astype(np.int64) - (TAPS // 2 - 1), per_image, axis=0)
    taps = np.repeat(spline_taps(shifts - whole), per_image, axis=0)
    out = np.empty(images.shape, np.float32)
    planes = images.reshape(-1, *images.shape[-2:])
    shift_planes(planes, starts, taps[:, 0], taps[:, 1], out.reshape(planes.shape))
    return out, seen_by_all(shifts, images.shape[-2:])


def seen_by_all(shifts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bool (y, x): pixels whose place in every image, shifted by (image, 2) dy, dx, is within it."""
    low, high = shifts.min(axis=0), shifts.max(axis=0)
    rows, columns = np.arange(shape[0]), np.arange(shape[1])
    seen_y = (rows + low[0] >= 0) & (rows + high[0] <= shape[0] - 1)
    seen_x = (columns + low[1] >= 0) & (columns + high[1] <= shape[1] - 1)
    return np.logical_and.outer(seen_y, seen_x)


def spline_taps(fraction: np.ndarray) -> np.ndarray:
    """Weights (..., TAPS) float32 of the pixels around a place ``fraction`` (..., 0 to 1) beyond tap TAPS // 2 - 1.

    They are the cardinal cubic spline (Unser 1999, IEEE Signal Process. Mag. 16:22): the B-spline convolved with the
    inverse of its samples, sqrt(3) z^|k| with z = sqrt(3) - 2, cut after 8 pixels where it has fallen to 3e-5.
    """
    place = np.arange(TAPS) - (TAPS // 2 - 1)
    z = np.sqrt(3.0) - 2.0
    k = np.arange(-TAPS, TAPS + 1)
    inverse = np.sqrt(3.0) * z ** np.abs(k)
    distance = np.abs(np.asarray(fraction)[..., None, None] - place[:, None] - k)
    spline = np.where(
        distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.where(distance < 2, (2 - distance) ** 3 / 6, 0)
    )
    weights = (spline * inverse).sum(axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
