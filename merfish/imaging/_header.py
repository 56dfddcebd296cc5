"""Shared by all readers of image files: the header they return, and the limit on the memory that a file may need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

MOST_FRAME = 1 << 29  # bytes of one frame, 16,384 x 16,384 px; a header that needs more is damaged
# Limits on the unpacked size of a compressed file, in bytes and relative to its own: camera noise compresses no further
FREE_BYTES, MOST_UNPACKED = 1 << 28, 50


@dataclass(frozen=True)
class Header:
    """The frames of a file. ``problem`` says why they cannot be read or trusted, and is empty if they can."""

    frames: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    problem: str = ""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def refuse_bomb(path: Path, unpacked: int, stored: int) -> None:
    """Raise InputError if a file of ``stored`` bytes claims ``unpacked`` bytes of memory, far more than images need."""
    if unpacked > max(FREE_BYTES, MOST_UNPACKED * stored):
        raise InputError(
            f"{path}: {stored} bytes on disk would unpack to {unpacked}; expected at most {MOST_UNPACKED} "
            "times as many: the file is damaged, or was made to exhaust the memory"
        )
