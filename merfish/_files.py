"""Files: written whole or not at all, and found only where they may be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merfish.errors import InputError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it over ``path``.

    A crash or an error leaves whatever stood at ``path`` before, and no temporary file. A folder written at the
    temporary path replaces a folder at ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    part = work / path.name
    try:
        yield part
        _flush(part)
        if path.is_dir() and part.is_dir():
            path.rename(work / "replaced")
        part.replace(path)
        _flush(path.parent, recurse=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path, recurse: bool = True) -> None:
    if recurse and path.is_dir():
        for child in path.iterdir():
            _flush(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_escape(root: Path, entry: os.DirEntry[str]) -> None:
    """Raise InputError for a link that leads out of the experiment's folder."""
    # realpath, unlike resolve, also answers for links that lead in a circle
    if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(root)):
        raise InputError(f"{entry.path}: links to {os.path.realpath(entry.path)}, outside the experiment's folder")
