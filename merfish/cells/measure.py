"""The cells of one field: their outlines, and measurements of the stains in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import numpy as np
import pandas as pd
from scipy.ndimage import find_objects

from merfish.cells.merging import DEPTH
from merfish.cells.segmentation import (
    EDGE_LEVEL,
    block_size,
    brightness,
    check_images,
    grow_cells,
    levels,
    outlines,
    segment_nuclei,
    shrink,
)
from merfish.cells.stacks import nearest_plane, stack, thickness
from merfish.cells.volume import plane_outlines, segment_planes
from merfish.errors import InputError

# nuclei (y, x), cytoplasm (y, x) or None, micrometres per pixel -> labels (y, x)
Segmenter = Callable[[np.ndarray, np.ndarray | None, float], np.ndarray]


@dataclass(frozen=True, eq=False)
class FieldCells:
    """Cells of a field.

    outlines: (cell,) polygons in pixels, with the centre of the first pixel at 0, or stacks (`merfish.cells.stacks`).
    measured: one row per cell: ``nucleus``, the fraction of its area in a nucleus, and ``depth`` in micrometres.
    labels: int32 (y, x), or (z, y, x) for stacks, of blocks of pixels; label k + 1 is row k of the other attributes.
    nuclei: bool, shape of ``labels``, whether each block is in a nucleus. block: side of a block in pixels. heights: of
    the planes of stacks, in micrometres.
    """

    outlines: np.ndarray
    measured: pd.DataFrame
    labels: np.ndarray
    nuclei: np.ndarray
    block: int
    heights: np.ndarray | None = None

    def mean(self, image: np.ndarray) -> np.ndarray:
        """Return the mean over each cell, float64 (cell,), of an image (y, x) or of planes (z, y, x)."""
        planes = shrink(image.reshape(-1, *image.shape[-2:]), self.block)
        if planes.shape != self.labels.shape:
            planes = np.broadcast_to(planes.mean(axis=0), self.labels.shape)
        return mean_of_labels(planes, self.labels, len(self.outlines))

    def in_nucleus(self, x: np.ndarray, y: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Return whether positions x, y (pixels), height (µm, ignored for flat cells) lie in a nucleus, bool."""
        row, column = (
            np.clip(((place + 0.5) // self.block).astype(int), 0, side - 1)
            for place, side in zip((y, x), self.nuclei.shape[-2:], strict=True)
        )
        if self.heights is None:
            return self.nuclei[row, column]
        return self.nuclei[nearest_plane(height, self.heights), row, column]


def column_name(stain: str) -> str:
    """Return the name of a stain as a part of a column name, in which AnnData allows no slash."""
    return stain.replace("/", "_")


def find_cells(
    nuclei: np.ndarray,
    cytoplasm: np.ndarray | None,
    heights: np.ndarray,
    microns_per_pixel: float,
    segmenter: Segmenter | None = None,
) -> FieldCells:
    """Find the cells of a field and their depths.

    nuclei, cytoplasm: planes (z, y, x) of registered stains, any real dtype. Cells are segmented in the brightest plane
    of each pixel: a cell has one outline, and cells do not lie above each other. heights: (z,) in micrometres,
    ascending, of the planes of ``cytoplasm``, or of ``nuclei`` without it. segmenter: called instead of
    `merfish.cells.segmentation.segment`, with the same arguments.

    Raises InputError for images with NaN, and if ``segmenter`` does not return labels of the same shape.
    """
    flat = nuclei.max(axis=0), None if cytoplasm is None else cytoplasm.max(axis=0)
    check_images(*flat, microns_per_pixel)
    block, shape = block_size(microns_per_pixel), nuclei.shape[-2:]
    scale = block * microns_per_pixel
    dna = shrink(nuclei, block)
    body = None if cytoplasm is None else shrink(cytoplasm, block)
    seeds = segment_nuclei(dna.max(axis=0), scale)
    if segmenter is None:
        labels = grow_cells(seeds, None if body is None else body.max(axis=0), scale)
        shapes = outlines(labels, block, shape)
    else:
        given = check_labels(segmenter(*flat, microns_per_pixel), shape)
        labels, kept = in_blocks(given, block)
        every = outlines(given)
        shapes = {new: every[old] for new, old in enumerate(kept, start=1)}
    n = len(shapes)
    stained = labels if body is not None else np.where(seeds > 0, labels, 0)
    measured = pd.DataFrame(
        {
            "nucleus": mean_of_labels((seeds > 0).astype(np.float32), labels, n),
            "depth": depths(dna if body is None else body, stained, heights, scale, n),
        }
    )
    polygons = np.array([*shapes.values(), None], dtype=object)[:-1]
    return FieldCells(polygons, measured, labels, seeds > 0, block)


def find_stacked_cells(
    nuclei: np.ndarray, cytoplasm: np.ndarray | None, heights: np.ndarray, microns_per_pixel: float
) -> FieldCells:
    """Find cells that may lie above each other: each has an outline in every plane that shows it; see `find_cells`.

    nuclei, cytoplasm: (z, y, x) with the same planes, at ``heights``.
    """
    if len(nuclei) != len(heights):
        raise InputError(
            f"stacked_cells: expected nuclei in the {len(heights)} planes of the cytoplasm, got {len(nuclei)}"
        )
    for k, plane in enumerate(nuclei):
        check_images(plane, None if cytoplasm is None else cytoplasm[k], microns_per_pixel)
    block = block_size(microns_per_pixel)
    body = None if cytoplasm is None else shrink(cytoplasm, block)
    labels, inner = segment_planes(shrink(nuclei, block), body, heights, block * microns_per_pixel)
    n = int(labels.max())
    area, nucleus = (seen_from_above(image, n) for image in (labels, inner))
    thick = np.broadcast_to(thickness(heights)[:, None, None], labels.shape)
    volume = np.bincount(labels.ravel(), thick.ravel(), minlength=n + 1)[1:]
    measured = pd.DataFrame({"nucleus": nucleus / area, "depth": volume / area})
    shapes = stack(plane_outlines(labels, n, block, nuclei.shape[-2:]))
    return FieldCells(shapes, measured, labels, inner > 0, block, np.asarray(heights, float))


def seen_from_above(labels: np.ndarray, n: int) -> np.ndarray:
    """Count the pixels (y, x) at which any plane has each label (z, y, x) from 1 to ``n``, int64 (label,)."""
    size = np.zeros(n, np.int64)
    for label, box in enumerate(find_objects(labels), start=1):
        if box is not None:
            size[label - 1] = (labels[box] == label).any(axis=0).sum()
    return size


def in_blocks(labels: np.ndarray, block: int) -> tuple[np.ndarray, list[int]]:
    """Sample labels at the centres of blocks, int32, renumbered from 1; also returns the original label of each.

    Labels that contain no centre of a block are too small for a cell and are dropped.
    """
    beyond = [(0, -side % block) for side in labels.shape]
    sampled = np.pad(labels, beyond, mode="edge")[block // 2 :: block, block // 2 :: block]
    shown, dense = np.unique(np.append(sampled, 0), return_inverse=True)
    return dense[:-1].reshape(sampled.shape).astype(np.int32), shown[1:].tolist()


def no_cells(shape: tuple[int, ...], microns_per_pixel: float) -> FieldCells:
    """Return the result for a field of shape (y, x) in which cells cannot be found."""
    block = block_size(microns_per_pixel)
    blocks = tuple(-(-side // block) for side in shape)
    measured = pd.DataFrame({"nucleus": np.empty(0), "depth": np.empty(0)})
    return FieldCells(np.empty(0, object), measured, np.zeros(blocks, np.int32), np.zeros(blocks, bool), block)


def depths(planes: np.ndarray, labels: np.ndarray, heights: np.ndarray, microns_per_pixel: float, n: int) -> np.ndarray:
    """Return the mean depth of each cell over its area in micrometres, float64 (cell,), from the planes that show it.

    planes: stain (z, y, x). labels: (y, x) from 1 to ``n``. A pixel is stained in a plane if it is at least half as
    bright as the median of the cell's pixels in their brightest planes. The planes have the thickness from `thickness`.
    With a single plane, every cell has the depth `DEPTH`.
    """
    if len(planes) == 1:
        return np.full(n, DEPTH)
    edge = EDGE_LEVEL * levels(brightness(planes.max(axis=0), microns_per_pixel), labels, 50)[labels]
    within = np.zeros(labels.shape, np.float32)
    for plane, step in zip(planes, thickness(heights), strict=True):
        within += np.float32(step) * (brightness(plane, microns_per_pixel) > edge)
    return mean_of_labels(within, labels, n)


def mean_of_labels(image: np.ndarray, labels: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of an image over each label from 1 to ``n``, float64 (label,), NaN for labels without pixels.

    Image and labels have the same shape, (y, x) or (z, y, x).
    """
    total = np.bincount(labels.ravel(), image.ravel(), minlength=n + 1)
    count = np.bincount(labels.ravel(), minlength=n + 1)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count)[1:]


def check_labels(labels: object, shape: tuple[int, ...]) -> np.ndarray:
    """Return the labels of a segmenter, numbered from 1 without gaps. Raises InputError for anything but labels."""
    if not isinstance(labels, np.ndarray) or labels.shape != shape or labels.dtype.kind not in "iub":
        got = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise InputError(f"segmenter: expected labels, an array of integers of shape {shape} (y, x), got {got}")
    if labels.size and labels.min() < 0:
        raise InputError(f"segmenter: expected non-negative labels (0: background), got {labels.min()}")
    _, dense = np.unique(np.append(labels, 0), return_inverse=True)
    return np.asarray(dense[:-1].reshape(shape).astype(np.int32))


def load_segmenter(name: str) -> Segmenter:
    """Import the function named ``package.module:function``. Raises InputError if that fails or it is not callable."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # importing a module may raise any exception
        raise InputError(f"segmenter: {name} cannot be imported: {error or type(error).__name__}") from error
    if not callable(found):
        raise InputError(f"segmenter: {name} is not a function, got {type(found).__name__}")
    return cast(Segmenter, found)
