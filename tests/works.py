"""Functions that worker processes of tests run; a module of its own, so that they can import it."""

from __future__ import annotations

import os
from pathlib import Path

from merfish.errors import InputError


def square(item: int) -> int:
    return item**2


def faulty(item: int) -> int:
    """1 has bad data, 2 kills its worker every time, 3 shows a mistake of the program."""
    if item == 1:
        raise InputError("bad data")
    if item == 2:
        os._exit(1)
    if item == 3:
        raise ZeroDivisionError("a mistake")
    return item


class DiesOnce:
    """Kills the first worker that is given an item."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        try:
            (self.folder / str(item)).touch(exist_ok=False)
        except FileExistsError:
            return item
        os._exit(1)
