"""Image files that are written, or damaged, so that reading them would not end or would fill the memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from merfish.errors import InputError
from merfish.imaging import _tiff
from merfish.imaging.images import read_frames, read_header, read_stack

MOVIE = np.random.default_rng(0).integers(90, 4000, (3, 16, 16), dtype=np.uint16)


def refused(path: Path, message: str) -> None:
    """Check that every way to read the file raises InputError or reports a faulty header."""
    try:
        problem = read_header(path).problem
    except InputError as error:
        problem = str(error)
    assert problem
    for read in (lambda: read_frames(path, [0, 1, 2]), lambda: read_stack(path)):
        with pytest.raises(InputError, match=message):
            read()


def patch_tag(path: Path, code: int, value: int, count: int = 1, page: int = 0) -> None:
    """Write another value or count into a tag of a page."""
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[page].tags[code]
        where = tag.offset
    with open(path, "r+b") as file:
        file.seek(where + 2)
        file.write(struct.pack("<HII", 4, count, value))


def write_tiff(path: Path, **options: object) -> Path:
    tifffile.imwrite(path, MOVIE, photometric="minisblack", metadata=None, **options)
    return path


def links_of_pages(path: Path) -> list[int]:
    """Return the offsets at which the pages of a classic little-endian TIFF store the position of the next one."""
    data, places = path.read_bytes(), []
    (offset,) = struct.unpack("<I", data[4:8])
    while offset:
        (n,) = struct.unpack("<H", data[offset : offset + 2])
        places.append(offset + 2 + 12 * n)
        (offset,) = struct.unpack("<I", data[places[-1] : places[-1] + 4])
    return places


@pytest.mark.parametrize("target", [0, 1])
def test_tiff__pages_that_form_a_circle(target, tmp_path):
    path = write_tiff(tmp_path / "m.tif")
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[target].offset
    with open(path, "r+b") as file:
        file.seek(links_of_pages(path)[-1])
        file.write(struct.pack("<I", offset))
    refused(path, r"m\.tif: its pages form a cycle: page 2 points back")


def test_tiff__too_many_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(_tiff, "MOST_PAGES", 2)
    refused(write_tiff(tmp_path / "m.tif"), "more than 2 pages")


@pytest.mark.parametrize(
    ("code", "value", "count", "message"),
    [
        (256, 1 << 31, 1, "frames of|bytes of pixels|strips"),
        (257, 1 << 31, 1, "frames of|bytes of pixels|strips"),
        (256, 0, 1, "no pixels|frame 0"),
        (273, 8, 1 << 30, "tag 273 of page 0 claims 1073741824 values"),
        (279, 8, 0xFFFFFFFF, "tag 279 of page 0 claims 4294967295 values"),
        (278, 1, 1, "strips"),
        (277, 60_000, 1, "expected|cannot be read|claims"),
        (259, 7, 1, r"has an unsupported compression \(7\)"),
        (258, 7, 1, "."),
    ],
)
def test_tiff__absurd_numbers(code, value, count, message, tmp_path):
    path = write_tiff(tmp_path / "m.tif")
    patch_tag(path, code, value, count)
    refused(path, message)


def test_tiff__bomb(tmp_path):
    """One page of 16,000 x 16,000 zeros in half a megabyte, several pages pointing to it."""
    path = tmp_path / "m.tif"
    tifffile.imwrite(path, np.zeros((16_000, 16_000), np.uint16), compression="zlib", metadata=None)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=r"m\.tif: .* unpack to 512000000; expected at most 50 times as many"):
        read_frames(path, [0])
    with pytest.raises(InputError, match="unpack to 512000000"):
        read_stack(path)


def test_tiff__ome_that_counts_to_a_billion(tmp_path):
    path = tmp_path / "m.ome.tif"
    tifffile.imwrite(path, MOVIE, metadata={"axes": "CYX"})
    with tifffile.TiffFile(path) as tif:
        xml = tif.pages[0].description
    for before, after in (('SizeT="1"', 'SizeT="&#49;000000000"'), ('PlaneCount="3"', 'PlaneCount="999999999"')):
        assert before in xml
        tifffile.tiffcomment(path, xml.replace(before, after).encode())
        with pytest.raises(InputError, match=r"OME-XML: .*: expected a number up to 100000"):
            read_stack(path)


@pytest.mark.parametrize("suffix", [".tif", ".dax", ".npy", ".nd2", ".zarr"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_sockets_devices_and_links(suffix, tmp_path):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"pipe{suffix}")
    (tmp_path / f"circle{suffix}").symlink_to(tmp_path / f"circle{suffix}")
    (tmp_path / f"dangling{suffix}").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / f"socket{suffix}"))
        wanted = {"pipe": "got a pipe", "device": "got a device", "link": "got a pipe", "socket": "got a socket"}
        wanted |= {"circle": "links to .*[lL]", "dangling": "links to .*nowhere: No such file"}
        for name, message in wanted.items():
            with pytest.raises(InputError, match=message):
                read_header(tmp_path / f"{name}{suffix}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_dax__whose_inf_is_a_pipe(tmp_path):
    (tmp_path / "m.dax").write_bytes(b"1234")
    os.mkfifo(tmp_path / "m.inf")
    with pytest.raises(InputError, match=r"m\.inf: expected a regular file, got a pipe"):
        read_header(tmp_path / "m.dax")


@pytest.mark.parametrize("number", ["9" * 5000, "99999999999", "-1"])
def test_dax__absurd_numbers(number, tmp_path):
    (tmp_path / "m.dax").write_bytes(b"1234")
    (tmp_path / "m.inf").write_text(
        f"frame dimensions = {number} x {number}\nnumber of frames = {number}\n"
        "data type = 16 bit integers (binary, little endian)\n"
    )
    with pytest.raises(InputError, match=r"m\.inf: no line 'frame dimensions"):
        read_header(tmp_path / "m.dax")


@pytest.mark.parametrize("shape", [(1 << 40, 1 << 20, 2), (3, 1 << 14, 1 << 14), (3, 0, 16), (-1, 16, 16)])
def test_npy__absurd_shape(shape, tmp_path):
    path = tmp_path / "m.npy"
    np.save(path, MOVIE)
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    path.write_bytes(path.read_bytes()[:10] + text + MOVIE.tobytes())
    refused(path, "cannot be read|no pixels|empty")


def write_zarr(path: Path, version: int, compressors: object = "auto") -> Path:
    options = {} if compressors == "auto" else {"compressors": compressors}
    zarr.create_array(path, shape=MOVIE.shape, dtype="u2", chunks=(1, 8, 8), zarr_format=version, **options)[:] = MOVIE
    return path


def edit_metadata(path: Path, **values: object) -> None:
    file = next(f for f in (path / "zarr.json", path / ".zarray") if f.exists())
    values.pop("data_type" if file.name == ".zarray" else "dtype", None)
    metadata = json.loads(file.read_text())
    if "chunks" in values and file.name == "zarr.json":
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = values.pop("chunks")
    file.write_text(json.dumps(metadata | values))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": [10**9, 16, 16]}, "more than 1000000 chunks"),
        ({"shape": [200_000, 16, 16]}, "799988 of its 800000 chunks are missing"),
        ({"shape": [10**300, 16, 16]}, r"shape: expected integers from 0, at most 8, got \[1000"),
        ({"shape": [3, 16, 16.5]}, "shape: expected integers"),
        ({"shape": [3, 16]}, "do not match"),
        ({"shape": [1] * 50, "chunks": [1] * 50}, "shape: expected integers from 0, at most 8"),
        ({"chunks": [1, 0, 8]}, "chunks: expected integers from 1"),
        ({"chunks": [1, 1 << 20, 1 << 20]}, "unpack to"),
        ({"shape": None}, "shape: expected integers"),
        ({"dtype": "|O", "data_type": "string"}, "data type: expected integers or real numbers"),
        ({"dtype": "<u8", "data_type": "uint64"}, "a chunk of 128 bytes, expected 512"),
        ({"codecs": [{"name": "lzma"}], "compressor": {"id": "lzma"}}, "codec 'lzma' is not supported"),
        ({"codecs": 5, "compressor": 5}, r"."),
    ],
)
def test_zarr__absurd_metadata(version, values, message, tmp_path):
    path = write_zarr(tmp_path / "m.zarr", version)
    edit_metadata(path, **values)
    for read in (lambda: read_frames(path, [0]), lambda: read_stack(path)):
        with pytest.raises(InputError, match=message):
            read()


@pytest.mark.parametrize("target", ["outside", "inside"])
@pytest.mark.parametrize("what", ["chunk", "metadata", "folder"])
def test_zarr__links_that_lead_outside(target, what, tmp_path):
    path = write_zarr(tmp_path / "m.zarr", 3)
    inner = {"chunk": path / "c" / "1" / "0" / "0", "metadata": path / "zarr.json", "folder": path / "c" / "1"}[what]
    place = (path if target == "inside" else tmp_path) / "moved"
    shutil.move(inner, place)
    inner.symlink_to(place)
    if target == "inside" and what == "folder":
        refused(path, "a link to a folder")
    elif target == "inside":
        np.testing.assert_array_equal(read_frames(path, [1])[0], MOVIE[1])
    else:
        refused(path, "outside the Zarr store")


@pytest.mark.parametrize("name", ["../other.zarr", "/etc", "0/../../other.zarr", "..", "", 5, None])
def test_zarr__group_that_points_outside(name, tmp_path):
    write_zarr(tmp_path / "other.zarr", 3)
    group = zarr.open_group(tmp_path / "m.zarr", mode="w")
    group.attrs["ome"] = {"multiscales": [{"axes": [], "datasets": [{"path": name}]}]}
    refused(tmp_path / "m.zarr", "multiscales: expected the path of an array in the store")


BOMBS = {
    "gzip": (zarr.codecs.GzipCodec(), lambda data: gzip.compress(data * 10_000)),
    "gzip in parts": (zarr.codecs.GzipCodec(), lambda data: gzip.compress(data) * 100),
    "gzip cut short": (zarr.codecs.GzipCodec(), lambda data: gzip.compress(data)[:-30]),
    "blosc": (zarr.codecs.BloscCodec(), lambda data: struct.pack("<BBBBIII", 2, 1, 0x22, 2, 1 << 31, 1 << 20, 16)),
    "zstd": (zarr.codecs.ZstdCodec(), lambda data: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + data),
    "none": (None, lambda data: data * 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_zarr__chunks_that_unpack_to_another_size(name, tmp_path):
    codec, make = BOMBS[name]
    path = write_zarr(tmp_path / "m.zarr", 3, codec)
    np.testing.assert_array_equal(read_stack(path), MOVIE)
    (path / "c" / "0" / "1" / "1").write_bytes(make(MOVIE[0, 8:, 8:].tobytes()))
    for read in (lambda: read_frames(path, [0]), lambda: read_stack(path)):
        with pytest.raises(InputError, match=r"c/0/1/1: a chunk of .*, expected 128"):
            read()


def test_zarr__zlib_of_version_2(tmp_path):
    from numcodecs import Zlib

    path = write_zarr(tmp_path / "m.zarr", 2, Zlib())
    np.testing.assert_array_equal(read_frames(path, [2])[0], MOVIE[2])
    (path / "0.0.0").write_bytes(zlib.compress(bytes(1 << 24)))
    with pytest.raises(InputError, match=r"0\.0\.0: a chunk of .*, expected 128"):
        read_frames(path, [2])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_zarr__chunk_that_is_a_pipe(tmp_path):
    path = write_zarr(tmp_path / "m.zarr", 3)
    chunk = path / "c" / "1" / "0" / "0"
    chunk.unlink()
    os.mkfifo(chunk)
    refused(path, "expected a regular file in a Zarr store")
