"""Read the tables that describe an experiment: data organization, stage positions, microscope."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from merfish._text import has_control, read_text, shown
from merfish.errors import InputError

NO_ROUND = -1
Z_TOLERANCE = 1e-3  # micrometre; planes closer than this are one plane
_MAX_EXPRESSION = 1000
_MAX_ROWS = 1000  # rows of a data organization: 64 bits, stains, genes imaged sequentially
_MAX_PLANES = 10_000  # in a list of frames
_MAX_INDEX = 10_000_000  # larger numbers of frames, rounds and bits are errors
_MAX_PLACE = 1e7  # micrometre, 10 m: beyond any stage
_PIXELS = (1e-3, 1e3)  # micrometre; beyond any microscope
_MAX_MICROSCOPE = 1 << 16  # bytes
_MAX_SIDE = 1 << 16  # pixel of an image


@dataclass(frozen=True)
class Movie:
    """Image files of one kind, one for each field, found by name; ``imaging_round`` is -1 if names have no round."""

    image_type: str
    regexp: str
    imaging_round: int


@dataclass(frozen=True)
class Channel:
    """One row of the data organization: a bit or a stain.

    bit: column of the codebook, from 0, or None for a stain. frames: indices in the movie from 0, one for each plane
    of ``z`` (micrometre, ascending). fiducial: movie and frame of the beads of the same imaging round, if any. stain:
    whether the table marks it as a stain, by an empty bitNumber.
    """

    name: str
    readout: str
    line: int
    bit: int | None
    color: str
    movie: Movie
    frames: tuple[int, ...]
    z: tuple[float, ...]
    fiducial: tuple[Movie, int] | None
    stain: bool = False


def read_microscope(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read microns_per_pixel, transpose, flip_horizontal, flip_vertical and image_dimensions (width, height).

    Missing keys take the defaults of MERlin, whose format this is: transposed and flipped horizontally, not vertically;
    without ``image_dimensions`` any size is accepted if all files agree. Raises InputError naming file and key.
    """
    try:
        given = json.loads(read_text(path, "microscope file", _MAX_MICROSCOPE))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also integers with more digits than Python converts
        raise InputError(f"{path}: not a microscope file in JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path}: expected an object with microns_per_pixel, got {type(given).__name__}")
    scale = given.get("microns_per_pixel")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (_PIXELS[0] <= scale <= _PIXELS[1]):
        raise InputError(
            f"{path}: microns_per_pixel: expected a positive number from {_PIXELS[0]:g} to {_PIXELS[1]:g}, "
            f"got {shown(scale)}"
        )
    flags = {"transpose": True, "flip_horizontal": True, "flip_vertical": False}
    for key in flags:
        flags[key] = given.get(key, flags[key])
        if not isinstance(flags[key], bool):
            raise InputError(f"{path}: {key}: expected true or false, got {shown(flags[key])}")
    size = given.get("image_dimensions")
    if size is not None:
        whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
        if not whole or not all(0 < side <= _MAX_SIDE for side in size):
            raise InputError(
                f"{path}: image_dimensions: expected [width, height] in pixels, at most {_MAX_SIDE}, got {shown(size)}"
            )
        size = (size[0], size[1])
    return {"microns_per_pixel": float(scale), "image_dimensions": size, **flags}


def read_positions(path: str | os.PathLike[str]) -> np.ndarray:
    """Read stage positions: no header, ``x,y`` in micrometres, row i = field i. Returns (fov, 2) float64 x, y.

    Raises InputError naming file and line.
    """
    rows = []
    for line, text in enumerate(read_text(path, "positions").split("\n"), start=1):
        fields = [field for field in re.split(r"[,;\s]+", text.strip()) if field]
        if not fields:
            continue
        try:
            x, y = (float(field) for field in fields)
        except ValueError:
            raise InputError(f"{path}: line {line}: expected x,y in micrometres, got {shown(text.strip())}") from None
        if not (abs(x) <= _MAX_PLACE and abs(y) <= _MAX_PLACE):  # also refuses NaN
            raise InputError(
                f"{path}: line {line}: expected finite x,y in micrometres, at most {_MAX_PLACE:g}, "
                f"got {shown(text.strip())}"
            )
        rows.append((x, y))
    if not rows:
        raise InputError(f"{path}: no positions; expected one line x,y for each field")
    return np.array(rows)


