"""Label images: an integer a pixel, 0 = outside, to outlines and back without loss."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import shapely

from merfish._files import whole_file
from merfish.errors import InputError
from merfish.exchange.cellpose import read_seg_npy
from merfish.imaging.images import read_frames, read_header

LABEL_SUFFIXES = (".tif", ".tiff", ".npy", ".zarr")


def read_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """Labels (y, x) or, of several planes, (z, y, x), from TIFF, OME-TIFF, .npy, Zarr or Cellpose's ``_seg.npy``.

    Raises InputError for what cannot be read, and for values that are no integers from 0.
    """
    path = Path(path)
    if path.name.endswith("_seg.npy"):
        labels = read_seg_npy(path)
    else:
        labels = read_frames(path, range(read_header(path).frames))
    if labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: expected a label image of integers, got {labels.dtype}")
    if labels.size and labels.min() < 0:
        raise InputError(f"{path}: expected labels from 0, got {labels.min()}")
    if labels.ndim == 3 and len(labels) == 1:
        labels = labels[0]
    if labels.ndim not in (2, 3):
        raise InputError(f"{path}: expected a label image (y, x) or (z, y, x), got shape {labels.shape}")
    return labels


def label_outlines(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (cell,) in ascending order and their outlines (cell,), pixels x, y, centre of the first pixel at 0.

    An outline runs along the edges of pixels, so that it holds just the centres of its own; all pieces and holes are
    kept. A label of several planes (z, y, x) is all that it covers in any of them.
    """
    width = labels.shape[-1]
    rows = labels.reshape(-1, width)
    padded = np.zeros((len(rows), width + 2), labels.dtype)
    padded[:, 1:-1] = rows
    # where a run of equal labels begins; the next change in the row ends it
    row, begin = np.nonzero(padded[:, 1:] != padded[:, :-1])
    label, end = padded[row, begin + 1], np.append(begin[1:], 0)
    inside = label != 0
    order = np.argsort(label[inside], kind="stable")
    row, begin, end, label = (values[inside][order] for values in (row, begin, end, label))
    y = row % labels.shape[-2]
    boxes = shapely.box(begin - 0.5, y - 0.5, end - 0.5, y + 0.5)
    found, of_box = np.unique(label, return_inverse=True)
    if not len(found):
        return found.astype(np.int64), np.empty(0, dtype=object)
    joined = shapely.union_all(shapely.multipolygons(boxes, indices=of_box)[:, None], axis=1)
    return found.astype(np.int64), np.asarray(shapely.simplify(joined, 0), dtype=object)


def label_image(outlines: np.ndarray, labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Label image int32 (y, x) of outlines (cell,) in pixels: a pixel has the label of the outline about its centre.

    Where outlines overlap the smallest label stands.
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


def write_labels(labels: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a label image as TIFF, whole or not at all."""
    import tifffile

    with whole_file(path) as part:
        tifffile.imwrite(part, labels, compression="zlib")
