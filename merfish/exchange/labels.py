"""Lossless conversion between label images (one integer per pixel, 0 = outside) and outlines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import shapely

from merfish.cells.stacks import stack
from merfish.errors import InputError
from merfish.exchange._kernels import find_corners, follow
from merfish.exchange.cellpose import read_seg_npy
from merfish.imaging.blocks import Block, read_blocks, row_blocks
from merfish.imaging.images import read_header

LABEL_SUFFIXES = (".tif", ".tiff", ".npy", ".zarr")
MOST_CORNERS = 1 << 20  # corners that are joined to outlines at a time


def count_label_planes(path: Path) -> int:
    """Return the number of planes of a label image."""
    if path.name.endswith("_seg.npy"):
        labels = read_seg_npy(path)
        return len(labels) if labels.ndim > 2 else 1
    return read_header(path, most=np.inf).frames


def read_label_outlines(
    path: str | os.PathLike[str], *, stacked: bool = False
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Read a label image: shape (y, x) or (z, y, x), labels, and outlines as from `label_outlines`.

    stacked: whether a label has an outline in each plane (see `merfish.cells.stacks`). Reads TIFF, OME-TIFF, .npy, Zarr
    and Cellpose's ``_seg.npy`` in blocks of rows, so that a label image of a whole section need not fit in memory.
    Raises InputError for unreadable files, and for values that are not non-negative integers.
    """
    path = Path(path)
    blocks = row_blocks(read_seg_npy(path)) if path.name.endswith("_seg.npy") else read_blocks(path)
    shape, labels, outlines = _outlines(((frame, _checked(path, rows)) for frame, rows in blocks), stacked)
    return shape if shape[0] > 1 else shape[1:], labels, outlines