def read_data_organization(path: str | os.PathLike[str], bit_names: Iterable[str] | None = None) -> tuple[Channel, ...]:
    """Read a data organization table, MERlin's or the older MATLAB one, one `Channel` for each row.

    ``frame`` and ``zPos`` are lists, ``[0 1 2]``, ``[0,1]`` or ``10;11;12;``. The MATLAB form (a ``bitName`` column)
    counts frames from 1, as that language does, unless a row uses frame 0; here they are counted from 0. ``bit`` is
    ``bitNumber`` - 1; in a file without that column it is the index of the readout name in ``bit_names``.

    Raises InputError naming row and field.
    """
    rows = _read_rows(path)
    header = rows[0][1].keys()
    matlab = "bitName" in header and "channelName" not in header
    if not {"channelName", "bitName", "readoutName"} & header:
        raise InputError(f"{path}: no column channelName, bitName or readoutName; found {', '.join(header)}")
    missing = [key for key in ("imageType", "imageRegExp", "frame") if key not in header]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; found {', '.join(header)}")
    places = {name: place for place, name in enumerate(bit_names or ())}
    channels = [_parse_row(path, line, row, places) for line, row in rows]
    if matlab and all(min(frames) > 0 for frames in map(_all_frames, channels)):
        channels = [_counted_from_zero(channel) for channel in channels]
    return tuple(channels)


def _read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(read_text(path, "data organization"), newline=""), skipinitialspace=True)
    header: list[str] | None = None
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        for fields in reader:
            fields = [field.strip() for field in fields]
            if not any(fields):
                continue
            if header is None:
                header = fields
                doubled = sorted({name for name in header if name and header.count(name) > 1})
                if doubled:
                    raise InputError(f"{path}: several columns are called {', '.join(map(shown, doubled))}")
                continue
            if len(rows) == _MAX_ROWS:
                raise InputError(f"{path}: more than {_MAX_ROWS} rows; expected one for each channel")
            if len(fields) > len(header) and any(fields[len(header) :]):
                raise InputError(
                    f"{path}: line {reader.line_num} has {len(fields)} fields, the header {len(header)}; "
                    'a list with commas needs quotes: "[0,1]"'
                )
            rows.append((reader.line_num, dict(zip(header, fields + [""] * len(header), strict=False))))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error
    if not rows:
        raise InputError(
            f"{path}: no rows; expected a header with imageType, imageRegExp, frame, and a row for each channel"
        )
    return rows


def _parse_row(path: str | os.PathLike[str], line: int, row: dict[str, str], places: dict[str, int]) -> Channel:
    name = row.get("channelName") or row.get("bitName") or row.get("readoutName") or ""
    readout = row.get("readoutName") or row.get("bitName") or name
    where = f"{path}: line {line} ({name!r})"
    if not name:
        raise InputError(f"{path}: line {line}: the channel has no name")
    for field, text in row.items():
        if has_control(text):
            raise InputError(f"{where}: {field}: expected one line of plain text, got {shown(text)}")
    frames = _numbers(where, "frame", row["frame"], int)
    z = _numbers(where, "zPos", row.get("zPos") or "0", float)
    if len(z) != len(frames):
        raise InputError(f"{where}: {len(frames)} values in frame but {len(z)} in zPos")
    if min(frames) < 0:
        raise InputError(f"{where}: frame: expected indices from 0, got {shown(row['frame'])}")
    order = sorted(range(len(z)), key=z.__getitem__)
    if any(z[b] - z[a] < Z_TOLERANCE for a, b in pairwise(order)):
        raise InputError(f"{where}: zPos: a plane is listed twice in {shown(row.get('zPos'))}")
    if "bitNumber" in row:
        number = row["bitNumber"]
        bit = None if number.lower() in ("", "nan") else _integer(where, "bitNumber", number, 1) - 1
    else:
        bit = places.get(readout, places.get(name))
    return Channel(
        name=name,
        readout=readout,
        line=line,
        bit=bit,
        color=row.get("color", ""),
        movie=_movie(where, row, "imageType", "imageRegExp", "imagingRound"),
        frames=tuple(frames[i] for i in order),
        z=tuple(z[i] for i in order),
        fiducial=_fiducial(where, row),
        stain="bitNumber" in row and bit is None,
    )


