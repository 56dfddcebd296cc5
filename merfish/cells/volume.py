"""3-D segmentation of cells that may lie above each other: labels (z, y, x), and outlines in each plane."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely import Polygon

from merfish.cells.segmentation import (
    CELL_AREA,
    EDGE_LEVEL,
    GAP,
    NUCLEUS_AREA,
    REACH,
    REACH_UNSTAINED,
    brightness,
    label_nuclei,
    largest_part,
    levels,
    outlines,
    stain_threshold,
    watershed,
)

VALLEY = 0.75  # a plane darker than this fraction of brighter planes above and below it separates two nuclei
OVERLAP = 0.5  # overlap of two outlines of one nucleus in neighbouring planes, as a fraction of the smaller one


def segment_planes(
    nuclei: np.ndarray, cytoplasm: np.ndarray | None, heights: np.ndarray, microns_per_pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    """Segment cells in 3-D; returns labels of cells and, with the same numbers, of their nuclei, int32 (z, y, x).

    nuclei, cytoplasm: planes (z, y, x) of registered stains, with pixels of about 0.25 micrometres. heights: (z,) in
    micrometres, ascending, evenly spaced. Nuclei are found in each plane and linked; a dark plane separates nuclei
    above each other. Cells grow from them to the edge of the cytoplasm's stain; neighbours are separated along the dark
    line between them in a plane, else half-way between their nuclei. A cell is one piece, without holes in any plane.
    """
    sampling = (float(np.median(np.diff(heights))) if len(heights) > 1 else 1.0, microns_per_pixel, microns_per_pixel)
    seeds = segment_nuclei(nuclei, microns_per_pixel)
    distance = ndimage.distance_transform_edt(seeds == 0, sampling) if seeds.any() else np.full(seeds.shape, np.inf)
    if cytoplasm is None:
        labels = watershed(distance, seeds, distance <= REACH_UNSTAINED)
    else:
        signal, stained = _stained(cytoplasm, microns_per_pixel)
        size = 2 * round(GAP / microns_per_pixel) + 1
        filled = ndimage.grey_closing(signal, size=(1, size, size))
        reach = distance / REACH
        # nuclei are dark in this stain, which must not be mistaken for a border between cells
        height = np.where(seeds > 0, 0.0, 1.0 - signal / np.maximum(filled, 1e-6)) + 0.5 * reach
        labels = watershed(height, seeds, (stained & (reach <= 1.0)) | (seeds > 0))
        labels[(signal < EDGE_LEVEL * levels(signal, labels, 50)[labels]) & (seeds == 0)] = 0
    kept = _tidy(labels, CELL_AREA, microns_per_pixel)
    return kept, np.where(seeds > 0, kept, 0)


def segment_nuclei(planes: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Label nuclei, int32 (z, y, x): found in each plane, and linked between planes."""
    signal, stained = _stained(planes, microns_per_pixel)
    stained &= signal >= VALLEY * between(signal)
    single = np.zeros(planes.shape, np.int32)
    for k, mask in enumerate(stained):
        found = label_nuclei(mask, microns_per_pixel)
        single[k] = np.where(found > 0, found + single.max(), 0)
    linked = link(single)
    linked[signal < EDGE_LEVEL * levels(signal, linked, 75)[linked]] = 0
    return _tidy(linked, NUCLEUS_AREA, microns_per_pixel)


def between(signal: np.ndarray) -> np.ndarray:
    """Return the lower of the maxima of an image (z, y, x) over the planes at or above, and at or below, each pixel."""
    above = np.maximum.accumulate(signal[::-1])[::-1]
    return np.minimum(np.maximum.accumulate(signal), above)


def link(labels: np.ndarray) -> np.ndarray:
    """Join labels, int32 (z, y, x), of neighbouring planes that are mutual best matches and overlap by half.

    Labels differ between planes and run from 1 without gaps over all planes. Of equal matches, that with the lower
    labels is the best.
    """
    n = int(labels.max())
    size = np.bincount(labels.ravel(), minlength=n + 1)
    low, high = labels[:-1].ravel(), labels[1:].ravel()
    both = (low > 0) & (high > 0)
    pair, common = np.unique(low[both].astype(np.int64) * (n + 1) + high[both], return_counts=True)
    low, high = pair // (n + 1), pair % (n + 1)
    order = np.argsort(-common, kind="stable")  # the first pair of each label then is its best match
    low, high, common = low[order], high[order], common[order]
    best = np.zeros((2, len(common)), bool)
    for of_side, side in zip(best, (low, high), strict=True):
        of_side[np.unique(side, return_index=True)[1]] = True
    same = best.all(axis=0) & (common > OVERLAP * np.minimum(size[low], size[high]))
    links = coo_array((np.ones(same.sum(), bool), (low[same], high[same])), shape=(n + 1, n + 1))
    chain = connected_components(links, directed=False)[1].astype(np.int32)
    # background, 0, is linked to nothing and therefore is component 0
    return np.asarray(chain[labels])


def plane_outlines(labels: np.ndarray, n: int, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return outlines (cell, plane) in pixels of labels (z, y, x) from 1 to ``n``, empty in planes without the label.

    size, shape: as in `merfish.cells.segmentation.outlines`.
    """
    found = np.full((n, len(labels)), Polygon(), dtype=object)
    for k, plane in enumerate(labels):
        for label, outline in outlines(plane, size, shape).items():
            found[label - 1, k] = outline
    return found


def _stained(planes: np.ndarray, microns_per_pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the brightness of planes (z, y, x) over the local background, float32, and a mask of stained pixels.

    The threshold is that of the maximum projection, so that planes with only blur from other planes have no mask.
    """
    signal = np.stack([brightness(plane, microns_per_pixel) for plane in planes])
    return signal, signal > stain_threshold(planes.max(axis=0), microns_per_pixel)


def _tidy(labels: np.ndarray, area: tuple[float, float], microns_per_pixel: float) -> np.ndarray:
    """Keep the largest piece of each label (z, y, x), fill its holes in each plane, drop labels of implausible size.

    area: range in the widest plane, in square micrometres; cells cut by the border of the field may be a quarter as
    large. Labels are renumbered from 1 in the same order.
    """
    smallest, largest = (limit / microns_per_pixel**2 for limit in area)
    out, number = np.zeros(labels.shape, np.int32), 0
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        piece = largest_part(labels[box] == label)
        piece = np.stack([ndimage.binary_fill_holes(plane) for plane in piece])
        piece &= out[box] == 0
        cut = any(side.start == 0 or side.stop == n for side, n in zip(box[1:], labels.shape[1:], strict=True))
        if (0.25 if cut else 1.0) * smallest <= piece.sum(axis=(1, 2)).max() <= largest:
            number += 1
            out[box][piece] = number
    return out
