"""Atomic writing of files and folders, JSON, and checks of links."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from merfish.errors import InputError

K = TypeVar("K")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it over ``path``.

    After a crash or an error, ``path`` is unchanged and no temporary file is left. A folder written at the temporary
    path replaces a folder at ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    part = work / path.name
    try:
        yield part
        flush(part)
        if path.is_dir() and part.is_dir():
            path.rename(work / "replaced")
        part.replace(path)
        flush(path.parent, recurse=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def flush(path: Path, recurse: bool = True) -> None:
    """Flush a file, or a folder and its contents, to disk."""
    if recurse and path.is_dir():
        for child in path.iterdir():
            flush(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_escape(root: Path, entry: os.DirEntry[str]) -> None:
    """Raise InputError for a link to a path outside the experiment's folder."""
    # unlike resolve, realpath does not raise for cyclic links
    if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(root)):
        raise InputError(f"{entry.path}: links to {os.path.realpath(entry.path)}, outside the experiment's folder")


LITTER = re.compile(r"\..+\.[a-z0-9_]{8}")  # temporary folders of a killed `whole_file`


def sweep(folder: Path) -> None:
    """Remove the temporary folders of killed writers from a folder; no other process may be writing there."""
    for entry in list(os.scandir(folder)) if folder.is_dir() else []:
        if LITTER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that JSON cannot represent (NaN, infinity) become null.

    The items of a mapping and of the mappings in it are written on one line each; only one line is in memory at a time.
    """
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(_json_lines(value, 2))
        file.write("\n")


def _json_lines(value: Any, levels: int) -> Iterator[str]:
    if not (levels and isinstance(value, Mapping) and value):
        yield json.dumps(plain(value), allow_nan=False)
        return
    indent = " " * (3 - levels)
    for k, (key, item) in enumerate(value.items()):
        yield f"{',' if k else '{'}\n{indent}{json.dumps(str(key))}: "
        yield from _json_lines(item, levels - 1)
    yield f"\n{indent[1:]}}}"


class Packed(Mapping[K, Any]):
    """JSON values stored compressed (see `pack`), in a tenth of the memory, and decompressed on each access."""

    def __init__(self, packed: Mapping[K, bytes]) -> None:
        self._packed = packed

    def __getitem__(self, key: K) -> Any:
        return json.loads(zlib.decompress(self._packed[key]))

    def __iter__(self) -> Iterator[K]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def pack(value: Any) -> bytes:
    """Compress a JSON value."""
    return zlib.compress(json.dumps(value).encode(), 1)


def plain(value: Any) -> Any:
    """Convert values of Python and NumPy types to JSON types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error


def read_json_packed(path: Path, name: str) -> Any:
    """As `read_json`, but the values of member ``name``, an object, are `Packed`; they are parsed one at a time."""

    def member(key: str, text: str, at: int) -> tuple[Any, int]:
        if key != name or text[at] != "{":
            return _JSON.raw_decode(text, at)
        values, end = _decode_object(text, at, lambda _, text, at: _packed(*_JSON.raw_decode(text, at)))
        return Packed(values), end

    try:
        text = path.read_text(encoding="utf-8")
        if not text.startswith("{"):
            return json.loads(text)
        value, end = _decode_object(text, 0, member)
        if end < len(text.rstrip()):
            raise json.JSONDecodeError("expected the end", text, end)
        return value
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error


_JSON = json.JSONDecoder()


def _packed(value: Any, end: int) -> tuple[bytes, int]:
    return pack(value), end


def _decode_object(
    text: str, at: int, member: Callable[[str, str, int], tuple[Any, int]]
) -> tuple[dict[str, Any], int]:
    """Decode the JSON object at ``text[at]``; ``member(key, text, at)`` returns each value and its end.

    Returns the object and its end. Raises ValueError or IndexError if the text is not JSON.
    """
    values: dict[str, Any] = {}
    at = _after(text, at, "{")
    while text[at] != "}":
        if values:
            at = _after(text, at, ",")
        key, at = _JSON.raw_decode(text, at)
        if not isinstance(key, str):
            raise json.JSONDecodeError("expected a name", text, at)
        at = _after(text, at, ":")
        values[key], at = member(key, text, at)
        at = _after(text, at, "")
    return values, at + 1


def _after(text: str, at: int, sign: str) -> int:
    """Position after ``sign`` and the white space around it."""
    found = re.compile(rf"\s*{re.escape(sign)}\s*", re.ASCII).match(text, at)
    if found is None:
        raise json.JSONDecodeError(f"expected {sign!r}", text, at)
    return found.end()


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
