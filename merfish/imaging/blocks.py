"""Read images that need not fit in memory, in blocks of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from merfish.imaging import _tiff, _zarr
from merfish.imaging._header import Block, row_blocks
from merfish.imaging.images import load_npy, read_frames, read_header, understood

__all__ = ["Block", "read_blocks", "row_blocks"]


def read_blocks(path: str | os.PathLike[str]) -> Iterator[Block]:
    """Yield the index of a frame and some of its rows (row, x), native byte order, block by block in file order.

    Frames are counted as in `merfish.imaging.images.read_frames`, whose limit on their size does not apply. Chunks of a
    Zarr store that have no file contain its fill value. Raises InputError naming the file if it is damaged.
    """
    path = Path(path)
    with understood(path):
        for frame, rows in _READERS.get(path.suffix.lower(), _whole_frames)(path):
            yield frame, rows.astype(rows.dtype.newbyteorder("="), copy=False)


def _npy_blocks(path: Path) -> Iterator[Block]:
    return row_blocks(load_npy(path))


def _whole_frames(path: Path) -> Iterator[Block]:
    for frame in range(read_header(path).frames):
        yield frame, read_frames(path, [frame])[0]


_READERS = {".npy": _npy_blocks, ".zarr": _zarr.read_blocks, ".tif": _tiff.read_blocks, ".tiff": _tiff.read_blocks}
