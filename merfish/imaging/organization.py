"""Reading the tables that describe an experiment: data organization, stage positions, microscope."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

NO_ROUND = -1
Z_TOLERANCE = 1e-3  # micrometre; planes closer than this are one plane
_MAX_EXPRESSION = 1000


@dataclass(frozen=True)
class Movie:
    """Image files of one kind, one a field, known by their names; ``imaging_round`` -1 means that none is named."""

    image_type: str
    regexp: str
    imaging_round: int


@dataclass(frozen=True)
class Channel:
    """One row of the data organization: a bit or a stain.

    bit: column of the codebook, from 0, or None for a stain. frames: indices in the movie from 0, one a plane of
    ``z`` (micrometre, ascending). fiducial: movie and frame that show the beads of the same imaging round, if any.
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


def read_microscope(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read microns_per_pixel, transpose, flip_horizontal, flip_vertical and image_dimensions (width, height).

    Keys that are left out take MERlin's defaults for them, since the format is MERlin's: transposed and flipped
    horizontally, not vertically; without ``image_dimensions`` every size is accepted if all files agree.
    """
    try:
        given = json.loads(_read_text(path, "microscope file"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path}: expected an object with microns_per_pixel, got {type(given).__name__}")
    scale = given.get("microns_per_pixel")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (0 < scale < math.inf):
        raise InputError(f"{path}: microns_per_pixel: expected a positive number, got {scale!r}")
    flags = {"transpose": True, "flip_horizontal": True, "flip_vertical": False}
    for key in flags:
        flags[key] = given.get(key, flags[key])
        if not isinstance(flags[key], bool):
            raise InputError(f"{path}: {key}: expected true or false, got {flags[key]!r}")
    size = given.get("image_dimensions")
    if size is not None:
        whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        if not whole:
            raise InputError(f"{path}: image_dimensions: expected [width, height] in pixel, got {size!r}")
        size = (size[0], size[1])
    return {"microns_per_pixel": float(scale), "image_dimensions": size, **flags}


def read_positions(path: str | os.PathLike[str]) -> np.ndarray:
    """Read stage positions: no header, ``x,y`` in micrometre, row i = field i. Returns (fov, 2) float64."""
    rows = []
    for line, text in enumerate(_read_text(path, "positions").splitlines(), start=1):
        fields = [field for field in re.split(r"[,;\s]+", text.strip()) if field]
        if not fields:
            continue
        try:
            x, y = (float(field) for field in fields)
        except ValueError:
            raise InputError(f"{path}: line {line}: expected x,y in micrometre, got {text.strip()!r}") from None
        if not (math.isfinite(x) and math.isfinite(y)):
            raise InputError(f"{path}: line {line}: expected finite x,y, got {text.strip()!r}")
        rows.append((x, y))
    if not rows:
        raise InputError(f"{path}: no positions; expected one line x,y a field")
    return np.array(rows)


def read_data_organization(path: str | os.PathLike[str], bit_names: Iterable[str] | None = None) -> tuple[Channel, ...]:
    """Read a data organization table, MERlin's or the older MATLAB one, one `Channel` a row.

    ``frame`` and ``zPos`` are lists, ``[0 1 2]``, ``[0,1]`` or ``10;11;12;``. The MATLAB form (a ``bitName`` column)
    counts frames from 1, as that language does, unless a row uses frame 0; here they are counted from 0. ``bit`` is
    ``bitNumber`` - 1; in a file without that column it is the place of the readout name among ``bit_names``.

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


def _read_text(path: str | os.PathLike[str], what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the {what} is not UTF-8 text: {error}") from error


def _read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    reader = csv.reader(_read_text(path, "data organization").splitlines(), skipinitialspace=True)
    header: list[str] | None = None
    rows = []
    try:
        for fields in reader:
            fields = [field.strip() for field in fields]
            if not any(fields):
                continue
            if header is None:
                header = fields
                continue
            if len(fields) > len(header) and any(fields[len(header) :]):
                raise InputError(
                    f"{path}: line {reader.line_num} has {len(fields)} fields, the header {len(header)}; "
                    'a list with commas needs quotes: "[0,1]"'
                )
            rows.append((reader.line_num, dict(zip(header, fields + [""] * len(header), strict=False))))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error
    if not rows:
        raise InputError(f"{path}: no rows; expected a header with imageType, imageRegExp, frame and one row a channel")
    return rows


def _parse_row(path: str | os.PathLike[str], line: int, row: dict[str, str], places: dict[str, int]) -> Channel:
    name = row.get("channelName") or row.get("bitName") or row.get("readoutName") or ""
    readout = row.get("readoutName") or row.get("bitName") or name
    where = f"{path}: line {line} ({name!r})"
    if not name:
        raise InputError(f"{path}: line {line}: the channel has no name")
    frames = _numbers(where, "frame", row["frame"], int)
    z = _numbers(where, "zPos", row.get("zPos") or "0", float)
    if len(z) != len(frames):
        raise InputError(f"{where}: {len(frames)} values in frame but {len(z)} in zPos")
    if frames and min(frames) < 0:
        raise InputError(f"{where}: frame: expected indices from 0, got {row['frame']!r}")
    order = sorted(range(len(z)), key=z.__getitem__)
    if any(z[b] - z[a] < Z_TOLERANCE for a, b in pairwise(order)):
        raise InputError(f"{where}: zPos: a plane is listed twice in {row['zPos']!r}")
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
    )


def _fiducial(where: str, row: dict[str, str]) -> tuple[Movie, int] | None:
    if row.get("fiducialFrame", "").lower() in ("", "nan"):
        return None
    (frame, *others) = _numbers(where, "fiducialFrame", row["fiducialFrame"], int)
    if others or frame < 0:
        raise InputError(f"{where}: fiducialFrame: expected one index from 0, got {row['fiducialFrame']!r}")
    # A table that only names the frame means the channel's own movie.
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
        raise InputError(f"{where}: {field}: expected one integer from {least}, got {text!r}")
    return value


def _numbers(where: str, field: str, text: str, kind: type) -> list[Any]:
    parts = [part for part in re.split(r"[,;\s]+", text.strip().strip("[]()").strip()) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value == kind(value) for value in values):
        expected = "integers" if kind is int else "numbers"
        raise InputError(f"{where}: {field}: expected {expected} such as [0 1 2], got {text!r}")
    return [kind(value) for value in values]


def _all_frames(channel: Channel) -> tuple[int, ...]:
    return channel.frames if channel.fiducial is None else (*channel.frames, channel.fiducial[1])


def _counted_from_zero(channel: Channel) -> Channel:
    fiducial = channel.fiducial and (channel.fiducial[0], channel.fiducial[1] - 1)
    return replace(channel, frames=tuple(frame - 1 for frame in channel.frames), fiducial=fiducial)
