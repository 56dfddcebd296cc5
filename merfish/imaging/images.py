"""Access to image files: TIFF, OME-TIFF, .dax, .nd2, .npy, Zarr and OME-Zarr.

An image file is treated as a movie: frames are counted from 0 in file order, whatever the names of its axes, as in data
organizations. Headers are read separately, so that a whole experiment can be checked first.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from merfish._text import kind_of
from merfish.errors import InputError
from merfish.imaging import _tiff, _zarr
from merfish.imaging._header import MOST_FRAME, Header, refuse_bomb

__all__ = ["SUFFIXES", "Header", "fingerprint", "is_constant", "read_frames", "read_header", "read_stack"]

_SAMPLE = 1 << 16  # bytes
_MAX_INF = 1 << 16  # bytes of the text beside a .dax


def read_header(path: str | os.PathLike[str], *, most: float = MOST_FRAME) -> Header:
    """Read number, (height, width) and dtype of a file's frames from its header; truncated files are detected.

    Raises InputError if the file cannot be interpreted at all, or if a frame needs more than ``most`` bytes.
    """
    path = Path(path)
    with understood(path):
        header: Header = _FORMATS[_suffix(path)][0](path)
        size = f"{header.shape[1]} x {header.shape[0]} px"
        if header.frame_bytes > most:
            raise InputError(f"{path}: its header claims frames of {size}, {header.frame_bytes} bytes each")
        if not header.problem and (header.frame_bytes == 0 or header.frames == 0):
            return replace(header, problem=f"{header.frames} frames of {size}: no pixels")
        return header


def read_frames(path: str | os.PathLike[str], frames: Sequence[int]) -> np.ndarray:
    """Read frames by their number from 0, as (frame, y, x) in the file's dtype and native byte order.

    Raises InputError for a frame that is missing or truncated.
    """
    path = Path(path)
    with understood(path):
        found = read_header(path)
        beyond = [frame for frame in frames if not 0 <= frame < found.frames]
        if found.problem or beyond:
            raise InputError(
                f"{path}: " + (found.problem or f"frame {beyond[0]} was requested, but it has {found.frames} frames")
            )
        if path.is_file():  # in Zarr each chunk is checked
            refuse_bomb(path, len(set(frames)) * found.frame_bytes, path.stat().st_size)
        images = np.asarray(_FORMATS[_suffix(path)][1](path, frames, found))
        if images.shape != (len(frames), *found.shape):
            raise InputError(f"{path}: images of shape {images.shape}, its header says {(len(frames), *found.shape)}")
    return images.astype(images.dtype.newbyteorder("="), copy=False)


def fingerprint(path: str | os.PathLike[str], *, whole: bool) -> tuple[int, bytes]:
    """Size in bytes and SHA-256 of a file or Zarr folder; of its ends and middle only if not ``whole``.

    Different images almost never agree in all three parts, because cameras have noise: compare these first.
    """
    path = Path(path)
    parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest, size = hashlib.sha256(), 0
    for part in parts:
        with open(part, "rb") as file:
            length = part.stat().st_size
            size += length
            if whole:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for start in (0, (length - _SAMPLE) // 2, length - _SAMPLE):
                file.seek(max(0, start))
                digest.update(file.read(_SAMPLE))
    return size, digest.digest()


def is_constant(path: str | os.PathLike[str]) -> bool:
    """Whether every frame of a file has a single value (lens cap, saturated camera)."""
    return all(np.ptp(read_frames(path, [frame])) == 0 for frame in range(read_header(path).frames))


def read_stack(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one registered stack, (bit, y, x) or (bit, z, y, x), any real dtype, from .npy, TIFF, OME-TIFF or Zarr.

    If the file names its axes, they must be one channel axis (C, or any name except z, y and x), optionally z, and y
    and x, in any order; unnamed axes are taken in this order. Other axes of length 1 are dropped.

    Raises InputError for other axes, for truncated files and for values that are not real numbers.
    """
    path = Path(path)
    with understood(path):
        suffix = _suffix(path)
        if suffix == ".npy":
            stack, axes = np.array(load_npy(path)), ""
        elif suffix == ".zarr":
            stack, axes = _zarr.read_stack(path)
        elif suffix in (".tif", ".tiff"):
            stack, axes = _tiff.read_stack(path)
        else:
            raise InputError(f"{path}: expected a stack as .npy, .tif, .ome.tif or .zarr")
    stack = _in_order(path, stack, axes.upper())
    if stack.dtype.kind not in "uif":
        raise InputError(f"{path}: expected integers or real numbers, got {stack.dtype}")
    if not stack.size:
        raise InputError(f"{path}: the stack is empty, shape {stack.shape}")
    return stack.astype(stack.dtype.newbyteorder("="), copy=False)


