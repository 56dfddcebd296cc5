"""Reader of Zarr and OME-Zarr: metadata are checked against the files before zarr uses them."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from merfish._text import read_text, shown
from merfish.errors import InputError
from merfish.imaging._header import Block, Header, refuse_bomb, row_blocks

MOST_CHUNKS = 1_000_000
MOST_METADATA = 1 << 20  # bytes
_MOST_AXES = 8
# Codecs of chunks whose unpacked size is stored in the chunk or can be counted in advance, in Zarr formats 2 and 3
_CODECS = {None, "blosc", "zstd", "lz4", "gzip", "zlib", "bytes", "crc32c", "sharding_indexed", "transpose"}
_PIECE = 1 << 20  # bytes unpacked at a time while counting


@dataclass(frozen=True)
class Store:
    """An array in a folder, as described by its metadata, and the files of its chunks.

    version: of the format, 2 or 3. axes: their names, one letter each, or "". codecs: by name. n_chunks: including
    those without a file. stored: total size of the files, bytes.
    """

    folder: Path
    version: Literal[2, 3]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: str
    codecs: tuple[str, ...]
    files: tuple[Path, ...]
    n_chunks: int
    stored: int


def open_store(path: Path) -> Store:
    """Open the array of a Zarr store, or the full resolution of an OME-Zarr image, without reading a chunk.

    Raises InputError if the metadata are not supported or claim far more data than the files can contain, or if a file
    is not a regular file or is a link to a path outside the folder.
    """
    version, metadata = _metadata(path)
    axes = "".join(str(name)[:1] for name in names) if (names := metadata.get("dimension_names")) and all(names) else ""
    folder = path
    if metadata.get("node_type", "array") == "group":
        folder, axes = _full_resolution(path, metadata.get("attributes") or {})
        version, metadata = _metadata(folder)
    shape = _sizes(folder, "shape", metadata.get("shape"), 0)
    sides = metadata.get("chunks") if version == 2 else _place(metadata, "chunk_grid", "configuration", "chunk_shape")
    chunk = _sizes(folder, "chunks", sides, 1)
    if len(shape) != len(chunk) or len(shape) > _MOST_AXES:
        raise InputError(f"{folder}: shape {shape} and chunks {chunk} do not match")
    dtype = _dtype(folder, metadata.get("dtype" if version == 2 else "data_type"))
    codecs = _codecs(folder, version, metadata)
    files, stored = _chunk_files(path, folder, version, len(shape))
    grid = tuple(-(-side // size) for side, size in zip(shape, chunk, strict=True))
    n_chunks = math.prod(grid)
    if n_chunks > MOST_CHUNKS:
        raise InputError(f"{folder}: shape {shape} in chunks of {chunk}: more than {MOST_CHUNKS} chunks")
    refuse_bomb(folder, math.prod(chunk) * dtype.itemsize, stored)
    inside = [file for place, file in files.items() if all(map(int.__lt__, place, grid))]
    return Store(folder, version, shape, chunk, dtype, axes, codecs, tuple(inside), n_chunks, stored)


def _metadata(folder: Path) -> tuple[Literal[2, 3], dict[str, Any]]:
    """(version, metadata) of an array or group; metadata of version 2 are translated to those of version 3."""
    if (folder / "zarr.json").exists():
        return 3, _json(folder / "zarr.json")
    if (folder / ".zarray").exists():
        return 2, _json(folder / ".zarray")
    if (folder / ".zgroup").exists():
        attributes = folder / ".zattrs"
        return 2, {"node_type": "group", "attributes": _json(attributes) if attributes.exists() else {}}
    raise InputError(f"{folder}: not a Zarr store: it has neither zarr.json nor .zarray or .zgroup")


def _json(path: Path) -> dict[str, Any]:
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise InputError(f"{path}: links to {os.path.realpath(path)}, outside the Zarr store")
    try:
        values = json.loads(read_text(path, "metadata of a Zarr store", MOST_METADATA))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object, got {type(values).__name__}")
    return values


def _place(values: Any, *keys: Any) -> Any:
    """Look up a value in nested objects and lists; None if it is missing."""
    for key in keys:
        if isinstance(values, dict) or (isinstance(values, list) and isinstance(key, int) and key < len(values)):
            values = values.get(key) if isinstance(values, dict) else values[key]
        else:
            return None
    return values


def _full_resolution(path: Path, attributes: dict[str, Any]) -> tuple[Path, str]:
    """Find the folder of the first array of an OME-Zarr image, and the names of its axes."""
    image = _place(attributes.get("ome") or attributes, "multiscales", 0)
    if image is None:
        raise InputError(f"{path}: a Zarr group without OME multiscales; expected an array or an OME-Zarr image")
    name = _place(image, "datasets", 0, "path")
    # a path below the store, never up or elsewhere
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name):
        raise InputError(f"{path}: multiscales: expected the path of an array in the store, got {shown(name)}")
    folder = path / name
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
        raise InputError(f"{folder}: links to {os.path.realpath(folder)}, outside the Zarr store")
    axes = _place(image, "axes") or []
    names = [str(axis.get("name", "") if isinstance(axis, dict) else axis) for axis in axes]
    return folder, "".join(name[:1] for name in names)


def _sizes(folder: Path, field: str, values: Any, least: int) -> tuple[int, ...]:
    fits = isinstance(values, list) and len(values) <= _MOST_AXES
    if not fits or not all(type(value) is int and least <= value < 1 << 40 for value in values):
        raise InputError(
            f"{folder}: {field}: expected integers from {least}, at most {_MOST_AXES}, got {shown(values)}"
        )
    return tuple(values)


def _dtype(folder: Path, name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or not re.fullmatch(r"[<>|]?[uif][1248]|u?int(8|16|32|64)|float(16|32|64)", name):
        raise InputError(f"{folder}: data type: expected integers or real numbers such as uint16, got {shown(name)}")
    return np.dtype(name)


def _codecs(folder: Path, version: int, metadata: dict[str, Any]) -> tuple[str, ...]:
    if version == 2:
        listed = [*(metadata.get("filters") or []), *([metadata["compressor"]] if metadata.get("compressor") else [])]
        names = [_place(codec, "id") for codec in listed]
    else:
        names = [_place(codec, "name") for codec in metadata.get("codecs") or []]
    unknown = [name for name in names if not isinstance(name, str) or name not in _CODECS]
    if unknown:
        raise InputError(f"{folder}: codec {shown(unknown[0])} is not supported; expected blosc, zstd, lz4 or gzip")
    return tuple(names)


def _chunk_files(root: Path, folder: Path, version: int, n_axes: int) -> tuple[dict[tuple[int, ...], Path], int]:
    """Find the files named as chunks, by their index in the grid, and their total size in bytes."""
    found: dict[tuple[int, ...], Path] = {}
    stored, number = 0, 0
    inside = os.path.realpath(root)
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            number += 1
            path = os.path.join(parent, name)
            if number > 2 * MOST_CHUNKS:
                raise InputError(f"{folder}: more than {2 * MOST_CHUNKS} files")
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not Path(os.path.realpath(path)).is_relative_to(inside):
                    raise InputError(f"{path}: links to {os.path.realpath(path)}, outside the Zarr store")
                status = os.stat(path)
                if stat.S_ISDIR(status.st_mode):
                    raise InputError(f"{path}: a link to a folder, expected files and folders in a Zarr store")
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise InputError(f"{path}: expected a regular file in a Zarr store")
            place = _chunk_place(os.path.relpath(path, folder), version, n_axes)
            if place is not None and stat.S_ISREG(status.st_mode):
                found[place] = Path(path)
                stored += status.st_size
    return found, stored


def _chunk_place(name: str, version: int, n_axes: int) -> tuple[int, ...] | None:
    parts = re.split(r"[./\\]", name)
    if version == 3 and parts[0] == "c":
        parts = parts[1:]
    if len(parts) != n_axes or not all(re.fullmatch("[0-9]{1,12}", part) for part in parts):
        return None
    return tuple(map(int, parts))


def read_header(path: Path) -> Header:
    """Header of a Zarr store, from its metadata and the names of its files."""
    store = open_store(path)
    if len(store.shape) < 2:
        return Header(0, (0, 0), store.dtype, f"an array of shape {store.shape}, expected (frame, y, x)")
    return Header(
        math.prod(store.shape[:-2]),
        (store.shape[-2], store.shape[-1]),
        store.dtype.newbyteorder("="),
        problem_of(store),
    )


def problem_of(store: Store) -> str:
    """Problem of a store with missing chunks, which zarr would read as zeros; "" if there are none."""
    missing = store.n_chunks - len(store.files)
    return f"{missing} of its {store.n_chunks} chunks are missing" if missing else ""


def read_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    """Read frames (frame, y, x) by their numbers, which count along all axes before y and x."""
    store = open_store(path)
    array = _checked_array(store)
    places = [np.unravel_index(frame, store.shape[:-2]) if len(store.shape) > 2 else () for frame in frames]
    return np.stack([np.asarray(array[place]) for place in places])


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the index of a frame and some of its rows (row, x), block by block; chunks without a file are filled."""
    array = _checked_array(open_store(path))
    return row_blocks(array, array.chunks[-2] if array.ndim > 1 else 1)


