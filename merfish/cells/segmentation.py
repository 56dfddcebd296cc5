"""Cells from stains: label images and outlines."""

from __future__ import annotations

import numpy as np
import shapely
from scipy import ndimage
from shapely import Polygon

from merfish.cells._kernels import flood, uniform
from merfish.errors import InputError

# Lengths in micrometres, areas in square micrometres.
BLOCK = 0.25  # pixel size that resolves cells
SMOOTHING = 0.25  # sigma: much smaller than a nucleus, large enough to suppress camera noise
NEIGHBOURHOOD = 12.0  # over which the illumination may change, and within which brightness is compared
NUCLEUS_AREA = (5.0, 400.0)  # smaller objects are debris, larger ones are not a single nucleus
CELL_AREA = (15.0, 4000.0)
NUCLEUS_RADIUS = 1.8  # minimum distance between the centres of two nuclei
REACH = 8.0  # maximum extension of a cell beyond its nucleus
REACH_UNSTAINED = 2.5  # the same without a stain of the cytoplasm
GAP = 1.0  # half the maximum width of a dark line between cells
NECK = 0.35  # half the width of the narrowest bridge that joins two pieces
MIN_CONTRAST = 10.0  # minimum contrast of stained pixels over their surround, in sigma of the smoothed noise
MIN_BRIGHTNESS = 0.15  # minimum brightness of stained pixels, as a fraction of the 95th percentile of the neighbourhood
EDGE_LEVEL = 0.5  # brightness at the edge of a cell, as a fraction of its own brightness
LEVELS = 1024  # steps of the watershed


def segment(nuclei: np.ndarray, cytoplasm: np.ndarray | None, microns_per_pixel: float) -> np.ndarray:
    """Segment cells: find nuclei in their stain, and grow them to the edge of the cytoplasm's stain.

    nuclei, cytoplasm: registered images (y, x) of any real dtype; without ``cytoplasm``, each nucleus is widened by 2.5
    micrometres. Brightness may be in any unit and change slowly over the field. Cells are found in blocks of pixels of
    about 0.25 micrometres (see `block_size`), which limits the resolution of their outlines.

    Returns labels int32 (y, x): 0 is background, cells are numbered from 1 by their first pixels; each cell is one
    piece without holes. A field without nuclei gives zeros.

    Raises InputError for images that are not two-dimensional, differ in shape or contain NaN, or a scale <= 0.
    """
    check_images(nuclei, cytoplasm, microns_per_pixel)
    size = block_size(microns_per_pixel)
    seeds = segment_nuclei(shrink(nuclei, size), size * microns_per_pixel)
    body = None if cytoplasm is None else shrink(cytoplasm, size)
    labels = grow_cells(seeds, body, size * microns_per_pixel)
    return labels.repeat(size, axis=0).repeat(size, axis=1)[: nuclei.shape[0], : nuclei.shape[1]]


def block_size(microns_per_pixel: float) -> int:
    """Return the side of the blocks in which cells are found, in pixels: about 0.25 micrometres, at least one pixel."""
    return max(int(BLOCK / microns_per_pixel + 0.5), 1)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Average an image (..., y, x) over square blocks, float32; its last row and column are repeated to fill blocks."""
    if size == 1:
        return np.asarray(image, np.float32)
    beyond = [(0, 0)] * (image.ndim - 2) + [(0, -side % size) for side in image.shape[-2:]]
    padded = np.pad(image, beyond, mode="edge")
    total = np.zeros((*image.shape[:-2], *(side // size for side in padded.shape[-2:])), np.float32)
    for row, column in np.ndindex(size, size):
        total += padded[..., row::size, column::size]
    return total / np.float32(size**2)


def grow_cells(seeds: np.ndarray, cytoplasm: np.ndarray | None, microns_per_pixel: float) -> np.ndarray:
    """Grow labelled nuclei to the edge of the cytoplasm's stain (y, x); returns labels, int32 (y, x)."""
    from skimage.segmentation import expand_labels

    if cytoplasm is None:
        return expand_labels(seeds, REACH_UNSTAINED / microns_per_pixel).astype(np.int32)
    signal, stained = _stained(cytoplasm, microns_per_pixel)
    reach = ndimage.distance_transform_edt(seeds == 0) * (microns_per_pixel / REACH)
    # Neighbours are separated along the dark line between them, by its depth and not by their brightness; without such
    # a line, half-way between their nuclei.
    filled = ndimage.grey_closing(signal, size=2 * round(GAP / microns_per_pixel) + 1)
    valley = 1.0 - signal / np.maximum(filled, 1e-6)
    labels = watershed(valley + 0.5 * reach, seeds, (stained & (reach <= 1.0)) | (seeds > 0))
    edge = EDGE_LEVEL * levels(signal, labels, 50)[labels]
    labels[(signal < edge) & (seeds == 0)] = 0
    return _tidy(labels, CELL_AREA, microns_per_pixel)


