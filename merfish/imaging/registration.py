"""Drift of each imaging round relative to a reference round, and resampling of images to correct it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import ndimage, spatial, special

from merfish._jit import in_parts, map_bits
from merfish.errors import InputError
from merfish.imaging._kernels import ROWS, filter_strips, patch_sums, remove_hot_pixels, warp_rows
from merfish.imaging.preprocess import Bandpassed, filled_taps

MAX_DRIFT = 40.0  # pixel, along y and along x
# Beads are detected as blobs of this sigma in the image and in copies binned 2 x 2 and 4 x 4: sharp beads in the first,
# rings of out-of-focus beads in the last.
_BLOB_SIGMA = 1.5
_LEVELS = 3
_DETECTION = 6.0  # minimum height of a blob relative to the noise
_MAX_BLOBS = 4000
_PATCH_RADIUS = 5  # pixel, of a bead in the first level; twice as wide in the next
# A drift is accepted if so many blobs match by chance with a probability below this, if so many beads agree on it, and
# if its standard error (pixel) is not above this.
_LOG_CHANCE = np.log(1e-4)
_MIN_BEADS = 3
_MAX_ERROR = 0.3
_FLOOR = 0.02  # pixel; lower limit of the scatter of beads
_REFINEMENTS = 10
_CONVERGED = 0.002  # pixel
_TAPS = 16  # of the spline
_COLUMNS = ["round", "dy", "dx", "quality", "beads", "error", "ok"]


def measure_drift(images: np.ndarray, reference: int = 0, max_drift: float = MAX_DRIFT) -> pd.DataFrame:
    """Measure the drift of each round relative to a reference round, from images of the same beads.

    images: (round, y, x), any real dtype; images of molecules or stains can be used if rounds share enough of them.
    Blobs are located in each image at three scales; of all shifts up to ``max_drift`` px along y and x, the one that
    matches most of them is refined: the round is realigned, the remaining displacement of each blob is measured by
    least squares, and their robust mean is added, until it vanishes.

    Returns one row for each round: round; dy, dx (pixel: an object at (y, x) in the reference is at (y + dy, x + dx) in
    this round; NaN if not ok); quality (fraction of the reference's blobs that agree on the drift, 0 to 1); beads
    (their number); error (pixel, standard error of the drift); ok (the agreement is close and not by chance).

    Raises InputError if ``images`` is not (round, y, x), not finite, or has no round ``reference``.
    """
    images = np.asarray(images)
    if images.ndim != 3 or 0 in images.shape:
        raise InputError(f"bead images: expected (round, y, x), got an array of shape {images.shape}")
    if not 0 <= reference < len(images):
        raise InputError(f"reference: expected a round from 0 to {len(images) - 1}, got {reference}")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise InputError("bead images: expected finite values, got NaN or infinity")
    fixed = _cleaned(images[reference])
    blobs = locate_blobs(fixed)

    def one_round(number: int) -> tuple[int, float, float, float, int, float, bool]:
        if number == reference:
            usable = len(images) == 1 or max(map(len, blobs)) >= _MIN_BEADS
            return number, 0.0, 0.0, 1.0, max(map(len, blobs)), 0.0, usable
        drift = _measure_one(fixed, blobs, _cleaned(images[number]), max_drift)
        return (number, *drift, True) if drift else (number, np.nan, np.nan, 0.0, 0, np.nan, False)

    return pd.DataFrame(map_bits(one_round, range(len(images))), columns=_COLUMNS)


def measure_field_drift(beads: np.ndarray, bits: np.ndarray, round_of_bit: np.ndarray) -> pd.DataFrame:
    """Measure the drift of a field's rounds from its beads or, if that fails, from the molecules that rounds share.

    beads: (round, y, x), or (0, y, x) if none were imaged; bits: (bit, z, y, x); round_of_bit: (bit,) int.
    Returns the table of `measure_drift` with a column ``source``: "beads"; "bits", since each word has bits in several
    rounds; or "nothing", with drift 0, if no round contains any molecule.
    """
    drift = measure_drift(beads).assign(source="beads") if len(beads) else None
    if drift is not None and drift["ok"].all():
        return drift
    molecules = np.zeros((int(np.max(round_of_bit)) + 1, *bits.shape[-2:]), np.float32)
    for image, number in zip(bits, round_of_bit, strict=True):
        flat = image.max(axis=0).astype(np.float32)
        flat -= np.median(flat)
        # bits differ in brightness; the brightest 0.1 % of the pixels are molecules in any case
        flat /= max(float(np.quantile(flat, 0.999)), 1e-9)
        np.maximum(molecules[number], flat, out=molecules[number])
    from_bits = measure_drift(molecules).assign(source="bits")
    if not from_bits["ok"].any() and not any(len(level) for image in molecules for level in locate_blobs(image)):
        return from_bits.assign(dy=0.0, dx=0.0, error=np.nan, ok=True, source="nothing")
    if drift is None:
        return from_bits
    # Bits replace beads in single rounds only if the reference's beads were found, otherwise in all rounds.
    return drift.where(drift["ok"] & drift["ok"].iloc[0], from_bits)


def _measure_one(
    fixed: np.ndarray, blobs: list[np.ndarray], moving: np.ndarray, max_drift: float
) -> tuple[float, float, float, int, float] | None:
    """(dy, dx, quality, beads, error) of one round relative to the reference image and its blobs, None if it fails."""
    for _, level, shift, pairs in _coarse_matches(blobs, locate_blobs(moving), fixed.shape, max_drift):
        refined = _refine_drift(fixed, moving, shift, blobs[level][pairs], level)
        if refined is not None and np.abs(refined[0]).max() <= max_drift:
            shift, count, error = refined
            seen = _inside(blobs[level] + shift, fixed.shape).sum()
            return float(shift[0]), float(shift[1]), min(1.0, count / max(1, seen)), count, error
    return None


def _cleaned(image: np.ndarray) -> np.ndarray:
    out = np.empty(image.shape, np.float32)
    remove_hot_pixels(image, out)
    return out


def locate_blobs(image: np.ndarray) -> list[np.ndarray]:
    """Locate bright blobs in an image (y, x) float32: a list of (blob, 2) y, x in pixels, one for each of three scales.

    Accurate to a fraction of a blob's width: initial positions for `measure_drift`, not a localisation of molecules.
    """
    found = []
    for number in range(_LEVELS):
        scale = 2**number
        found.append((_blob_centers(image) + 0.5) * scale - 0.5)
        height, width = image.shape[0] // 2, image.shape[1] // 2
        if min(height, width) < 8:
            break
        image = image[: 2 * height, : 2 * width]
        image = (image[::2, ::2] + image[::2, 1::2] + image[1::2, ::2] + image[1::2, 1::2]) / 4
    return found


def _blob_centers(image: np.ndarray) -> np.ndarray:
    """Sub-pixel maxima (blob, 2) of an image filtered for blobs of `_BLOB_SIGMA`, brightest first."""
    # The square root has nearly the same noise in bright and dark regions.
    blobs = Bandpassed(np.sqrt(image - image.min())[None], smoothing=_BLOB_SIGMA, background=2 * _BLOB_SIGMA)[0]
    # Noise of most pixels, since beads are few: 1.4826 MAD = sigma.
    sample = blobs[tuple(slice(None, None, max(1, n // 256)) for n in blobs.shape)]
    threshold = max(_DETECTION * 1.4826 * np.median(np.abs(sample - np.median(sample))), 1e-3)
    margin = int(np.ceil(2 * _BLOB_SIGMA))
    y, x = np.nonzero(blobs[margin:-margin, margin:-margin] > threshold)
    y, x = y + margin, x + margin
    reach = int(2 * _BLOB_SIGMA)
    height = blobs[y, x]
    top = np.ones(len(y), dtype=bool)
    for v in range(-reach, reach + 1):
        for u in range(-reach, reach + 1):
            top &= height >= blobs[y + v, x + u]
    y, x, height = y[top], x[top], height[top]
    strongest = np.argsort(-height, kind="stable")[:_MAX_BLOBS]
    return paraboloid_tops(blobs, y[strongest], x[strongest])


def paraboloid_tops(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Maximum (peak, 2) of the least-squares paraboloid over 3 x 3 pixels around each peak, if within 1 px."""
    v, u = np.mgrid[-1:2, -1:2]
    patch = image[y[:, None, None] + v, x[:, None, None] + u].astype(np.float64)
    gy, gx = (patch * v).sum((1, 2)) / 6, (patch * u).sum((1, 2)) / 6
    hyy = (patch * (3 * v**2 - 2)).sum((1, 2)) / 3
    hxx = (patch * (3 * u**2 - 2)).sum((1, 2)) / 3
    hxy = (patch * v * u).sum((1, 2)) / 4
    det = hyy * hxx - hxy**2
    good = (det > 0) & (hyy < 0)
    shift = np.stack([hxy * gx - hxx * gy, hxy * gy - hyy * gx], axis=1) / np.where(good, det, 1)[:, None]
    good &= (np.abs(shift) <= 1).all(axis=1)
    return (np.stack([y, x], axis=1) + shift)[good]


def _coarse_matches(
    fixed: list[np.ndarray], moving: list[np.ndarray], shape: tuple[int, ...], max_drift: float
) -> list[tuple[float, int, np.ndarray, np.ndarray]]:
    """(log probability of chance, level, shift (2,), matched rows of that level's ``fixed``), least probable first.

    Matches that may be due to chance are excluded.
    """
    found = []
    for level, (a, b) in enumerate(zip(fixed, moving, strict=True)):
        scale = 2.0**level
        shift = _vote(a, b, max_drift, 1.5 * scale) if min(len(a), len(b)) >= _MIN_BEADS else None
        if shift is None:
            continue
        for radius in (1.5 * scale, 1.5 * scale, 0.75 * scale):
            pairs = _pairs(a + shift, b, radius)
            if len(pairs) < _MIN_BEADS:
                break
            shift = np.median(b[pairs[:, 1]] - a[pairs[:, 0]], axis=0)
            shifts = 2 * (2 * max_drift) ** 2 / (np.pi * radius**2)  # shifts tried, at two radii
            mean = _inside(a + shift, shape).sum() * _inside(b - shift, shape).sum() * np.pi * radius**2
            mean /= np.prod(np.maximum(np.array(shape) - np.abs(shift), 1))
            found.append((np.log(shifts) + _log_poisson_tail(len(pairs), mean), level, shift, pairs[:, 0]))
    return sorted((match for match in found if match[0] < _LOG_CHANCE), key=lambda match: match[0])


def _log_poisson_tail(count: int, mean: float) -> float:
    """Log of a tight upper bound on the probability that a Poisson variable of that mean is at least ``count``."""
    if count <= mean:
        return 0.0
    return float(count * np.log(max(mean, 1e-9)) - mean - special.gammaln(count + 1) - np.log1p(-mean / (count + 1)))


def _vote(fixed: np.ndarray, moving: np.ndarray, max_drift: float, scale: float) -> np.ndarray | None:
    """Shift (2,) that matches most blobs, to about ``scale``; None without pairs in reach."""
    reach = max_drift + scale
    near = spatial.KDTree(fixed).sparse_distance_matrix(spatial.KDTree(moving), reach, p=np.inf, output_type="ndarray")
    if not len(near):
        return None
    steps = moving[near["j"]] - fixed[near["i"]]
    n_bins = 2 * int(np.ceil(reach / scale))
    bins = np.clip(((steps / scale) + n_bins / 2).astype(np.int64), 0, n_bins - 1)
    votes = np.bincount(bins[:, 0] * n_bins + bins[:, 1], minlength=n_bins**2).reshape(n_bins, n_bins)
    around = ndimage.convolve(votes, np.ones((3, 3), np.int64), mode="constant")
    best = np.unravel_index(np.argmax(around), around.shape)
    here = (np.abs(bins - np.array(best)) <= 1).all(axis=1)
    return np.median(steps[here], axis=0)


def _pairs(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Rows (pair, 2) of points that are mutual nearest neighbours and at most ``radius`` apart."""
    distance, to_b = spatial.KDTree(b).query(a, distance_upper_bound=radius)
    rows = np.flatnonzero(np.isfinite(distance))
    _, to_a = spatial.KDTree(a).query(b[to_b[rows]])
    mutual = to_a == rows
    return np.stack([rows[mutual], to_b[rows][mutual]], axis=1)


def _inside(points: np.ndarray, shape: tuple[int, ...], margin: float = 0.0) -> np.ndarray:
    return np.asarray(((points >= margin) & (points <= np.array(shape) - 1 - margin)).all(axis=1))


def _refine_drift(
    fixed: np.ndarray, moving: np.ndarray, shift: np.ndarray, blobs: np.ndarray, level: int
) -> tuple[np.ndarray, int, float] | None:
    """Drift (2,), number of blobs (blob, 2) of ``fixed`` that agree on it, and its error; None if they do not agree."""
    centers, aligned = np.rint(blobs).astype(np.int64), np.empty((1, *moving.shape), np.float32)
    for _ in range(_REFINEMENTS):
        _translate(moving[None], shift, aligned, filter_planes_alone)
        size = np.array(fixed.shape)
        low, high = np.maximum(1, np.ceil(1 - shift)), np.minimum(size - 1, np.floor(size - 1 - shift))
        bounds = np.stack([low, high], axis=1).ravel().astype(np.int64)
        steps, variances = patch_steps(fixed, aligned[0], bounds, centers, _PATCH_RADIUS * 2**level)
        kept = _agreeing(steps)
        if kept.sum() < _MIN_BEADS:
            return None
        weight = 1 / (variances[kept] + _FLOOR**2)
        mean = weight @ steps[kept] / weight.sum()
        shift = shift + mean
        if np.abs(mean).max() < _CONVERGED:
            break
    off = steps[kept] - mean
    error = float(np.sqrt((weight**2 @ off**2).mean()) / weight.sum() * np.sqrt(len(off) / (len(off) - 1)))
    return (shift, len(off), error) if error <= _MAX_ERROR else None


def patch_steps(
    fixed: np.ndarray, moving: np.ndarray, bounds: np.ndarray, centers: np.ndarray, radius: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the displacement of each patch of ``moving`` (y, x) from the same patch of ``fixed``, by least squares.

    Within ``radius`` of each centre (patch, 2) int64, moving = gain * fixed + offset - gain * step . gradient, where
    the gradient is that of the mean of both images, so that the noise of neither biases the step towards 0. Valid for
    steps well below the width of the structure; repeat on the realigned image. Only pixels from bounds[0] to
    bounds[1] - 1 along y and from bounds[2] to bounds[3] - 1 along x are used; they must lie 1 px inside the images.
    Returns steps (patch, 2) y, x in pixels, and variances (patch,), of a step along one axis; NaN and inf if
    undetermined.
    """
    n = len(centers)
    normal, target, total, count = np.zeros((n, 4, 4)), np.zeros((n, 4)), np.zeros(n), np.zeros(n)
    patch_sums(fixed, moving, bounds, centers, radius, normal, target, total, count)
    scale = normal[:, 0, 0] * normal[:, 1, 1] * normal[:, 2, 2]
    known = (2 * count >= radius**2) & (scale > 0) & (np.linalg.det(normal) >= 1e-9 * scale * count)
    inverse = np.zeros((n, 4, 4))
    inverse[known] = np.linalg.inv(normal[known])
    solution = np.einsum("kij,kj->ki", inverse, target)
    gain = np.where(solution[:, 2] > 0, solution[:, 2], np.nan)
    factor = (1 + gain) / (2 * gain)  # the mean gradient is (1 + gain) / 2 that of fixed
    residual = np.maximum(total - (solution * target).sum(axis=1), 0) / np.maximum(count - 4, 1)
    variances = residual * (inverse[:, 0, 0] + inverse[:, 1, 1]) / 2 * factor**2
    return -solution[:, :2] * factor[:, None], np.where(np.isnan(gain), np.inf, variances)


def _agreeing(steps: np.ndarray) -> np.ndarray:
    """Mark the displacements (bead, 2) that agree with most others, within 3 sigma along both axes; (bead,) bool."""
    kept = np.isfinite(steps).all(axis=1)
    for _ in range(5):
        if kept.sum() < _MIN_BEADS:
            break
        off = np.abs(steps - np.median(steps[kept], axis=0)).max(axis=1)
        # 1.4826 MAD = sigma; a few pairs that agree by chance must not exclude all others
        kept = off < 3 * max(1.4826 * float(np.median(off[kept])), 2 * _FLOOR)
    return kept


def align(
    images: np.ndarray, shifts: np.ndarray, transforms: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Correct drift, and chromatic distortion if given, by resampling each image once with cubic splines.

    images: (image, y, x) or (image, z, y, x), any real dtype; shifts: (image, 2) dy, dx in pixels, as returned by
    `measure_drift`; transforms: (image, 2, 3), maps of positions (y, x, 1) in the reference colour to positions in the
    image's colour, as returned by `merfish.imaging.chromatic.fit_chromatic`. A pixel (y, x) of the result is the image
    at transform @ (y + dy, x + dx, 1). Shifts by whole pixels without a transform copy values exactly.

    Returns the aligned images, float32 of the same shape, and bool (y, x), whether all of them have data: elsewhere
    at least one image is extrapolated by mirroring.

    Raises InputError if shapes do not match or a number is not finite.
    """
    images, shifts = np.asarray(images), np.asarray(shifts, dtype=np.float64)
    if images.ndim not in (3, 4) or shifts.shape != (len(images), 2):
        raise InputError(
            f"expected images (image, y, x) or (image, z, y, x) and shifts (image, 2), "
            f"got {images.shape} and {shifts.shape}"
        )
    maps = np.tile(np.eye(2, 3), (len(images), 1, 1)) if transforms is None else np.array(transforms, np.float64)
    if maps.shape != (len(images), 2, 3):
        raise InputError(f"transforms: expected ({len(images)}, 2, 3), got {maps.shape}")
    if not (np.isfinite(shifts).all() and np.isfinite(maps).all()):
        raise InputError(f"shifts and transforms: expected finite numbers, got {shifts.tolist()} and {maps.tolist()}")
    maps[:, :, 2] += np.einsum("ijk,ik->ij", maps[:, :, :2], shifts)
    out = np.empty(images.shape, np.float32)
    for image, at, result in zip(images, maps, out, strict=True):
        planes, results = image.reshape(-1, *image.shape[-2:]), result.reshape(-1, *image.shape[-2:])
        if (at[:, :2] == np.eye(2)).all():
            _translate(planes, at[:, 2], results, filter_planes)
        else:
            coefficients = np.empty(planes.shape, np.float32)
            taps = _repeat(filled_taps(_inverse_spline(_TAPS).astype(np.float32)), len(planes))
            filter_planes(planes, np.full((len(planes), 2), -_TAPS), taps, taps, coefficients)
            warp_planes(coefficients, _repeat(at, len(planes)), results)
    return out, seen_by_all(maps, images.shape[-2:])


def _translate(planes: np.ndarray, shift: np.ndarray, out: np.ndarray, filtered: Callable[..., None]) -> None:
    whole = np.floor(shift)
    taps = spline_taps(shift - whole)
    starts = _repeat(whole.astype(np.int64) - (_TAPS // 2 - 1), len(planes))
    filtered(planes, starts, _repeat(taps[0], len(planes)), _repeat(taps[1], len(planes)), out)


def filter_planes(
    planes: np.ndarray, starts: np.ndarray, taps_y: np.ndarray, taps_x: np.ndarray, out: np.ndarray
) -> None:
    """Filter planes as described in `_kernels.filter_strips`."""
    in_parts(lambda a, b: filter_strips(a, b, planes, starts, taps_y, taps_x, out), _strips(planes))


def filter_planes_alone(
    planes: np.ndarray, starts: np.ndarray, taps_y: np.ndarray, taps_x: np.ndarray, out: np.ndarray
) -> None:
    """`filter_planes` on a single thread, for `merfish._jit.map_bits`."""
    filter_strips(0, _strips(planes), planes, starts, taps_y, taps_x, out)


def _strips(planes: np.ndarray) -> int:
    return len(planes) * -(-planes.shape[1] // ROWS)


def warp_planes(coefficients: np.ndarray, maps: np.ndarray, out: np.ndarray) -> None:
    """Resample planes as described in `_kernels.warp_rows`."""
    n_rows = coefficients.shape[0] * coefficients.shape[1]
    in_parts(lambda first, last: warp_rows(first, last, coefficients, maps, out), n_rows)


def _repeat(values: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(values[None], times, axis=0)


def seen_by_all(maps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels whose position in every image, maps (image, 2, 3) @ (y, x, 1), lies inside it; (y, x) bool."""
    y, x = np.arange(shape[0])[:, None], np.arange(shape[1])
    seen = np.ones(shape, dtype=bool)
    for at in np.unique(maps, axis=0):
        for (along_y, along_x, start), size in zip(at, shape, strict=True):
            # without rotation, a single row or column is enough
            place = (along_y * y if along_y else 0.0) + (along_x * x if along_x else 0.0) + start
            seen &= (place >= 0) & (place <= size - 1)
    return seen


def spline_taps(fraction: np.ndarray) -> np.ndarray:
    """Weights (..., _TAPS) float32 of the pixels around a point ``fraction`` (..., 0 to 1) beyond tap _TAPS // 2 - 1.

    They are the cardinal cubic spline (Unser 1999, IEEE Signal Process. Mag. 16:22): the B-spline convolved with the
    inverse of its samples, sqrt(3) z^|k| with z = sqrt(3) - 2, truncated after 8 pixels, where it has fallen to 3e-5.
    """
    place = np.arange(_TAPS) - (_TAPS // 2 - 1)
    k = np.arange(-_TAPS, _TAPS + 1)
    distance = np.abs(np.asarray(fraction)[..., None, None] - place[:, None] - k)
    spline = np.where(
        distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.where(distance < 2, (2 - distance) ** 3 / 6, 0)
    )
    weights = (spline * _inverse_spline(_TAPS)).sum(axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _inverse_spline(reach: int) -> np.ndarray:
    """Filter (2 reach + 1,) that converts pixels to cubic B-spline coefficients."""
    return np.sqrt(3.0) * (np.sqrt(3.0) - 2.0) ** np.abs(np.arange(-reach, reach + 1))