def _in_order(path: Path, stack: np.ndarray, axes: str) -> np.ndarray:
    """Reorder axes to (bit, y, x) or (bit, z, y, x), by their names if the file gives them."""
    if len(axes) == stack.ndim and {"Y", "X"} <= set(axes):
        kept = [i for i, name in enumerate(axes) if name in "YXZ" or stack.shape[i] > 1]
        channels = [i for i in kept if axes[i] not in "ZYX"]
        if not channels:
            # Tools without the concept of bits save them as a z series without channels.
            channels = [i for i in kept if axes[i] == "Z"]
        if len(channels) == 1:
            rest = [axes.index(name) for name in "ZYX" if name in axes and axes.index(name) not in channels]
            stack = stack.transpose([*channels, *rest, *(set(range(stack.ndim)) - {*channels, *rest})])
            stack = stack.reshape(stack.shape[: 1 + len(rest)])
        else:
            raise InputError(f"{path}: expected axes bit,y,x or bit,z,y,x; got {axes} of shape {stack.shape}")
    while stack.ndim > 4 and stack.shape[0] == 1:
        stack = stack[0]
    if stack.ndim not in (3, 4):
        raise InputError(f"{path}: expected axes bit,y,x or bit,z,y,x; got an array of shape {stack.shape}")
    return stack


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Convert any exception of a reader to an InputError that names the file."""
    _refuse_special(path)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an image: {error or type(error).__name__}") from error


def _refuse_special(path: Path) -> None:
    """Raise InputError for missing files, and for those that may be endless: pipes, sockets, devices."""
    try:
        status = os.stat(path)
    except OSError as error:
        if path.is_symlink():
            raise InputError(f"{path}: links to {os.readlink(path)}: {error.strerror}") from error
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise InputError(f"{path}: {why}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{path}: no such file: {error}") from error
    folder = path.suffix.lower() == ".zarr"
    if not (stat.S_ISDIR(status.st_mode) if folder else stat.S_ISREG(status.st_mode)):
        raise InputError(f"{path}: expected {'a folder' if folder else 'a regular file'}, got {kind_of(status)}")


def _refuse(path: Path, problem: str) -> None:
    if problem:
        raise InputError(f"{path}: {problem}")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path}: unsupported image format; expected one of {', '.join(_FORMATS)}")
    return suffix


# --- .dax: frames of raw 16-bit integers; size and byte order are in the .inf file beside it.


def _dax_info(path: Path) -> tuple[int, tuple[int, int], np.dtype[Any]]:
    inf = path.with_suffix(".inf")
    if not inf.exists():
        raise InputError(f"{inf}: missing; it must say frame dimensions, number of frames and data type of {path.name}")
    if os.path.dirname(os.path.realpath(inf)) != os.path.dirname(os.path.realpath(path)):
        raise InputError(f"{inf}: links to a file outside the folder of {path.name}")
    _refuse_special(inf)
    with open(inf, encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_INF)
    size = re.search(r"frame dimensions\s*=\s*([0-9]{1,9})\s*x\s*([0-9]{1,9})\b", text, re.IGNORECASE)
    count = re.search(r"number of frames\s*=\s*([0-9]{1,9})\b", text, re.IGNORECASE)
    kind = re.search(r"data type\s*=\s*16 bit integers \(binary, (little|big) endian\)", text, re.IGNORECASE)
    for field, found in (("frame dimensions = W x H", size), ("number of frames = N", count)):
        if not found:
            raise InputError(f"{inf}: no line '{field}'")
    if not kind:
        raise InputError(f"{inf}: no line 'data type = 16 bit integers (binary, little|big endian)'")
    assert size is not None
    assert count is not None
    order = ">u2" if kind[1].lower() == "big" else "<u2"
    return int(count[1]), (int(size[2]), int(size[1])), np.dtype(order)


def _dax_header(path: Path) -> Header:
    frames, shape, dtype = _dax_info(path)
    expected, found = frames * shape[0] * shape[1] * 2, path.stat().st_size
    problem = ""
    if not expected:
        problem = f"its .inf file says {frames} frames of {shape[1]} x {shape[0]}"
    elif found != expected:
        verb = "truncated" if found < expected else "too long"
        problem = (
            f"{verb}: {found} bytes, its .inf file says {frames} frames of {shape[1]} x {shape[0]}: {expected} bytes"
        )
    elif _wrong_byte_order(np.memmap(path, dtype, "r", 0, (frames, *shape))):
        problem = "wrong byte order suspected: with its bytes swapped the image is much smoother"
    return Header(frames, shape, dtype.newbyteorder("="), problem)


def _wrong_byte_order(movie: np.ndarray) -> bool:
    """Whether neighbouring pixels are far more similar with swapped bytes, in some rows of a few frames."""
    middle = movie.shape[1] // 2
    rows = movie[:: max(1, len(movie) // 8), max(0, middle - 8) : middle + 8]
    native = rows.astype(np.uint16)

    def roughness(pixels: np.ndarray) -> float:
        return float(np.abs(np.diff(pixels.astype(np.int64), axis=-1)).mean()) if pixels.shape[-1] > 1 else 0.0

    return roughness(native) > 4 * roughness(native.byteswap()) > 0


def _dax_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    _, _, dtype = _dax_info(path)
    movie = np.memmap(path, dtype, "r", 0, (header.frames, *header.shape))
    return np.stack([movie[frame] for frame in frames])


# --- .nd2 (Nikon): a sequence of images, each with its channels in order.


def _open_nd2(path: Path) -> Any:
    try:
        import nd2
    except ImportError:
        raise InputError(f"{path}: reading .nd2 needs the package nd2: pip install 'merfish[images]'") from None
    return nd2.ND2File(path)


def _nd2_channels(file: Any) -> int:
    return int(file.sizes.get("C", 1))


def _nd2_header(path: Path) -> Header:
    with _open_nd2(path) as file:
        sizes = dict(file.sizes)
        images = math.prod(int(size) for axis, size in sizes.items() if axis not in "CYXS")
        problem = "colour images (RGB), expected one value per pixel" if "S" in sizes else ""
        if sizes.get("P", 1) > 1:
            problem = f"has {sizes['P']} stage positions, expected one file for each field"
        shape = (file.attributes.heightPx, file.attributes.widthPx)
        return Header(images * _nd2_channels(file), shape, np.dtype(file.dtype), problem)


def _nd2_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    with _open_nd2(path) as file:
        n = _nd2_channels(file)
        images = [np.array(file.read_frame(frame // n)).reshape(n, *header.shape)[frame % n] for frame in frames]
    for frame, image in zip(frames, images, strict=True):
        # the reader returns zeros for an image that was never written
        _refuse(path, "" if image.any() else f"frame {frame} is not in the file")
    return np.stack(images)


# --- .npy and Zarr: arrays whose last two axes are y, x; the axes before count frames.


def load_npy(path: Path) -> np.ndarray:
    """Map the array of an .npy file into memory."""
    # mapped: a header that claims more than the size of the file is refused before any memory is allocated
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _array_header(shape: tuple[int, ...], dtype: np.dtype[Any], problem: str = "") -> Header:
    if len(shape) < 2:
        return Header(0, (0, 0), dtype, f"an array of shape {shape}, expected (frame, y, x)")
    return Header(math.prod(shape[:-2]), (shape[-2], shape[-1]), dtype.newbyteorder("="), problem)


def _npy_header(path: Path) -> Header:
    array = load_npy(path)
    return _array_header(array.shape, array.dtype)


def _npy_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    movie = load_npy(path).reshape(-1, *header.shape)
    return np.stack([movie[frame] for frame in frames])


_FORMATS: dict[str, tuple[Any, Any]] = {
    ".tif": (_tiff.read_header, _tiff.read_frames),
    ".tiff": (_tiff.read_header, _tiff.read_frames),
    ".dax": (_dax_header, _dax_frames),
    ".nd2": (_nd2_header, _nd2_frames),
    ".npy": (_npy_header, _npy_frames),
    ".zarr": (_zarr.read_header, _zarr.read_frames),
}
SUFFIXES = tuple(_FORMATS)
