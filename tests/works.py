"""Functions that worker processes of tests run, in a module that they can import."""

from __future__ import annotations

import os
from pathlib import Path

from merfish.errors import InputError


def square(item: int) -> int:
    return item**2


def faulty(item: int) -> int:
    """Return the item; 1 raises InputError, 2 kills its worker every time, 3 raises an unexpected error."""
    if item == 1:
        raise InputError("bad data")
    if item == 2:
        os._exit(1)
    if item == 3:
        raise ZeroDivisionError("a mistake")
    return item


class DiesOnce:
    """Kill the first worker that is given an item."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        try:
            (self.folder / str(item)).touch(exist_ok=False)
        except FileExistsError:
            return item
        os._exit(1)
