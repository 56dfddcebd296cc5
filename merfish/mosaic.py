"""Mosaics of a run: one channel of all fields at their corrected positions, written tile by tile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from merfish import results
from merfish._files import whole_file
from merfish._text import listed
from merfish.errors import InputError
from merfish.imaging.ngff import CHUNK, create_image, fill_levels, open_image, tiles
from merfish.pipeline.images import STAINS, image_folder, saved_channels
from merfish.report import OVERVIEW, read_overview, read_record

if TYPE_CHECKING:
    import zarr

BRIGHTEST = "overview"  # channel that every run has: the brightest bit of each pixel
BLOCK = 1024  # pixels along y and x of a block of a lazy mosaic
ZARR, TIFF = (".zarr",), (".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Tile:
    """One channel of a field, (y, x) or (z, y, x), and the row and column of its first pixel in the mosaic."""

    image: Any
    row: int
    column: int

    def part(self, y: slice, x: slice) -> np.ndarray:
        """Some rows and columns of the field, (y, x) float32, maximum over planes."""
        part = np.asarray(self.image[..., y, x], np.float32)
        return part.max(axis=0) if part.ndim == 3 else part


def write_mosaic(out: Path, path: Path, channel: str) -> Path:
    """Write the mosaic of a channel of a run as OME-Zarr (.zarr) or OME-TIFF (.tif), atomically.

    out: folder of the run. channel: a stain or a bit that the run saved (``--save-images``), or "overview", the
    brightest bit of each pixel. Corrected positions of fields are rounded to whole pixels; overlapping fields are
    averaged with weights that increase with the distance to the border. Each resolution level is half as large as the
    previous one; coordinates are in micrometres.

    Raises InputError if the run has no such images, or for another suffix of ``path``.
    """
    if path.suffix.lower() not in ZARR + TIFF:
        raise InputError(f"{path}: expected a name that ends in .zarr (OME-Zarr) or .tif (OME-TIFF)")
    run = read_record(out)
    scale, fovs = run["microns_per_pixel"], sorted(map(int, run["fields"]))
    if not fovs:
        raise InputError(f"{out}: no field of the run has results")
    places = np.array(run["stage"]["positions"], float)[fovs]
    origin = results.mosaic_origin(run)
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


def section_images(out: Path) -> dict[str, tuple[Any, list[str]]]:
    """Mosaics of a run by name: lazy Dask arrays (c, y, x) and the names of their channels.

    ``stains``: those that the run saved (``--save-images``); ``overview``: the brightest bit of each pixel. Images that
    are missing for some field are omitted. The first pixel lies at `merfish.results.mosaic_origin`.
    """
    import dask.array as da

    run = read_record(out)
    fovs = sorted(map(int, run["fields"]))
    corners = (np.array(run["stage"]["positions"], float)[fovs] - results.mosaic_origin(run)) / run["microns_per_pixel"]
    channels = {"stains": _common_stains(out, fovs)}
    if all((results.field_folder(out, fov) / OVERVIEW).is_file() for fov in fovs):
        channels[BRIGHTEST] = [BRIGHTEST]
    return {
        kind: (da.stack([lazy_mosaic([field_image(out, fov, name) for fov in fovs], corners) for name in names]), names)
        for kind, names in channels.items()
        if fovs and names
    }


def _common_stains(out: Path, fovs: Sequence[int]) -> list[str]:
    """Names of the saved stains that all fields have, in the order of the first one."""
    stores = [image_folder(out, fov) / STAINS for fov in fovs]
    if not all(store.is_dir() for store in stores):
        return []
    first, *others = [open_image(store)[1] for store in stores]
    return [name for name in first if all(name in other for other in others)]


def field_image(out: Path, fov: int, channel: str) -> Any:
    """Channel of a field, an array (y, x) or (z, y, x) that is read when it is indexed.

    Raises InputError if the run did not save the channel.
    """
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
        """Data type of the pixels."""
        return np.dtype(self.level.dtype)

    def __getitem__(self, place: tuple[Any, slice, slice]) -> np.ndarray:
        return np.asarray(self.level[self.index, :, place[1], place[2]])


def blend(fields: Sequence[Tile], y: slice, x: slice, dtype: np.dtype[Any]) -> np.ndarray:
    """Part (y, x) of a mosaic: overlapping fields are averaged, weighted by the distance to their borders.

    Pixels outside all fields are 0.
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


def lazy_mosaic(images: list[Any], corners: np.ndarray) -> Any:
    """Lazy mosaic (y, x); corners: (field, 2) x, y of the first pixel of each image, pixels."""
    import dask
    import dask.array as da

    fields = [
        Tile(image, row, column)
        for image, (column, row) in zip(images, np.rint(corners).astype(int).tolist(), strict=True)
    ]
    height, width = np.max([(f.row + f.image.shape[-2], f.column + f.image.shape[-1]) for f in fields], axis=0).tolist()
    dtype = np.dtype(images[0].dtype)
    rows = [slice(y, min(y + BLOCK, height)) for y in range(0, height, BLOCK)]
    columns = [slice(x, min(x + BLOCK, width)) for x in range(0, width, BLOCK)]
    blocks = [
        [
            da.from_delayed(
                dask.delayed(partial(blend, [f for f in fields if _meet(f, y, x)], y, x, dtype), pure=False)(),
                (y.stop - y.start, x.stop - x.start),
                dtype,
            )
            for x in columns
        ]
        for y in rows
    ]
    return da.block(blocks)


def _meet(tile: Tile, y: slice, x: slice) -> bool:
    height, width = tile.image.shape[-2:]
    return tile.row < y.stop and tile.row + height > y.start and tile.column < x.stop and tile.column + width > x.start


def _from_border(length: int) -> np.ndarray:
    """Distance of each pixel to the nearer end, from 1."""
    place = np.arange(length, dtype=np.float32)
    return np.minimum(place, length - 1 - place) + 1


def write_tiff(
    path: Path, levels: Sequence[zarr.Array[Any]], channel: str, scale: float, origin: tuple[float, float]
) -> None:
    """Write levels (1, 1, y, x) as one tiled OME-TIFF, with the smaller levels as sub-images.

    scale: micrometre per pixel; origin: (y, x) of the first pixel, micrometre.
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
    """Yield the tiles of an image (1, 1, y, x) row by row, as TIFF stores them; edge tiles are padded with 0."""
    height, width = level.shape[2:]
    for y in range(0, height, CHUNK):
        band = np.asarray(level[0, 0, y : y + CHUNK])
        band = np.pad(band, ((0, CHUNK - len(band)), (0, -width % CHUNK)))
        for x in range(0, width, CHUNK):
            yield np.ascontiguousarray(band[:, x : x + CHUNK])


def _parent(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fspath(path.parent)
