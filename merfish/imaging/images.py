"""The only module that opens image files: TIFF, OME-TIFF, .dax, .nd2, .npy, Zarr and OME-Zarr.

An image file is a movie here: frames counted from 0 in file order, whatever axes the file names, as microscopes'
data organizations count them. Headers are read apart from frames, so that a whole experiment can be checked first.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

_SAMPLE = 1 << 16  # bytes
_MAX_FRAME = 1 << 32  # bytes; a header that asks for more is damaged


@dataclass(frozen=True)
class Header:
    """What a file says about its frames. ``problem`` is empty, or why its frames cannot be read or trusted."""

    frames: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    problem: str = ""


def read_header(path: str | os.PathLike[str]) -> Header:
    """Number, (height, width) and dtype of a file's frames, from its header; finds files that were cut short.

    Raises InputError if the file cannot be understood at all.
    """
    path = Path(path)
    with _understood(path):
        header: Header = _FORMATS[_suffix(path)][0](path)
        if header.shape[0] * header.shape[1] * header.dtype.itemsize > _MAX_FRAME:
            raise InputError(f"{path}: its header asks for frames of {header.shape[1]} x {header.shape[0]} px")
        return header


def read_frames(path: str | os.PathLike[str], frames: Sequence[int]) -> np.ndarray:
    """Read frames by their number from 0, as (frame, y, x) in the file's dtype and native byte order.

    Raises InputError for a frame that is not there or was cut short.
    """
    path = Path(path)
    with _understood(path):
        found = read_header(path)
        beyond = [frame for frame in frames if not 0 <= frame < found.frames]
        if found.problem or beyond:
            raise InputError(f"{path}: " + (found.problem or f"frame {beyond[0]} asked of {found.frames} frames"))
        images = np.asarray(_FORMATS[_suffix(path)][1](path, frames, found))
    return images.astype(images.dtype.newbyteorder("="), copy=False)


def fingerprint(path: str | os.PathLike[str], *, whole: bool) -> tuple[int, bytes]:
    """Size and SHA-256 of a file or Zarr folder; of its ends and middle only if not ``whole``.

    Two images that differ almost never agree in all three parts, because cameras have noise: compare these first.
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
    """Whether every frame of a file holds a single value (a lens cap, a saturated camera)."""
    return all(np.ptp(read_frames(path, [frame])) == 0 for frame in range(read_header(path).frames))


