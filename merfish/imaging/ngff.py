"""OME-Zarr images (NGFF 0.5, Zarr 3), written tile by tile; each level has half the resolution of the previous one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merfish._files import read_json

if TYPE_CHECKING:
    import zarr

TILE, CHUNK = 2048, 512  # pixels along y and x of a file (shard), and of a chunk
SMALLEST = 256  # largest length of the longer side of the last level, pixels


def create_image(
    path: Path,
    shape: tuple[int, int, int, int],
    dtype: str,
    channels: Sequence[str],
    microns: tuple[float, float, float],
    origin: tuple[float, float] = (0.0, 0.0),
) -> list[zarr.Array[Any]]:
    """Create an empty image and return its levels, the largest first, to be filled.

    shape: (c, z, y, x); channels: their names; microns: (z, y, x) spacing of pixels, micrometre; origin: (y, x) of the
    centre of the first pixel, micrometre. Write whole tiles (`tiles`) of the first level, then call `fill_levels`.
    """
    import zarr
    from zarr.codecs import BloscCodec

    n_levels = count_levels(shape)
    scales = [[1.0, microns[0], microns[1] * 2**k, microns[2] * 2**k] for k in range(n_levels)]
    # the centre of a larger pixel lies between those of the pixels that it averages
    places = [
        [0.0, 0.0, *(o + m * (2**k - 1) / 2 for o, m in zip(origin, microns[1:], strict=True))] for k in range(n_levels)
    ]
    multiscale = {
        "name": path.stem,
        "axes": [{"name": "c", "type": "channel"}]
        + [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"],
        "datasets": [
            {
                "path": str(k),
                "coordinateTransformations": [
                    {"type": "scale", "scale": scales[k]},
                    {"type": "translation", "translation": places[k]},
                ],
            }
            for k in range(n_levels)
        ],
    }
    omero = {"channels": [{"label": name, "color": "FFFFFF", "active": k == 0} for k, name in enumerate(channels)]}
    attributes = {"ome": {"version": "0.5", "multiscales": [multiscale], "omero": omero}}
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    return [
        group.create_array(
            str(k),
            shape=(*shape[:2], *(-(-side // 2**k) for side in shape[2:])),
            chunks=(1, 1, CHUNK, CHUNK),
            shards=(1, shape[1], TILE, TILE),
            dtype=dtype,
            compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
            dimension_names=list("czyx"),
        )
        for k in range(n_levels)
    ]


def count_levels(shape: Sequence[int]) -> int:
    """Number of levels of an image (..., y, x), each half as large as the previous one, down to `SMALLEST`."""
    n_levels = 1
    while max(shape[-2:]) >> (n_levels - 1) > SMALLEST:
        n_levels += 1
    return n_levels


def open_image(path: Path) -> tuple[list[zarr.Array[Any]], list[str]]:
    """Levels (c, z, y, x) of an image made by `create_image`, the largest first, and the names of its channels."""
    import zarr

    ome = read_json(path / "zarr.json")["attributes"]["ome"]
    levels = [zarr.open_array(path / entry["path"], mode="r") for entry in ome["multiscales"][0]["datasets"]]
    return levels, [channel["label"] for channel in ome["omero"]["channels"]]


def tiles(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the parts (y, x) of an image (..., y, x) that are stored in one file each."""
    height, width = shape[-2:]
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            yield slice(y, min(y + TILE, height)), slice(x, min(x + TILE, width))


def fill_levels(levels: Sequence[zarr.Array[Any]]) -> None:
    """Fill all levels but the first, tile by tile; each pixel is the mean of the pixels that it covers."""
    for fine, coarse in pairwise(levels):
        for channel in range(coarse.shape[0]):
            for y, x in tiles(coarse.shape):
                part = fine[channel, :, 2 * y.start : 2 * y.stop, 2 * x.start : 2 * x.stop]
                coarse[channel, :, y, x] = halve(np.asarray(part))


def halve(image: np.ndarray) -> np.ndarray:
    """Mean of blocks of 2 x 2 pixels of an image (..., y, x), smaller at an odd end; integers are rounded."""
    odd = [(0, 0)] * (image.ndim - 2) + [(0, side % 2) for side in image.shape[-2:]]
    even = np.pad(image, odd, mode="edge").astype(np.float32)
    mean = (even[..., ::2, ::2] + even[..., 1::2, ::2] + even[..., ::2, 1::2] + even[..., 1::2, 1::2]) / 4
    return mean.astype(image.dtype) if image.dtype.kind == "f" else np.rint(mean).astype(image.dtype)
