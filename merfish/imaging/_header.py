"""What every reader of image files shares: the header it gives, and how much memory a file may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

MOST_FRAME = 1 << 29  # bytes of one frame, 16,384 x 16,384 px; a header that asks for more is damaged
# A compressed file may unpack to so many bytes, or to so many times its own: noise of cameras does not compress further
FREE_BYTES, MOST_UNPACKED = 1 << 28, 50


@dataclass(frozen=True)
class Header:
    """What a file says about its frames. ``problem`` is empty, or why its frames cannot be read or trusted."""

    frames: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    problem: str = ""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def refuse_bomb(path: Path, unpacked: int, stored: int) -> None:
    """Raise InputError if a file of ``stored`` bytes asks for ``unpacked`` bytes of memory, far more than images do."""
    if unpacked > max(FREE_BYTES, MOST_UNPACKED * stored):
        raise InputError(
            f"{path}: {stored} bytes on disk say that they unpack to {unpacked}; expected at most {MOST_UNPACKED} "
            "times as much: the file is damaged or made to fill the memory"
        )
