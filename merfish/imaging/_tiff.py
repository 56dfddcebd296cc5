"""Reader of TIFF files: pages in file order.

tifffile's series are not used for movies: some microscopes write every frame as a separate series, and a truncated
page-wise stack is read as fewer pages without a warning. Header fields that may cost much time or memory are checked
before tifffile uses them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from merfish._text import shown
from merfish.errors import InputError
from merfish.imaging._header import MOST_FRAME, Block, Header, refuse_bomb, row_blocks

MOST_PAGES = 100_000
MOST_TAGS = 4096  # of a page
# Size of a value in bytes by its type number in TIFF 6.0 and BigTIFF
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
# Compressions whose unpacked size follows from the page's header: none, LZW, deflate (two numbers), PackBits,
# Zstandard. JPEG and similar formats have size fields of their own.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
_OME_COUNTS = ("SizeZ", "SizeC", "SizeT", "PlaneCount", "IFD", "FirstZ", "FirstC", "FirstT")

# Messages of this module cover tifffile's warnings about damaged files; without a handler these would be printed
# unescaped as well.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import tifffile

    with open(path, "rb") as file:
        _check_chain(path, file, os.fstat(file.fileno()).st_size)
    # An OME-TIFF may refer to other files anywhere; only this one is read.
    with tifffile.TiffFile(path, _multifile=False) as tif:
        yield tif


def _check_chain(path: Path, file: BinaryIO, size: int) -> None:
    """Follow the chain of pages; refuse a cyclic chain, and tags with more values than the file has bytes."""
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    kind = struct.unpack(f"{order}H", start[2:4])[0] if order and len(start) >= 8 else 0
    if order is None or kind not in (42, 43) or len(start) < (8 if kind == 42 else 16):
        raise InputError(f"{path}: not a TIFF file: it begins with {start[:4]!r}")
    count_form, entry_form, next_form = ("H", "HHI4x", "I") if kind == 42 else ("Q", "HHQ8x", "Q")
    (offset,) = struct.unpack(order + next_form, start[4:8] if kind == 42 else start[8:16])
    seen: set[int] = set()
    while 0 < offset < size:
        if offset in seen:
            raise InputError(f"{path}: its pages form a cycle: page {len(seen) - 1} points back to an earlier one")
        seen.add(offset)
        if len(seen) > MOST_PAGES:
            raise InputError(f"{path}: more than {MOST_PAGES} pages")
        file.seek(offset)
        head = file.read(struct.calcsize(order + count_form))
        if len(head) < struct.calcsize(order + count_form):
            return  # truncated; reported where the pages are compared
        (n_tags,) = struct.unpack(order + count_form, head)
        entry = struct.Struct(order + entry_form)
        if n_tags > MOST_TAGS:
            raise InputError(f"{path}: page {len(seen) - 1} has {n_tags} tags, expected at most {MOST_TAGS}")
        tags = file.read(n_tags * entry.size)
        for code, type_number, count in entry.iter_unpack(tags[: len(tags) // entry.size * entry.size]):
            if count * _TYPE_BYTES.get(type_number, 0) > size:
                raise InputError(
                    f"{path}: tag {code} of page {len(seen) - 1} claims {count} values, but the file has {size} bytes"
                )
        link = file.read(struct.calcsize(order + next_form))
        offset = struct.unpack(order + next_form, link)[0] if len(link) == struct.calcsize(order + next_form) else 0


def _pages(tif: Any) -> list[Any]:
    return [page for page in tif.pages if not page.is_reduced]


def _contiguous(tif: Any, pages: list[Any]) -> tuple[int, int] | None:
    """(frames, offset) if the header of one page describes several contiguous frames (ImageJ, tifffile)."""
    # OME lists each of its pages
    series = tif.series if len(pages) == 1 and not tif.is_ome and pages[0].compression == 1 else []
    if len(series) == 1 and series[0].dataoffset is not None:
        frames = math.prod(series[0].shape) // max(math.prod(pages[0].shape), 1)
        if frames > 1:
            return frames, series[0].dataoffset
    return None


def read_header(path: Path) -> Header:
    """Header of a TIFF file, from all its pages."""
    with _opened(path) as tif:
        return _header(path, tif)


def _header(path: Path, tif: Any) -> Header:
    pages = _pages(tif)
    if not pages:
        raise InputError(f"{path}: the TIFF file has no images")
    page = pages[0]
    frames, problem = len(pages), ""
    if page.dtype is None:
        raise InputError(
            f"{path}: pixels of {page.bitspersample} bits and sample format {page.sampleformat} are not supported"
        )
    if len(page.shape) != 2:
        shape = (*page.shape[:2], 0, 0)[:2]
        return Header(frames, shape, np.dtype(page.dtype), f"frames of shape {page.shape}, expected (y, x)")
    size = tif.filehandle.size
    if contiguous := _contiguous(tif, pages):
        frames, offset = contiguous
        held = (size - offset) // max(page.nbytes, 1)
        if held < frames:
            problem = f"truncated: its header says {frames} frames, its {size} bytes hold {held}"
    else:
        problem = _problem(pages, size)
    return Header(frames, page.shape, np.dtype(page.dtype), problem)


def _problem(pages: list[Any], size: int) -> str:
    first = pages[0]
    for number, page in enumerate(pages):
        if page.shape != first.shape or page.dtype != first.dtype:
            return f"frame {number} is {page.dtype} {page.shape}, frame 0 {first.dtype} {first.shape}"
        if page.compression not in _COMPRESSIONS:
            known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
            return f"frame {number} has an unsupported compression ({page.compression:d}), expected {known}"
        # A size or offset of zero marks a tile that was never written; tifffile would fill it with zeros.
        ends = [o + n if o and n else size + 1 for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > size:
            return f"truncated: some pixels of frame {number} lie beyond its {size} bytes"
        if len(ends) != math.prod(page.chunked):
            return f"frame {number} has {len(ends)} strips or tiles, expected {math.prod(page.chunked)}"
        if page.compression == 1 and sum(page.databytecounts) < page.nbytes:
            return f"truncated: frame {number} has {sum(page.databytecounts)} bytes of pixels, expected {page.nbytes}"
    # The chain of pages ends after the last page of a complete file; in a truncated file it points beyond the end.
    return ""


def read_frames(path: Path, frames: Sequence[int], header: Header) -> np.ndarray:
    """Read frames (frame, y, x) by their numbers."""
    with _opened(path) as tif:
        return _frames(path, tif, frames, header)


def _frames(path: Path, tif: Any, frames: Sequence[int], header: Header) -> np.ndarray:
    pages = _pages(tif)
    if contiguous := _contiguous(tif, pages):
        _, offset = contiguous
        dtype = header.dtype.newbyteorder(tif.byteorder)
        movie = np.memmap(path, dtype, "r", offset, (header.frames, *header.shape))
        return np.stack([movie[frame] for frame in frames])
    return np.stack([pages[frame].asarray() for frame in frames])


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the index of a frame and some of its rows (row, x), block by block."""
    with _opened(path) as tif:
        header = _header(path, tif)
        if header.problem:
            raise InputError(f"{path}: {header.problem}")
        pages = _pages(tif)
        dtype = header.dtype.newbyteorder(tif.byteorder)
        if contiguous := _contiguous(tif, pages):
            yield from row_blocks(np.memmap(path, dtype, "r", contiguous[1], (header.frames, *header.shape)))
            return
        for frame, page in enumerate(pages):
            if page.is_memmappable:
                mapped = np.memmap(path, dtype, "r", page.dataoffsets[0], header.shape)
                yield from ((frame, rows) for _, rows in row_blocks(mapped))
            else:
                yield from ((frame, rows) for rows in _segment_rows(path, page))