def segment_nuclei(image: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Label nuclei, int32 (y, x): regions brighter than their surroundings; touching nuclei are separated."""
    signal, mask = _stained(image, microns_per_pixel)
    labels = label_nuclei(mask, microns_per_pixel)
    labels[signal < EDGE_LEVEL * levels(signal, labels, 75)[labels]] = 0
    return _tidy(labels, NUCLEUS_AREA, microns_per_pixel)


def label_nuclei(mask: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Label nuclei in a mask of stained pixels (y, x), int32; touching nuclei are separated at the narrowest point."""
    from skimage.feature import peak_local_max

    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(mask))
    depth = ndimage.gaussian_filter(depth, 0.5 / microns_per_pixel) * mask
    spacing = max(round(NUCLEUS_RADIUS / microns_per_pixel), 1)
    middles = peak_local_max(depth, min_distance=spacing, threshold_abs=1e-3, exclude_border=False)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(middles.T)] = np.arange(1, len(middles) + 1)
    return watershed(-depth, seeds, mask)


def watershed(height: np.ndarray, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grow seeds, int32 (y, x) or (z, y, x), over the mask by increasing height, in 1,024 steps of equal height.

    Pixels are connected by their sides.
    """
    labels = seeds.copy()
    inside = height[mask]
    if len(inside):
        low, high = inside.min(), inside.max()
        steps = (np.clip(height, low, high) - low) * ((LEVELS - 1) / max(high - low, 1e-9))
        space = (-1, *labels.shape[-2:])
        flood(steps.astype(np.int32).reshape(space), mask.reshape(space), LEVELS, labels.reshape(space))
    return labels


def check_images(nuclei: np.ndarray, cytoplasm: np.ndarray | None, microns_per_pixel: float) -> None:
    """Raise InputError for arrays that are not images (y, x), differ in shape or contain NaN, or a scale <= 0."""
    if not microns_per_pixel > 0:
        raise InputError(f"microns_per_pixel must be positive, got {microns_per_pixel}")
    for name, image in (("nuclei", nuclei), ("cytoplasm", cytoplasm)):
        if image is None:
            continue
        if image.ndim != 2 or not image.size or image.shape != nuclei.shape:
            raise InputError(f"{name}: expected an image (y, x) of shape {nuclei.shape[-2:]}, got {image.shape}")
        if not np.isfinite(image).all():
            raise InputError(f"{name}: the image contains NaN or infinite values")


def brightness(image: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Return an image (y, x) float32, smoothed by 0.25 micrometres, minus its local background."""
    smooth = ndimage.gaussian_filter(image, SMOOTHING / microns_per_pixel)
    return smooth - _neighbourhood(smooth, 0, microns_per_pixel)


def _stained(image: np.ndarray, microns_per_pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the brightness over the local background, float32 (y, x), and a mask of stained pixels."""
    signal = brightness(image, microns_per_pixel)
    return signal, signal > _threshold(image, signal, microns_per_pixel)


def stain_threshold(image: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Return the brightness over the local background, float32 (y, x), above which an image (y, x) is stained."""
    return _threshold(image, brightness(image, microns_per_pixel), microns_per_pixel)


def _threshold(image: np.ndarray, signal: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    steps = np.abs(np.diff(image, axis=1))
    noise = np.median(steps) / 0.954 if steps.size else 0.0  # median |a - b| of two normals is 0.954 sigma
    noise /= max(2.0 * np.sqrt(np.pi) * SMOOTHING / microns_per_pixel, 1.0)
    brightest = _neighbourhood(signal, 95, microns_per_pixel)
    return np.maximum(MIN_BRIGHTNESS * brightest, MIN_CONTRAST * noise)


def _neighbourhood(image: np.ndarray, percentile: float, microns_per_pixel: float) -> np.ndarray:
    """Return a smooth map (y, x) of a percentile of ``image`` within ``NEIGHBOURHOOD`` of each pixel.

    Computed from the darkest pixels (percentile 0) or the medians of blocks of 1.6 micrometres.
    """
    step = max(round(1.6 / microns_per_pixel), 1)
    blocks = np.pad(image, [(0, -size % step) for size in image.shape], mode="edge")
    blocks = blocks.reshape(blocks.shape[0] // step, step, blocks.shape[1] // step, step)
    # A speck smaller than a block must not affect the result, but background may be as narrow as a gap between cells.
    coarse = blocks.min(axis=(1, 3)) if percentile == 0 else np.median(blocks, axis=(1, 3))
    radius = NEIGHBOURHOOD / (step * microns_per_pixel)
    coarse = ndimage.percentile_filter(coarse, percentile, size=2 * round(radius) + 1)
    coarse = ndimage.gaussian_filter(coarse, radius / 2.0)
    for axis, size in enumerate(image.shape):  # linear between the centres of blocks
        place = np.clip((np.arange(size) + 0.5) / step - 0.5, 0, coarse.shape[axis] - 1)
        below = np.minimum(place.astype(int), max(coarse.shape[axis] - 2, 0))
        share = np.expand_dims((place - below).astype(np.float32), 1 - axis)
        above = np.minimum(below + 1, coarse.shape[axis] - 1)
        coarse = coarse.take(below, axis) * (1 - share) + coarse.take(above, axis) * share
    return coarse


def levels(signal: np.ndarray, labels: np.ndarray, percentile: float) -> np.ndarray:
    """Return a percentile of ``signal``, of any shape, over each label, float32 (label + 1,); 0 for the background."""
    level = np.zeros(labels.max() + 1, np.float32)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            level[label] = np.percentile(signal[box][labels[box] == label], percentile)
    return level


def _tidy(labels: np.ndarray, area: tuple[float, float], microns_per_pixel: float) -> np.ndarray:
    """Keep the largest piece of each label, fill its holes, drop sizes out of range, renumber from 1 by first pixel.

    Pieces joined by a neck narrower than twice ``NECK`` are separated. Cells cut by the border of the field may be a
    quarter as large, because a neighbouring field shows the rest.
    """
    smallest, largest = (limit / microns_per_pixel**2 for limit in area)
    height, width = labels.shape
    neck = max(round(NECK / microns_per_pixel), 1)
    inner = np.empty(labels.shape, bool)
    uniform(labels, neck, inner)
    pieces = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = labels[box] == label
        core = largest_part(mask & inner[box])
        piece = ndimage.binary_dilation(core, iterations=2 * neck, mask=mask) if core.any() else largest_part(mask)
        piece = ndimage.binary_fill_holes(piece)
        rows, columns = box
        cut = rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width
        if (0.25 if cut else 1.0) * smallest <= piece.sum() <= largest:
            first = int(np.argmax(piece))
            start = (rows.start + first // piece.shape[1], columns.start + first % piece.shape[1])
            pieces.append((start, box, piece))
    out = np.zeros(labels.shape, np.int32)
    for number, (_, box, piece) in enumerate(sorted(pieces, key=lambda entry: entry[0]), start=1):
        out[box][piece & (out[box] == 0)] = number
    return out


def largest_part(mask: np.ndarray) -> np.ndarray:
    """Return the largest part of a mask (y, x) or (z, y, x) that is connected by sides."""
    parts, number = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if number > 1 else mask


def outlines(labels: np.ndarray, size: int = 1, shape: tuple[int, ...] | None = None) -> dict[int, Polygon]:
    """Outline each label of a label image (y, x) as one valid polygon; returns polygons by label.

    Coordinates are pixels (x, y), with the centre of the first pixel at 0. The outline runs half-way between the
    centres of pixels inside and outside, so that its area is that of the pixels minus half a pixel, and neighbours
    share their border. Only the largest piece of a label is outlined; its holes are kept.

    size: side, in pixels, of the blocks that ``labels`` is an image of (see `block_size`); the outline then runs
    half-way between the centres of blocks, and ends at the border of the image of pixels, ``shape`` (y, x).
    """
    from skimage.measure import find_contours

    found = {}
    border = None if shape is None else np.array(shape[::-1]) - 0.5
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = np.pad(labels[box] == label, 1).astype(np.float32)
        corner = np.array([box[1].start - 1, box[0].start - 1])
        rings = [
            Polygon(np.minimum(xy, border) if border is not None else xy)
            for contour in find_contours(mask, 0.5)
            for xy in [(contour[:, ::-1] + corner + 0.5) * size - 0.5]
        ]
        shell = max(rings, key=lambda ring: ring.area)
        holes = [ring.exterior for ring in rings if ring is not shell and shell.contains(ring)]
        outline = Polygon(shell.exterior, holes)
        found[label] = outline if outline.is_valid else largest_polygon(shapely.make_valid(outline))
    return found


def largest_polygon(geometry: shapely.Geometry) -> Polygon:
    """Return the largest polygon in a geometry of any type, empty if there is none."""
    parts = [part for part in shapely.get_parts(geometry) if isinstance(part, Polygon)]
    return max(parts, key=lambda part: part.area, default=Polygon())
