"""Nikon's .nd2, read from minimal files written here in version 2.1 of the format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from merfish.errors import InputError
from merfish.imaging.images import read_frames, read_header

Z_STACK, POSITIONS = 4, 2
RNG = np.random.default_rng(0)


def xml(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f'<{name} runtype="CLxListVariant">' + "".join(xml(k, v) for k, v in value.items()) + f"</{name}>"
    return f'<{name} runtype="{"double" if isinstance(value, float) else "lx_uint32"}" value="{value}"/>'


def write_nd2(path: Path, movie: np.ndarray, loop: int = Z_STACK, lost: int | None = None) -> Path:
    """Write images (image, channel, y, x) uint16; ``lost`` is the index of an omitted image."""
    n, channels, height, width = movie.shape
    attributes = {
        "uiWidth": width, "uiWidthBytes": 2 * channels * width, "uiHeight": height, "uiComp": channels,
        "uiBpcInMemory": 16, "uiBpcSignificant": 16, "uiSequenceCount": n, "eCompression": 2,
    }  # fmt: skip
    place = {"dPosX": 0.0, "dPosY": 0.0, "dPosZ": 0.0}
    loops = {
        Z_STACK: {"uiCount": n, "dZStep": 1.5},
        POSITIONS: {"uiCount": n, "Points": {f"i{k:010}": place for k in range(n)}},
    }
    chunks = {
        "ImageAttributes!": attributes,
        "ImageMetadataSeq|0!": {"sPicturePlanes": {"uiCount": channels}},
        "ImageMetadata!": {"eType": loop, "uLoopPars": loops[loop]},
    }
    parts = {
        name: f"<variant>{''.join(xml(k, v) for k, v in c.items())}</variant>".encode() for name, c in chunks.items()
    }
    for k, image in enumerate(movie):
        if k != lost:
            parts[f"ImageDataSeq|{k}!"] = struct.pack("d", 0.0) + image.transpose(1, 2, 0).tobytes()
    data = chunk(b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver2.1".ljust(64, b"\0"))
    where = b""
    for name, body in parts.items():
        where += name.encode() + struct.pack("QQ", len(data), len(body))
        # pixels begin 4096 bytes after the header, 8 of them a time stamp
        data += chunk(name.encode().ljust(4096 - 16 - 8 if name.startswith("ImageData") else len(name), b"\0"), body)
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("Q", len(data))
    path.write_bytes(data + chunk(b"ND2 FILEMAP SIGNATURE NAME 0001!", where + end) + end)
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("IIQ", 0x0ABECEDA, len(name), len(data)) + name + data


def movie(n: int, channels: int) -> np.ndarray:
    return RNG.integers(90, 5000, (n, channels, 5, 7), dtype=np.uint16)


def test_read_frames__of_nd2_counts_channels_within_images(tmp_path):
    images = movie(3, 2)
    path = write_nd2(tmp_path / "a.nd2", images)
    header = read_header(path)
    assert (header.frames, header.shape, header.dtype, header.problem) == (6, (5, 7), np.uint16, "")
    assert (read_frames(path, [5, 0, 3]) == images.reshape(6, 5, 7)[[5, 0, 3]]).all()


def test_read_frames__of_nd2_with_one_channel(tmp_path):
    images = movie(4, 1)
    assert (read_frames(write_nd2(tmp_path / "a.nd2", images), [2, 3]) == images[2:, 0]).all()


def test_read_frames__refuses_damaged_nd2(tmp_path):
    path = write_nd2(tmp_path / "a.nd2", movie(3, 1), lost=1)
    with pytest.raises(InputError, match=r"a.nd2: frame 1 is not in the file"):
        read_frames(path, [0, 1])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"a.nd2: cannot be read as an image"):
        read_header(path)


def test_read_header__refuses_nd2_of_several_fields(tmp_path):
    header = read_header(write_nd2(tmp_path / "a.nd2", movie(3, 1), loop=POSITIONS))
    assert header.problem == "has 3 stage positions, expected one file for each field"
