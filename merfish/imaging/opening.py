"""Open an experiment: match its tables with the names of its images, (field, bit, plane) -> (file, frame)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from merfish._files import refuse_escape
from merfish._text import counted, listed
from merfish.codebook import Codebook, read_codebook
from merfish.errors import InputError
from merfish.imaging import images
from merfish.imaging.experiment import Experiment
from merfish.imaging.organization import (
    NO_ROUND,
    Z_TOLERANCE,
    Channel,
    Movie,
    read_data_organization,
    read_microscope,
    read_positions,
)
from merfish.imaging.registered import open_registered, stack_files

# Time limits for matching a user's regular expressions, seconds: in total, and for each pair of expression and file
# name; typical pairs need microseconds. Memory limit of the matching process: some expressions need unbounded memory.
MATCH_SECONDS, MATCH_SECONDS_A_NAME = 5.0, 5e-5
MATCH_BYTES = 1 << 30


def open_experiment(
    folder: str | os.PathLike[str],
    *,
    data_organization: str | os.PathLike[str] | None = None,
    codebook: str | os.PathLike[str] | None = None,
    positions: str | os.PathLike[str] | None = None,
    microscope: str | os.PathLike[str] | None = None,
) -> Experiment:
    """Read the tables of an experiment in MERlin's layout and find its image files. Opens no image.

    folder: holds the images, and ``data_organization.csv``, ``codebook.csv``, ``positions.csv`` and
    ``microscope.json`` unless others are named. Bits are matched to the codebook's columns by ``bitNumber`` (from 1),
    or by readout name if the file has no such column; other rows are stains. A folder without data organization but
    with images ``stack_FIELD`` holds registered stacks (see `merfish.imaging.registered.open_registered`).

    Raises InputError naming file, row and field for anything that cannot be read or does not agree.
    """
    root = Path(folder)
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise InputError(f"{root}: {found}; expected the folder with the images of an experiment")
    tables = {
        "data_organization": Path(data_organization or root / "data_organization.csv"),
        "codebook": Path(codebook or root / "codebook.csv"),
        "positions": Path(positions or root / "positions.csv"),
        "microscope": Path(microscope or root / "microscope.json"),
    }
    if data_organization is None and not tables["data_organization"].exists() and (stacks := stack_files(root)):
        del tables["data_organization"]
        _refuse_missing(root, tables)
        return open_registered(root, stacks, tables)
    _refuse_missing(root, tables)
    book = read_codebook(tables["codebook"])
    channels = read_data_organization(tables["data_organization"], book.bit_names)
    bits, stains = _match_bits(channels, book, tables["data_organization"])
    stage = read_positions(tables["positions"])
    scope = read_microscope(tables["microscope"])
    movies = {channel.movie for channel in channels} | {c.fiducial[0] for c in channels if c.fiducial is not None}
    files = _find_files(root, movies, len(stage), tables["data_organization"])
    _refuse_shared_frames(bits, files, tables["data_organization"])
    return Experiment(root, tables, book, positions=stage, bits=bits, stains=stains, files=files, **scope)


def _refuse_missing(root: Path, tables: dict[str, Path]) -> None:
    """Refuse an experiment without some tables; the message lists the options for other paths and similar files."""
    missing = {name: path for name, path in tables.items() if not path.exists()}
    if not missing:
        return
    paths = ", ".join(path.name if path.parent == root else str(path) for path in missing.values())
    options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
    kinds = {path.suffix for path in missing.values()}
    there = sorted(path.name for path in root.iterdir() if path.suffix in kinds)
    hint = f" The folder has {listed(there, ', ')}." if there else ""
    raise InputError(f"{root}: not found: {paths}. Give other paths with {options}.{hint}")


def _match_bits(
    channels: tuple[Channel, ...], book: Codebook, path: Path
) -> tuple[tuple[Channel, ...], tuple[Channel, ...]]:
    """Split channels into bits, in codebook order, and stains; refuse tables that disagree."""
    rows: dict[int, list[Channel]] = defaultdict(list)
    for channel in channels:
        if channel.bit is not None and channel.bit < book.n_bits:
            rows[channel.bit].append(channel)
    missing = [k + 1 for k in range(book.n_bits) if k not in rows]
    if missing:
        raise InputError(f"{path}: no row for bit {', '.join(map(str, missing))} of the codebook's {book.n_bits} bits")
    for bit, doubles in sorted(rows.items()):
        if len(doubles) > 1:
            lines = ", ".join(f"line {c.line} ({c.name!r})" for c in doubles)
            raise InputError(f"{path}: bitNumber {bit + 1} appears in several rows: {lines}")
    bits = tuple(rows[bit][0] for bit in range(book.n_bits))
    _check_names(bits, book, path)
    _refuse_more_bits(channels, bits, path)
    first = bits[0]
    for channel in bits[1:]:
        same = len(channel.z) == len(first.z) and np.allclose(channel.z, first.z, rtol=0, atol=Z_TOLERANCE)
        if not same:
            raise InputError(
                f"{path}: line {channel.line} ({channel.name!r}): zPos {channel.z} differs from {first.z} "
                f"of line {first.line} ({first.name!r}); every bit needs the same planes"
            )
    stains = tuple(replace(channel, bit=None) for channel in channels if channel not in bits)
    names = [channel.name for channel in (*bits, *stains)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"{path}: channel names appear in several rows: {', '.join(doubled)}")
    return bits, stains


def _check_names(bits: tuple[Channel, ...], book: Codebook, path: Path) -> None:
    """Refuse a codebook and a data organization that number the same readouts differently."""
    for k, channel in enumerate(bits):
        if channel.readout in book.bit_names and book.bit_names[k] != channel.readout:
            raise InputError(
                f"{path}: line {channel.line}: bitNumber {k + 1} is readout {channel.readout!r}, but the codebook's "
                f"bit {k + 1} is {book.bit_names[k]!r} and its bit {book.bit_names.index(channel.readout) + 1} is "
                f"{channel.readout!r}"
            )


def _refuse_more_bits(channels: Sequence[Channel], bits: Sequence[Channel], path: Path) -> None:
    """Refuse rows beyond the codebook's bits that are not stains: the codebook is then one of a shorter code.

    Some laboratories also number stains and sequentially imaged genes, far beyond the bits or right after them. A row
    is a bit if its name is like those of the bits (bit17 beside bit1 to bit16), or if its number follows theirs without
    a gap and it has the image type and a colour of the bits.
    """
    stems = {_stem(channel.name) for channel in bits}
    images_of_bits = {(channel.movie.image_type, channel.color) for channel in bits}
    numbers = {channel.bit for channel in channels}
    more = []
    for channel in channels:
        if channel in bits or channel.stain:
            continue
        bit = channel.bit
        follows = bit is not None and bit < len(channels) and numbers >= set(range(len(bits), bit + 1))
        if _stem(channel.name) in stems or (follows and (channel.movie.image_type, channel.color) in images_of_bits):
            more.append(channel)
    if more:
        rows = listed([f"line {c.line} ({c.name!r})" for c in more], ", ")
        raise InputError(
            f"{path}: the codebook has {len(bits)} bits, but the table has more: {rows}. Use the codebook of "
            "this experiment; for stains, leave bitNumber empty"
        )


def _stem(name: str) -> str:
    """A name with its numbers masked; names of bits differ in their numbers only."""
    return re.sub(r"[0-9]+", "#", name).lower()


def _refuse_shared_frames(bits: Sequence[Channel], files: Mapping[tuple[Movie, int], Path], table: Path) -> None:
    """Refuse bits that use the same image, or an image of beads. Different expressions may match the same file."""
    of_movie: dict[Movie, Path] = {}
    for (movie, _), path in sorted(files.items(), key=lambda item: item[0][1]):
        of_movie.setdefault(movie, path)
    beads: dict[tuple[Path | Movie, int], Channel] = {}
    for channel in bits:
        if channel.fiducial is not None:
            movie, frame = channel.fiducial
            beads.setdefault((of_movie.get(movie, movie), frame), channel)
    shown: dict[tuple[Path | Movie, int], Channel] = {}
    for channel in bits:
        for frame in channel.frames:
            place = (of_movie.get(channel.movie, channel.movie), frame)
            where = f"{table}: line {channel.line} ({channel.name!r}): frame {frame} of image type "
            where += f"{channel.movie.image_type!r}, round {channel.movie.imaging_round},"
            if place in beads:
                raise InputError(f"{where} shows the beads of line {beads[place].line} ({beads[place].name!r})")
            other = shown.setdefault(place, channel)
            if other is not channel:
                raise InputError(
                    f"{where} is also that of line {other.line} ({other.name!r}); each bit needs its own frame"
                )


def _find_files(root: Path, movies: Iterable[Movie], n_fovs: int, table: Path) -> dict[tuple[Movie, int], Path]:
    """Match the names of a folder's images to movies and fields."""
    entries = {entry.name: entry for entry in os.scandir(root) if Path(entry.name).suffix.lower() in images.SUFFIXES}
    names = sorted(entries)
    by_expression: dict[str, list[Movie]] = defaultdict(list)
    for movie in movies:
        by_expression[movie.regexp].append(movie)
    files: dict[tuple[Movie, int], Path] = {}
    for regexp, groups in zip(by_expression, match_names(list(by_expression), names), strict=True):
        if isinstance(groups, str):
            raise InputError(f"{table}: the expression {regexp} cannot be used: {groups}")
        wanted = {(movie.image_type, movie.imaging_round): movie for movie in by_expression[regexp]}
        for name, found in groups.items():
            where = f"{root / name}: by {regexp}"
            same_type = {r: m for (t, r), m in wanted.items() if found.get("imageType") in (None, t)}
            if not same_type:
                continue
            number = _name_number(where, "imagingRound", found.get("imagingRound"), NO_ROUND)
            if number not in same_type:
                continue
            fov = _name_number(where, "fov", found.get("fov"), None)
            if fov >= n_fovs:
                raise InputError(f"{root / name}: field {fov} has no line in the positions, which end at {n_fovs - 1}")
            refuse_escape(root, entries[name])
            movie = same_type[number]
            other = files.setdefault((movie, fov), root / name)
            if other != root / name:
                raise InputError(f"{other} and {name} are both {movie.image_type!r} field {fov} round {number}")
    if not files:
        raise InputError(f"{root}: none of its {counted(len(names), 'image file')} matches an imageRegExp of {table}")
    return files