def _segment_rows(path: Path, page: Any) -> Iterator[np.ndarray]:
    """Yield the rows (row, x) of a page, one strip or row of tiles at a time."""
    height, width = page.shape
    rows = min(page.chunks[0], height)
    if rows * width * page.dtype.itemsize > MOST_FRAME:
        raise InputError(f"{path}: strips or tiles of {rows} rows of {width} px; expected at most {MOST_FRAME} bytes")
    block = np.zeros((rows, width), page.dtype)
    for segment, (_, _, top, left, _), _ in page.segments(maxworkers=1):
        part = segment[0, : height - top, : width - left, 0]
        block[: part.shape[0], left : left + part.shape[1]] = part
        if left + part.shape[1] == width:
            yield block[: height - top].copy()


def read_stack(path: Path) -> tuple[np.ndarray, str]:
    """Read a whole TIFF as one array, and the names of its axes, "" if they are not given for all pages."""
    with _opened(path) as tif:
        header = _header(path, tif)
        if header.problem:
            raise InputError(f"{path}: {header.problem}")
        refuse_bomb(path, header.frames * header.frame_bytes, tif.filehandle.size)
        if tif.is_ome:
            _check_ome(path, tif.ome_metadata)
        series = tif.series
        if len(series) == 1 and series[0].size == header.frames * header.shape[0] * header.shape[1]:
            named = series[0].axes if tif.is_ome or tif.is_imagej else ""
            return series[0].asarray(), named
        if tif.is_ome and len(series) > 1:
            raise InputError(f"{path}: an OME-TIFF with {len(series)} images; expected one stack")
        return _frames(path, tif, range(header.frames), header), ""


def _check_ome(path: Path, text: str) -> None:
    """Refuse impossibly large counts before any loop runs over them."""
    for element in ElementTree.fromstring(text).iter():
        for name in _OME_COUNTS:
            value = element.get(name)
            if value is not None and not (re.fullmatch("[0-9]{1,9}", value) and int(value) <= MOST_PAGES):
                raise InputError(f"{path}: OME-XML: {name}: expected a number up to {MOST_PAGES}, got {shown(value)}")