def read_stack(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one registered stack, (bit, y, x) or (bit, z, y, x), any real dtype, from .npy, TIFF, OME-TIFF or Zarr.

    Axes that the file names must be one channel axis (C, or any that is not z, y or x), perhaps z, then y and x;
    unnamed axes are taken in this order. Axes of length 1 before the channel are dropped.

    Raises InputError for other axes, for files cut short and for values that are not real numbers.
    """
    path = Path(path)
    with _understood(path):
        suffix = _suffix(path)
        if suffix == ".npy":
            stack, axes = _load_npy(path), ""
        elif suffix == ".zarr":
            array, axes = _open_zarr(path)
            _refuse(path, _missing_chunks(array))
            stack = np.asarray(array[:])
        elif suffix in (".tif", ".tiff"):
            stack, axes = _tiff_stack(path)
        else:
            raise InputError(f"{path}: expected a stack as .npy, .tif, .ome.tif or .zarr")
    stack = _in_order(path, stack, axes.upper())
    if stack.dtype.kind not in "uif":
        raise InputError(f"{path}: expected integers or real numbers, got {stack.dtype}")
    if not stack.size:
        raise InputError(f"{path}: the stack is empty, shape {stack.shape}")
    return stack.astype(stack.dtype.newbyteorder("="), copy=False)


def _in_order(path: Path, stack: np.ndarray, axes: str) -> np.ndarray:
    """Arrange as (bit, y, x) or (bit, z, y, x), by axis names as far as the file gives them."""
    if len(axes) == stack.ndim and {"Y", "X"} <= set(axes):
        kept = [i for i, name in enumerate(axes) if name in "YXZ" or stack.shape[i] > 1]
        channels = [i for i in kept if axes[i] not in "ZYX"]
        if not channels:
            # A z series without channels is how tools without a word for bits save them.
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
def _understood(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a file that it cannot understand into an InputError that names the file."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an image: {error or type(error).__name__}") from error


def _refuse(path: Path, problem: str) -> None:
    if problem:
        raise InputError(f"{path}: {problem}")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path}: not an image format known here; expected one of {', '.join(_FORMATS)}")
    return suffix


# --- TIFF: pages in file order. tifffile's series are not used for movies: some microscopes make every frame a
# series of its own, and a page-wise stack that was cut short shows as fewer pages without complaint.


def _open_tiff(path: Path) -> Any:
    import tifffile

    # An OME-TIFF may name other files, anywhere; only this one is read.
    return tifffile.TiffFile(path, _multifile=False)


def _tiff_pages(tif: Any) -> list[Any]:
    return [page for page in tif.pages if not page.is_reduced]


def _tiff_contiguous(tif: Any, pages: list[Any]) -> tuple[int, int] | None:
    """(frames, offset) if a single page's header stands for frames that follow each other (ImageJ, tifffile)."""
    series = tif.series if len(pages) == 1 else []
    if len(series) == 1 and series[0].dataoffset is not None:
        frames = int(np.prod(series[0].shape, dtype=np.int64)) // int(np.prod(pages[0].shape, dtype=np.int64))
        if frames > 1:
            return frames, series[0].dataoffset
    return None


def _tiff_header(path: Path) -> Header:
    with _open_tiff(path) as tif:
        pages = _tiff_pages(tif)
        if not pages:
            raise InputError(f"{path}: a TIFF file without images")
        page = pages[0]
        frames, problem = len(pages), ""
        if len(page.shape) != 2:
            return Header(
                frames, page.shape[:2], np.dtype(page.dtype), f"frames of shape {page.shape}, expected (y, x)"
            )
        size = tif.filehandle.size
        if contiguous := _tiff_contiguous(tif, pages):
            frames, offset = contiguous
            held = (size - offset) // page.nbytes
            if held < frames:
                problem = f"cut short: its header promises {frames} frames, its {size} bytes hold {held}"
        else:
            problem = _tiff_problem(pages, size)
        return Header(frames, page.shape, np.dtype(page.dtype), problem)


def _tiff_problem(pages: list[Any], size: int) -> str:
    first = pages[0]
    for number, page in enumerate(pages):
        if page.shape != first.shape or page.dtype != first.dtype:
            return f"frame {number} is {page.dtype} {page.shape}, frame 0 {first.dtype} {first.shape}"
        # Zero bytes or offset mark a tile that was never written; tifffile would fill it with zeros.
        ends = [o + n if o and n else size + 1 for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > size:
            return f"cut short: the pixels of frame {number} are not all within its {size} bytes"
        if page.compression == 1 and sum(page.databytecounts) < page.nbytes:
            return f"cut short: frame {number} has {sum(page.databytecounts)} bytes of pixels, expected {page.nbytes}"
    # After the last page of a whole file the chain of pages ends; one that was cut points beyond the end.
    return ""


def _tiff_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    with _open_tiff(path) as tif:
        pages = _tiff_pages(tif)
        if contiguous := _tiff_contiguous(tif, pages):
            _, offset = contiguous
            dtype = header.dtype.newbyteorder(tif.byteorder)
            movie = np.memmap(path, dtype, "r", offset, (header.frames, *header.shape))
            return np.stack([movie[frame] for frame in frames])
        return np.stack([pages[frame].asarray() for frame in frames])


def _tiff_stack(path: Path) -> tuple[np.ndarray, str]:
    """A whole TIFF as one array and the names of its axes, "" if it names none for all its pages."""
    header = _tiff_header(path)
    _refuse(path, header.problem)
    with _open_tiff(path) as tif:
        series = tif.series
        if len(series) == 1 and series[0].size == header.frames * header.shape[0] * header.shape[1]:
            named = series[0].axes if tif.is_ome or tif.is_imagej else ""
            return series[0].asarray(), named
        if tif.is_ome and len(series) > 1:
            raise InputError(f"{path}: an OME-TIFF with {len(series)} images; expected one stack")
    return _tiff_frames(path, range(header.frames), header), ""


# --- .dax: frames of raw 16-bit integers; size and byte order stand in the .inf file beside it.


def _dax_info(path: Path) -> tuple[int, tuple[int, int], np.dtype[Any]]:
    inf = path.with_suffix(".inf")
    if not inf.exists():
        raise InputError(f"{inf}: missing; it must say frame dimensions, number of frames and data type of {path.name}")
    if inf.resolve().parent != path.resolve().parent:
        raise InputError(f"{inf}: links to a file outside the folder of {path.name}")
    text = inf.read_text(encoding="utf-8", errors="replace")
    size = re.search(r"frame dimensions\s*=\s*(\d+)\s*x\s*(\d+)", text, re.IGNORECASE)
    count = re.search(r"number of frames\s*=\s*(\d+)", text, re.IGNORECASE)
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
        verb = "cut short" if found < expected else "too long"
        problem = (
            f"{verb}: {found} bytes, its .inf file says {frames} frames of {shape[1]} x {shape[0]}: {expected} bytes"
        )
    elif _wrong_byte_order(np.memmap(path, dtype, "r", 0, (frames, *shape))):
        problem = "wrong byte order suspected: with its bytes swapped the image is much smoother"
    return Header(frames, shape, dtype.newbyteorder("="), problem)


def _wrong_byte_order(movie: np.ndarray) -> bool:
    """Whether neighbouring pixels agree far better with their bytes swapped, in some rows of a few frames."""
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


# --- .nd2 (Nikon): one image after the other, the channels of each one by one.


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
        images = int(np.prod([size for axis, size in sizes.items() if axis not in "CYXS"], dtype=np.int64))
        problem = "colour images (RGB), expected one value a pixel" if "S" in sizes else ""
        if sizes.get("P", 1) > 1:
            problem = f"holds {sizes['P']} stage positions, expected a file a field"
        shape = (file.attributes.heightPx, file.attributes.widthPx)
        return Header(images * _nd2_channels(file), shape, np.dtype(file.dtype), problem)


def _nd2_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    with _open_nd2(path) as file:
        n = _nd2_channels(file)
        images = [np.array(file.read_frame(frame // n)).reshape(n, *header.shape)[frame % n] for frame in frames]
    for frame, image in zip(frames, images, strict=True):
        # the reader makes up zeros for an image that was never written; no camera measures them
        _refuse(path, "" if image.any() else f"frame {frame} is not in the file")
    return np.stack(images)


# --- .npy and Zarr: arrays whose last two axes are y, x; the axes before count frames.


def _load_npy(path: Path, mmap: bool = False) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    return array


def _array_header(shape: tuple[int, ...], dtype: np.dtype[Any], problem: str = "") -> Header:
    if len(shape) < 2:
        return Header(0, (0, 0), dtype, f"an array of shape {shape}, expected (frame, y, x)")
    return Header(int(np.prod(shape[:-2], dtype=np.int64)), (shape[-2], shape[-1]), dtype.newbyteorder("="), problem)


def _npy_header(path: Path) -> Header:
    array = _load_npy(path, mmap=True)
    return _array_header(array.shape, array.dtype)


def _npy_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    movie = _load_npy(path, mmap=True).reshape(-1, *header.shape)
    return np.stack([movie[frame] for frame in frames])


def _open_zarr(path: Path) -> tuple[Any, str]:
    """The array of a Zarr store, or the full resolution of an OME-Zarr image, and the names of its axes."""
    import zarr

    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        names = getattr(node.metadata, "dimension_names", None)
        return node, "".join(str(name)[:1] for name in names) if names and all(names) else ""
    attributes: dict[str, Any] = dict(node.attrs)
    images = (attributes.get("ome") or attributes).get("multiscales")
    if not images:
        raise InputError(f"{path}: a Zarr group without OME multiscales; expected an array or an OME-Zarr image")
    axes = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in images[0].get("axes", [])]
    return node[images[0]["datasets"][0]["path"]], "".join(name[:1] for name in axes)


def _missing_chunks(array: Any) -> str:
    """Zarr reads a chunk that is not there as zeros, which no camera measures."""
    missing = array.nchunks - array.nchunks_initialized
    return f"{missing} of its {array.nchunks} chunks are missing" if missing > 0 else ""


def _zarr_header(path: Path) -> Header:
    array, _ = _open_zarr(path)
    return _array_header(tuple(array.shape), np.dtype(array.dtype), _missing_chunks(array))


def _zarr_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    array, _ = _open_zarr(path)
    places = [np.unravel_index(frame, array.shape[:-2]) if array.ndim > 2 else () for frame in frames]
    return np.stack([np.asarray(array[place]) for place in places])


_FORMATS: dict[str, tuple[Any, Any]] = {
    ".tif": (_tiff_header, _tiff_frames),
    ".tiff": (_tiff_header, _tiff_frames),
    ".dax": (_dax_header, _dax_frames),
    ".nd2": (_nd2_header, _nd2_frames),
    ".npy": (_npy_header, _npy_frames),
    ".zarr": (_zarr_header, _zarr_frames),
}
SUFFIXES = tuple(_FORMATS)