def _name_number(where: str, group: str, text: str | None, default: int | None) -> int:
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{where}: group {group}: expected a number, got {text!r}")
    return int(text)


# Runs in a separate process: Python's matcher cannot be interrupted from a thread, and some expressions take
# exponential time. An expression must match a name up to its extension; if it matches no name so, the start of a name.
_MATCHER = r"""
import json, re, sys
expressions, names, most = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
except ImportError:
    pass  # Windows
stem = re.compile(r"(?:\.ome)?\.[A-Za-z0-9]+$")
result = []
for text in expressions:
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        result.append(str(error) or type(error).__name__)
        continue
    groups = {}
    for name in names:
        found = pattern.fullmatch(stem.sub("", name)) or pattern.fullmatch(name)
        if found:
            groups[name] = found.groupdict()
    if not groups:
        groups = {name: found.groupdict() for name in names if (found := pattern.match(name))}
    result.append(groups)
json.dump(result, sys.stdout)
"""


def match_names(expressions: list[str], names: list[str]) -> list[dict[str, dict[str, str | None]] | str]:
    """Match every name against every expression, in bounded time and memory.

    Returns, for each expression, the groups of each name that it matches, or the error message of an invalid one.
    Raises InputError if matching takes too much time or memory.
    """
    seconds = MATCH_SECONDS + MATCH_SECONDS_A_NAME * len(names) * len(expressions)
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([expressions, names, MATCH_BYTES]),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"matching {len(names)} file names took more than {seconds:.3g} s; simplify the expressions: "
            + " ; ".join(expressions)
        ) from error
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise InputError(
            f"matching {len(names)} file names failed ({why}); simplify the expressions: " + " ; ".join(expressions)
        ) from error
    result: list[dict[str, dict[str, str | None]] | str] = json.loads(answer.stdout)
    return result
