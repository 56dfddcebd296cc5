"""Image files: every format is read alike, every fault is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from merfish import datasets
from merfish.errors import InputError
from merfish.imaging.images import Header, fingerprint, is_constant, read_frames, read_header, read_stack

MOVIE = np.random.default_rng(0).integers(90, 4000, (5, 24, 32), dtype=np.uint16)


def write_dax(path: Path, movie: np.ndarray, order: str, said: str | None = None) -> Path:
    movie.astype(f"{order}u2").tofile(path)
    endian = said or {"<": "little", ">": "big"}[order]
    path.with_suffix(".inf").write_text(
        f"binning = 1 x 1\ndata type = 16 bit integers (binary, {endian} endian)\n"
        f"frame dimensions = {movie.shape[2]} x {movie.shape[1]}\nnumber of frames = {len(movie)}\n"
    )
    return path


def write_single_series(path: Path, movie: np.ndarray) -> Path:
    """Write each frame as a separate series, of which tifffile.imread returns only the first."""
    with tifffile.TiffWriter(path) as tif:
        for frame in movie:
            tif.write(frame, contiguous=False)
    return path


def write_ome_zarr(path: Path, movie: np.ndarray, axes: str) -> Path:
    group = zarr.open_group(path, mode="w")
    array = group.create_array("0", shape=movie.shape, dtype=movie.dtype, chunks=(1,) * (movie.ndim - 2) + (16, 16))
    array[:] = movie
    scales = [{"axes": [{"name": name} for name in axes], "datasets": [{"path": "0"}]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": scales}
    return path


def write_zarr(path: Path, movie: np.ndarray) -> Path:
    zarr.create_array(path, shape=movie.shape, dtype=movie.dtype, chunks=(1, 16, 16))[:] = movie
    return path


def write_tiff(path: Path, movie: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, movie, photometric="minisblack", **options)
    return path


def write_npy(path: Path, movie: np.ndarray) -> Path:
    np.save(path, movie)
    return path


FORMATS = {
    "tiff paged": lambda folder, movie: write_tiff(folder / "m.tif", movie, metadata=None),
    "tiff contiguous": lambda folder, movie: write_tiff(folder / "m.tif", movie),
    "tiff imagej": lambda folder, movie: write_tiff(folder / "m.tif", movie, imagej=True),
    "tiff big endian": lambda folder, movie: write_tiff(folder / "m.tif", movie, byteorder=">"),
    "tiff one page header": lambda folder, movie: write_tiff(folder / "m.tif", movie, imagej=True, truncate=True),
    "tiff deflate": lambda folder, movie: write_tiff(folder / "m.tiff", movie, compression="zlib", predictor=True),
    "tiff lzw tiles": lambda folder, movie: write_tiff(folder / "m.tif", movie, compression="lzw", tile=(16, 16)),
    "tiff single series": lambda folder, movie: write_single_series(folder / "m.tif", movie),
    "ome-tiff": lambda folder, movie: write_tiff(folder / "m.ome.tif", movie, metadata={"axes": "CYX"}),
    "dax little": lambda folder, movie: write_dax(folder / "m.dax", movie, "<"),
    "dax big": lambda folder, movie: write_dax(folder / "m.dax", movie, ">"),
    "npy": lambda folder, movie: write_npy(folder / "m.npy", movie),
    "zarr": lambda folder, movie: write_zarr(folder / "m.zarr", movie),
    "ome-zarr": lambda folder, movie: write_ome_zarr(folder / "m.ome.zarr", movie, "cyx"),
}
ONE_FILE = [name for name in FORMATS if "zarr" not in name]


@pytest.mark.parametrize("name", FORMATS)
def test_read_frames__same_pixels_in_every_format(name, tmp_path):
    path = FORMATS[name](tmp_path, MOVIE)
    assert read_header(path) == Header(5, (24, 32), np.dtype("uint16"))
    frames = read_frames(path, [3, 0])
    np.testing.assert_array_equal(frames, MOVIE[[3, 0]])
    assert frames.dtype.isnative


@pytest.mark.parametrize("name", FORMATS)
def test_read_frames__frame_that_is_not_there(name, tmp_path):
    with pytest.raises(InputError, match=r"frame 5 was requested, but it has 5 frames"):
        read_frames(FORMATS[name](tmp_path, MOVIE), [0, 5])


@pytest.mark.parametrize("name", ONE_FILE)
def test_read_header__finds_every_cut(name, tmp_path):
    """Check that a truncated file raises an error, has fewer frames, or has the same pixels."""
    path = FORMATS[name](tmp_path, MOVIE)
    whole = path.read_bytes()
    for size in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:size])
        try:
            header = read_header(path)
        except InputError:
            continue
        if not header.problem and header.frames == len(MOVIE):
            np.testing.assert_array_equal(read_frames(path, range(5)), MOVIE)
        elif header.problem:
            with pytest.raises(InputError, match=r"truncated|bytes|frame"):
                read_frames(path, [0])


@pytest.mark.parametrize("name", ["zarr", "ome-zarr"])
def test_read_header__finds_missing_chunks(name, tmp_path):
    path = FORMATS[name](tmp_path, MOVIE)
    chunk = next(p for p in path.rglob("*") if p.is_file() and "zarr" not in p.name)
    chunk.unlink()
    assert "1 of its 20 chunks are missing" in read_header(path).problem
    with pytest.raises(InputError, match="1 of its 20 chunks are missing"):
        read_frames(path, [4])
    with pytest.raises(InputError, match="1 of its 20 chunks are missing"):
        read_stack(path)


@pytest.mark.parametrize("order", ["<", ">"])
def test_read_header__suspects_wrong_byte_order(order, tmp_path):
    other = {"<": "big", ">": "little"}[order]
    smooth = (100 + 40 * np.hypot(*np.mgrid[-12:12, -16:16])).astype(np.uint16)[None] + MOVIE[:2] // 100
    assert "byte order" in read_header(write_dax(tmp_path / "m.dax", smooth, order, said=other)).problem
    assert not read_header(write_dax(tmp_path / "m.dax", smooth, order)).problem


@pytest.mark.parametrize("value", [0, 7, 256, 65535])
def test_read_header__constant_movie_has_no_byte_order(value, tmp_path):
    movie = np.full((2, 8, 8), value, np.uint16)
    assert not read_header(write_dax(tmp_path / "m.dax", movie, "<")).problem


@pytest.mark.parametrize(
    ("line", "message"),
    [("frame dimensions", "frame dimensions"), ("number of frames", "number of frames"), ("data type", "data type")],
)
def test_read_header__inf_without_a_line(line, message, tmp_path):
    path = write_dax(tmp_path / "m.dax", MOVIE, "<")
    inf = path.with_suffix(".inf")
    inf.write_text("\n".join(text for text in inf.read_text().splitlines() if not text.startswith(line)))
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_read_header__dax_without_inf(tmp_path):
    write_dax(tmp_path / "m.dax", MOVIE, "<").with_suffix(".inf").unlink()
    with pytest.raises(InputError, match=r"m\.inf: missing"):
        read_header(tmp_path / "m.dax")


def test_read_header__dax_too_long(tmp_path):
    path = write_dax(tmp_path / "m.dax", MOVIE, "<")
    path.write_bytes(path.read_bytes() + b"12")
    assert "too long" in read_header(path).problem


def test_read_header__pages_that_differ(tmp_path):
    with tifffile.TiffWriter(tmp_path / "m.tif") as tif:
        tif.write(MOVIE[0])
        tif.write(MOVIE[0, :8])
    assert "frame 1 is uint16 (8, 32)" in read_header(tmp_path / "m.tif").problem


def test_read_header__colour_image(tmp_path):
    tifffile.imwrite(tmp_path / "m.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    assert "expected (y, x)" in read_header(tmp_path / "m.tif").problem


@pytest.mark.parametrize("name", ["m.tif", "m.npy", "m.zarr", "m.png"])
def test_read_header__rejects_what_it_cannot_understand(name, tmp_path):
    (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(InputError, match=name):
        read_header(tmp_path / name)


def test_read_header__never_unpickles(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for read in (read_header, read_stack):
        with pytest.raises(InputError, match=r"m\.npy"):
            read(tmp_path / "m.npy")


def test_read_header__real_dax():
    path = datasets.merfish_raw() / "test.dax"
    assert read_header(path) == Header(10, (256, 256), np.dtype("uint16"))
    first = np.frombuffer(path.read_bytes()[:2], ">u2")[0]
    assert read_frames(path, [0])[0, 0, 0] == first


@pytest.mark.parametrize("name", FORMATS)
def test_read_stack__same_in_every_format(name, tmp_path):
    path = FORMATS[name](tmp_path, MOVIE)
    if path.suffix == ".dax":
        with pytest.raises(InputError, match="expected a stack"):
            read_stack(path)
    else:
        np.testing.assert_array_equal(read_stack(path), MOVIE)


@pytest.mark.parametrize("axes", ["CZYX", "ZCYX", "TCZYX", "ZYX", "CYX"])
@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_read_stack__axes_by_name(axes, kind, tmp_path):
    sizes = {"T": 1, "C": 5, "Z": 3, "Y": 24, "X": 32}
    array = np.arange(np.prod([sizes[a] for a in axes]), dtype=np.uint16).reshape([sizes[a] for a in axes])
    if kind == "tif":
        path = write_tiff(tmp_path / "m.ome.tif", array, metadata={"axes": axes})
    else:
        path = write_ome_zarr(tmp_path / "m.zarr", array, axes.lower())
    expected = array.swapaxes(0, 1) if axes == "ZCYX" else array.reshape(array.shape[-4:])
    np.testing.assert_array_equal(read_stack(path), expected)


def test_read_stack__ome_tiff_opens_no_other_file(tmp_path):
    """OME-XML may refer to further channels in other files at any path."""
    (tmp_path / "in").mkdir()
    path = write_tiff(tmp_path / "in" / "m.ome.tif", MOVIE, metadata={"axes": "CYX"})
    other = write_tiff(tmp_path / "m.ome.tif", MOVIE + 1, metadata={"axes": "CYX"})
    with tifffile.TiffFile(path) as tif:
        xml = tif.pages[0].description
    here, there = (f'<UUID FileName="{name}">urn:uuid:{name}</UUID>' for name in (path.name, "../m.ome.tif"))
    data = f'<TiffData FirstC="0" IFD="0" PlaneCount="5">{here}</TiffData>'
    data += f'<TiffData FirstC="5" IFD="0" PlaneCount="5">{there}</TiffData>'
    xml = xml[: xml.index("<TiffData")] + data + "</Pixels></Image></OME>"
    tifffile.tiffcomment(path, xml.replace('SizeC="5"', 'SizeC="10"').encode())
    np.testing.assert_array_equal(tifffile.imread(path)[5:], tifffile.imread(other))  # tifffile follows the reference
    np.testing.assert_array_equal(read_stack(path), MOVIE)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (2, 3, 4, 8, 8), (0, 8, 8)])
def test_read_stack__rejects_other_shapes(shape, tmp_path):
    with pytest.raises(InputError, match="shape"):
        read_stack(write_npy(tmp_path / "m.npy", np.zeros(shape, np.uint16)))


def test_read_stack__rejects_two_channel_axes(tmp_path):
    path = write_ome_zarr(tmp_path / "m.zarr", np.ones((2, 3, 24, 32), np.uint16), "tcyx")
    with pytest.raises(InputError, match="TCYX"):
        read_stack(path)


@pytest.mark.parametrize("dtype", [bool, complex, "U3"])
def test_read_stack__rejects_what_is_not_real(dtype, tmp_path):
    with pytest.raises(InputError, match="real numbers"):
        read_stack(write_npy(tmp_path / "m.npy", np.zeros((2, 8, 8), dtype)))


def test_fingerprint__tells_copies_from_neighbours(tmp_path):
    for name, movie in {"a": MOVIE, "b": MOVIE, "c": MOVIE[:, ::-1]}.items():
        write_npy(tmp_path / f"{name}.npy", movie)
    for whole in (True, False):
        a, b, c = (fingerprint(tmp_path / f"{name}.npy", whole=whole) for name in "abc")
        assert a == b
        assert a != c


def test_is_constant(tmp_path):
    assert is_constant(write_npy(tmp_path / "a.npy", np.full((2, 4, 4), 9, np.uint16)))
    assert not is_constant(write_npy(tmp_path / "b.npy", MOVIE))
