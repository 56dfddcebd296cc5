"""Mosaics of a run: one channel of all fields at their corrected positions, written tile by tile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from merfish import results
from merfish._files import whole_file
from merfish._text import listed
from merfish.errors import InputError
from merfish.imaging.ngff import CHUNK, create_image, fill_levels, open_image, tiles
from merfish.pipeline.images import saved_channels
from merfish.report import OVERVIEW, read_overview, read_record

if TYPE_CHECKING:
    import zarr

BRIGHTEST = "overview"  # the channel that every run has: the brightest bit of each pixel
ZARR, TIFF = (".zarr",), (".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Tile:
    """One channel of a field: an array (y, x) or (z, y, x), and the row and column of its first pixel in the mosaic."""

    image: Any
    row: int
    column: int

    def part(self, y: slice, x: slice) -> np.ndarray:
        """Rows and columns of the field, float32, the brightest plane of each pixel."""
        part = np.asarray(self.image[..., y, x], np.float32)
        return part.max(axis=0) if part.ndim == 3 else part


def write_mosaic(out: Path, path: Path, channel: str) -> Path:
    """Write the mosaic of a channel of a run as OME-Zarr (.zarr) or OME-TIFF (.tif), whole or not at all.

    out: folder of the run. channel: a stain or a bit that the run saved (``--save-images``), or "overview", the
    brightest bit of each pixel. Fields stand on whole pixels nearest to their corrected positions; where they overlap,
    each counts by the distance to its border. Levels of half the size each; places in micrometre.

    Raises InputError if the run has no such images, or for another suffix of ``path``.
    """
    if path.suffix.lower() not in ZARR + TIFF:
        raise InputError(f"{path}: expected a name that ends in .zarr (OME-Zarr) or .tif (OME-TIFF)")
    run = read_record(out)
    scale, fovs = run["microns_per_pixel"], sorted(map(int, run["fields"]))
    if not fovs:
        raise InputError(f"{out}: no field of the run has results")
    places = np.array(run["stage"]["positions"], float)[fovs]
    origin = places.min(axis=0)
    corners = np.rint((places - origin) / scale).astype(int)
    fields = [
        Tile(field_image(out, fov, channel), row, column)
        for fov, (column, row) in zip(fovs, corners.tolist(), strict=True)
    ]
    height, width = np.max([(f.row + f.image.shape[-2], f.column + f.image.shape[-1]) for f in fields], axis=0).tolist()
    dtype = str(np.dtype(fields[0].image.dtype))
    with TemporaryDirectory(dir=_parent(path), prefix=f".{path.name}.") as work:
        store = Path(work) / f"{channel}.zarr"
        first_y, first_x = origin[::-1].tolist()
        levels = create_image(store, (1, 1, height, width), dtype, [channel], (1.0, scale, scale), (first_y, first_x))
        for y, x in tiles((height, width)):
            levels[0][0, 0, y, x] = blend(fields, y, x, levels[0].dtype)
        fill_levels(levels)
        with whole_file(path) as part:
            if path.suffix.lower() in ZARR:
                store.rename(part)
            else:
                write_tiff(part, open_image(store)[0], channel, scale, (first_y, first_x))
    return path


def field_image(out: Path, fov: int, channel: str) -> Any:
    """A channel of a field, an array (y, x) or (z, y, x) that is read where it is asked for."""
    if channel == BRIGHTEST:
        return read_overview(results.field_folder(out, fov) / OVERVIEW)
    known = saved_channels(out, fov)
    if channel not in known:
        raise InputError(f"field {fov}: no saved image {channel!r}; it has {listed(list(known), ', ')}, {BRIGHTEST}")
    path, k = known[channel]
    return Channel(open_image(path)[0][0], k)


@dataclass(frozen=True, eq=False)
class Channel:
    """One channel (z, y, x) of a level of an OME-Zarr image."""

    level: zarr.Array[Any]
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x)."""
        return self.level.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return np.dtype(self.level.dtype)

    def __getitem__(self, place: tuple[Any, slice, slice]) -> np.ndarray:
        return np.asarray(self.level[self.index, :, place[1], place[2]])


def blend(fields: Sequence[Tile], y: slice, x: slice, dtype: np.dtype[Any]) -> np.ndarray:
    """Rows and columns of a mosaic; pixels of several fields are their mean, weighted by the distance to each border.

    Where no field lies it is 0.
    """
    total = np.zeros((y.stop - y.start, x.stop - x.start), np.float32)
    weights = np.zeros_like(total)
    for field in fields:
        height, width = field.image.shape[-2:]
        rows = slice(max(y.start - field.row, 0), min(y.stop - field.row, height))
        columns = slice(max(x.start - field.column, 0), min(x.stop - field.column, width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        weight = np.minimum.outer(_from_border(height)[rows], _from_border(width)[columns])
        here = (
            slice(rows.start + field.row - y.start, rows.stop + field.row - y.start),
            slice(columns.start + field.column - x.start, columns.stop + field.column - x.start),
        )
        total[here] += weight * field.part(rows, columns)
        weights[here] += weight
    mean = np.divide(total, weights, out=total, where=weights > 0)
    return mean.astype(dtype) if dtype.kind == "f" else np.rint(mean).astype(dtype)


def _from_border(length: int) -> np.ndarray:
    """Pixels from the nearer end, from 1."""
    place = np.arange(length, dtype=np.float32)
    return np.minimum(place, length - 1 - place) + 1


def write_tiff(
    path: Path, levels: Sequence[zarr.Array[Any]], channel: str, scale: float, origin: tuple[float, float]
) -> None:
    """Write levels (1, 1, y, x) as one OME-TIFF with tiles, the smaller ones as its sub-images.

    scale: micrometre a pixel; origin: (y, x) of the first pixel, micrometre.
    """
    import tifffile

    metadata = {
        "axes": "YX",
        "Channel": {"Name": [channel]},
        "PhysicalSizeX": scale,
        "PhysicalSizeY": scale,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeYUnit": "µm",
        "Plane": {
            "PositionX": [origin[1]],
            "PositionY": [origin[0]],
            "PositionXUnit": ["µm"],
            "PositionYUnit": ["µm"],
        },
    }
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        for k, level in enumerate(levels):
            file.write(
                _squares(level),
                shape=level.shape[2:],
                dtype=level.dtype,
                tile=(CHUNK, CHUNK),
                photometric="minisblack",
                compression="deflate",
                resolution=(1e4 / (scale * 2**k), 1e4 / (scale * 2**k)),
                resolutionunit="CENTIMETER",
                **({"subifds": len(levels) - 1, "metadata": metadata} if k == 0 else {"subfiletype": 1}),
            )


def _squares(level: zarr.Array[Any]) -> Iterator[np.ndarray]:
    """Squares of an image (1, 1, y, x) row by row, as TIFF has them; those at the ends are filled up with 0."""
    height, width = level.shape[2:]
    for y in range(0, height, CHUNK):
        band = np.asarray(level[0, 0, y : y + CHUNK])
        band = np.pad(band, ((0, CHUNK - len(band)), (0, -width % CHUNK)))
        for x in range(0, width, CHUNK):
            yield np.ascontiguousarray(band[:, x : x + CHUNK])


def _parent(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fspath(path.parent)