def read_stack(path: Path) -> tuple[np.ndarray, str]:
    """Read the whole array and the names of its axes."""
    store = open_store(path)
    if problem := problem_of(store):
        raise InputError(f"{path}: {problem}")
    refuse_bomb(path, math.prod(store.shape) * store.dtype.itemsize, store.stored)
    return np.asarray(_checked_array(store)[...]), store.axes


def _checked_array(store: Store) -> Any:
    """Open the array with zarr, if it is the one that was checked and its chunks unpack to the right size."""
    import zarr

    array = zarr.open_array(str(store.folder), mode="r", zarr_format=store.version)
    if tuple(array.shape) != store.shape or np.dtype(array.dtype) != store.dtype:
        raise InputError(f"{store.folder}: changed while it was read")
    if "sharding_indexed" not in store.codecs:
        expected = math.prod(store.chunk) * store.dtype.itemsize
        for file in store.files:
            _check_chunk(file, store.codecs, expected)
    return array


def _check_chunk(file: Path, codecs: tuple[str, ...], expected: int) -> None:
    """Refuse a chunk that would not unpack to ``expected`` bytes; its header is used if it states the size."""
    found: int | None = None
    if "gzip" in codecs or "zlib" in codecs:
        found = _unpacked_size(file, expected)
    else:
        with open(file, "rb") as handle:
            head = handle.read(32)
        if "blosc" in codecs and len(head) >= 16:
            found = struct.unpack("<I", head[4:8])[0]
        elif "lz4" in codecs and len(head) >= 4:
            found = struct.unpack("<I", head[:4])[0]
        elif "zstd" in codecs:
            found = _zstd_size(head)
        elif not {"blosc", "lz4", "zstd"} & set(codecs):
            found = file.stat().st_size - (4 if "crc32c" in codecs else 0)
    if found != expected:
        raise InputError(
            f"{file}: a chunk of {'unknown size' if found is None else f'{found} bytes'}, expected {expected}"
        )


def _zstd_size(head: bytes) -> int | None:
    """Content size stated in a Zstandard frame (RFC 8878, 3.1.1.1); None if there is none."""
    if len(head) < 5 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    single = flags >> 5 & 1
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    length = (1 if single else 0, 2, 4, 8)[flags >> 6]
    if not length or len(head) < start + length:
        return None
    return int.from_bytes(head[start : start + length], "little") + (256 if length == 2 else 0)


def _unpacked_size(file: Path, expected: int) -> int:
    """Count the bytes that a gzip or zlib file unpacks to, and stop just beyond ``expected``."""
    total, data = 0, file.read_bytes()
    while data and total <= expected:
        unpacker = zlib.decompressobj(47)  # either format
        while not unpacker.eof and total <= expected:
            piece = unpacker.decompress(data, _PIECE)
            total, data = total + len(piece), unpacker.unconsumed_tail
            if not piece and not data:
                return total  # truncated
        data = unpacker.unused_data
    return total
