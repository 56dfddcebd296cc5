"""Common parts of all image readers: the header they return, blocks of rows, and limits on memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

MOST_FRAME = 1 << 29  # bytes of one frame, 16,384 x 16,384 px; a header that needs more is damaged
Block = tuple[int, np.ndarray]  # index of a frame, and some of its rows (row, x)
MOST_BLOCK = 1 << 26  # bytes of the rows that are read at once, if the layout of the file permits
# Limits on the unpacked size of a compressed file, in bytes and relative to its size; camera noise does not compress
# further.
FREE_BYTES, MOST_UNPACKED = 1 << 28, 50


@dataclass(frozen=True)
class Header:
    """Frames of a file: number, shape (y, x), dtype. problem: why they cannot be read or trusted; empty if they can."""

    frames: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    problem: str = ""

    @property
    def frame_bytes(self) -> int:
        """Size of one frame in memory, bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def refuse_bomb(path: Path, unpacked: int, stored: int) -> None:
    """Raise InputError if a file of ``stored`` bytes claims ``unpacked`` bytes of memory, far more than images need."""
    if unpacked > max(FREE_BYTES, MOST_UNPACKED * stored):
        raise InputError(
            f"{path}: {stored} bytes on disk would unpack to {unpacked}; expected at most {MOST_UNPACKED} "
            "times as many: the file is damaged or malicious"
        )


def row_blocks(array: Any, multiple: int = 1) -> Iterator[Block]:
    """Yield the index of a frame and some of its rows (row, x), block by block; array: (..., y, x), can be sliced.

    multiple: the number of rows of a block is a multiple of it, such as the height of a chunk. Raises InputError if the
    array has fewer than two axes.
    """
    if array.ndim < 2:
        raise InputError(f"an array of shape {array.shape}, expected (frame, y, x)")
    *before, height, width = array.shape
    step = max(1, MOST_BLOCK // max(1, multiple * width * array.dtype.itemsize)) * multiple
    for frame, place in enumerate(np.ndindex(*before)):
        for top in range(0, height, step):
            yield frame, np.asarray(array[(*place, slice(top, top + step))])
