"""Atomic writing of files and folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; on success, flush it and rename it to ``path``.

    After a crash or an error, ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    part = work / path.name
    try:
        yield part
        for item in [part, *(part.rglob("*") if part.is_dir() else ())]:
            _flush(item)
        if path.is_dir() and part.is_dir():
            path.rename(work / "replaced")
        part.replace(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