def label_outlines(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (cell,) in ascending order, and outlines (cell,) in pixels x, y, centre of the first pixel at 0.

    labels: integers (y, x) or (z, y, x), 0 = outside. An outline runs along the edges of pixels, so that it contains
    exactly the centres of its own pixels; all pieces and holes are kept. The outline of a label in several planes is
    that of its projection.
    """
    return _outlines(row_blocks(labels))[1:]


def _checked(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return rows of labels as integers. Raises InputError for other values."""
    if rows.dtype.kind == "f" and np.array_equal(rows, np.rint(rows)):
        rows = rows.astype(np.int64)
    if rows.dtype.kind not in "iu":
        raise InputError(f"{path}: expected a label image of integers, got {rows.dtype}")
    if rows.size and rows.min() < 0:
        raise InputError(f"{path}: expected non-negative labels, got {rows.min()}")
    return rows


def _outlines(blocks: Iterable[Block], stacked: bool = False) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """Return the shape, labels and outlines of a label image that is given in blocks."""
    shape, corners = _corners(blocks)
    label, frame, y, x = (np.concatenate(parts) for parts in zip(*corners, strict=True))
    order = np.lexsort((frame, label))
    label, frame, y, x = (values[order] for values in (label, frame, y, x))
    # a region is the set of pixels of a label in a frame
    first = np.ones(len(label), bool)
    first[1:] = (label[1:] != label[:-1]) | (frame[1:] != frame[:-1])
    begin, area = np.flatnonzero(first), np.cumsum(first) - 1
    cuts = [*np.unique(begin[area[::MOST_CORNERS]]), len(label)]
    areas = [_join(area[a:b] - area[a], y[a:b], x[a:b]) for a, b in pairwise(cuts)]
    found, of_area = np.unique(label[begin], return_inverse=True)
    outlines = np.concatenate([np.empty(0, object), *areas])
    if stacked:
        of_planes = np.full((len(found), shape[0]), shapely.Polygon(), dtype=object)
        of_planes[of_area, frame[begin]] = outlines
        outlines = stack(of_planes)
    elif len(found) < len(outlines):
        collected = np.asarray(shapely.geometrycollections(outlines, indices=of_area), dtype=object)
        outlines = np.asarray(shapely.simplify(shapely.union_all(collected[:, None], axis=1), 0), dtype=object)
    return shape, found.astype(np.int64), outlines


def _corners(blocks: Iterable[Block]) -> tuple[tuple[int, int, int], list[tuple[np.ndarray, ...]]]:
    """Return the shape of a label image, and label, frame, y and x of its corners, half a pixel too high."""
    shape, corners = (0, 0, 0), [(np.empty(0, np.int64), *np.empty((3, 0), np.int32))]
    for frame, of_frame in groupby(blocks, key=itemgetter(0)):
        top, last = 0, None
        for _, rows in of_frame:
            corners.append(_traced(frame, top, np.zeros_like(rows[0]) if last is None else last, rows))
            top, last = top + len(rows), rows[-1]
        if last is not None:
            corners.append(_traced(frame, top, last, np.zeros_like(last)[None]))
            shape = (frame + 1, top, len(last))
    return shape, corners


def _traced(frame: int, top: int, above: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return label, frame, y and x of the corners between rows (row, x), the first with number top, and above (x,)."""
    padded = np.zeros((len(rows) + 1, rows.shape[1] + 2), rows.dtype)
    padded[0, 1:-1], padded[1:, 1:-1] = above, rows
    n, held = rows.size // 16, -1  # far more than images of cells have
    while held < n:
        held = n
        label, y, x = np.empty(n, rows.dtype), np.empty(n, np.int32), np.empty(n, np.int32)
        n = find_corners(padded, label, y, x)
    return label[:n].astype(np.int64), np.full(n, frame, np.int32), y[:n] + np.int32(top), x[:n].copy()


def _join(area: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return outlines of regions, given the number from 0 (corner,), ascending, and the position of all their corners.

    The first and second corner of a region in a row of corners are joined by an edge, and so on; likewise in columns.
    """
    by_row, by_column = np.lexsort((x, y, area)), np.lexsort((y, x, area))
    order, ring = np.empty(len(area), np.int64), np.full(len(area), -1, np.int64)
    n_rings = follow(_partners(by_row), _partners(by_column), order, ring)
    ring = np.sort(ring)
    rings = shapely.linearrings(np.column_stack([x, y])[order] - 0.5, indices=ring)
    parts = np.asarray(shapely.polygons(rings), dtype=object)
    of_ring = area[order[np.searchsorted(ring, np.arange(n_rings))]]
    same = (np.diff(area[by_row]) == 0) & (np.diff(y[by_row]) == 0) & (np.diff(x[by_row]) == 0)
    simple = np.bincount(of_ring) == 1
    simple[area[by_row[1:][same]]] = False  # the region touches itself
    outlines = np.empty(len(simple), object)
    whole = simple[of_ring]
    outlines[of_ring[whole]] = parts[whole]
    for k in np.flatnonzero(~simple):
        low, high = np.searchsorted(of_ring, (k, k + 1))
        outlines[k] = shapely.make_valid(shapely.multipolygons(list(parts[low:high])))
    return outlines


def _partners(order: np.ndarray) -> np.ndarray:
    """Return the corner at the other end of each edge; order: corners sorted so that those of an edge are adjacent."""
    partners = np.empty_like(order)
    partners[order[::2]], partners[order[1::2]] = order[1::2], order[::2]
    return partners


def label_image(outlines: np.ndarray, labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Draw outlines (cell,) in pixels as a label image int32 (y, x).

    A pixel gets the label of the outline that contains its centre, the smallest label where outlines overlap.
    """
    image = np.zeros(shape, np.int32)
    for k in np.argsort(-np.asarray(labels), kind="stable"):  # the smallest is drawn last
        if shapely.is_empty(outlines[k]):
            continue
        left, low, right, high = shapely.bounds(outlines[k])
        x = np.arange(max(int(np.ceil(left)), 0), min(int(np.floor(right)), shape[1] - 1) + 1)
        y = np.arange(max(int(np.ceil(low)), 0), min(int(np.floor(high)), shape[0] - 1) + 1)
        if not (len(x) and len(y)):
            continue
        shapely.prepare(outlines[k])
        inside = shapely.intersects_xy(outlines[k], *np.meshgrid(x, y))
        image[y[0] : y[-1] + 1, x[0] : x[-1] + 1][inside] = labels[k]
    return image