def _fiducial(where: str, row: dict[str, str]) -> tuple[Movie, int] | None:
    if row.get("fiducialFrame", "").lower() in ("", "nan"):
        return None
    (frame, *others) = _numbers(where, "fiducialFrame", row["fiducialFrame"], int)
    if others or frame < 0:
        raise InputError(f"{where}: fiducialFrame: expected one index from 0, got {shown(row['fiducialFrame'])}")
    # A table that gives only the frame refers to the channel's own movie.
    columns = {
        "imageType": row.get("fiducialImageType") or row["imageType"],
        "imageRegExp": row.get("fiducialRegExp") or row["imageRegExp"],
        "imagingRound": row.get("fiducialImagingRound") or row.get("imagingRound", ""),
    }
    return _movie(where, columns, "imageType", "imageRegExp", "imagingRound"), frame


def _movie(where: str, row: dict[str, str], type_key: str, regexp_key: str, round_key: str) -> Movie:
    # MATLAB writes a named group (?<name>...), Python (?P<name>...); (?<= and (?<! are look-behinds in both.
    regexp = re.sub(r"\(\?<(?![=!])", "(?P<", row[regexp_key])
    if not row[type_key]:
        raise InputError(f"{where}: {type_key} is empty")
    if not regexp or len(regexp) > _MAX_EXPRESSION:
        raise InputError(f"{where}: {regexp_key}: expected an expression of 1 to {_MAX_EXPRESSION} characters")
    imaging_round = _integer(where, round_key, row.get(round_key) or str(NO_ROUND), NO_ROUND)
    for group in ("fov", "imagingRound") if imaging_round != NO_ROUND else ("fov",):
        if f"(?P<{group}>" not in regexp:
            raise InputError(
                f"{where}: {regexp_key}: expected a group (?P<{group}>...), {round_key} being {imaging_round}; "
                f"got {regexp}"
            )
    return Movie(row[type_key], regexp, imaging_round)


def _integer(where: str, field: str, text: str, least: int) -> int:
    (value, *others) = _numbers(where, field, text, int)
    if others or value < least:
        raise InputError(f"{where}: {field}: expected one integer from {least}, got {shown(text)}")
    return value


def _numbers(where: str, field: str, text: str, kind: type) -> list[Any]:
    parts = [part for part in re.split(r"[,;\s]+", text.strip().strip("[]()").strip()) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value == kind(value) for value in values):
        expected = "integers" if kind is int else "numbers"
        raise InputError(f"{where}: {field}: expected {expected} such as [0 1 2], got {shown(text)}")
    largest = max(map(abs, values))
    if len(values) > _MAX_PLANES or largest > (_MAX_INDEX if kind is int else _MAX_PLACE):
        raise InputError(
            f"{where}: {field}: {len(values)} numbers up to {largest:g}, expected at most {_MAX_PLANES} numbers up to "
            f"{_MAX_INDEX if kind is int else _MAX_PLACE:g}"
        )
    return [kind(value) for value in values]


def _all_frames(channel: Channel) -> tuple[int, ...]:
    return channel.frames if channel.fiducial is None else (*channel.frames, channel.fiducial[1])


def _counted_from_zero(channel: Channel) -> Channel:
    fiducial = channel.fiducial and (channel.fiducial[0], channel.fiducial[1] - 1)
    return replace(channel, frames=tuple(frame - 1 for frame in channel.frames), fiducial=fiducial)
