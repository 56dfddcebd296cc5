"""What was imaged where: from the tables that describe an experiment to (field, bit, plane) -> file, frame."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from merfish.codebook import Codebook, read_codebook
from merfish.errors import InputError
from merfish.imaging import images
from merfish.imaging.organization import (
    NO_ROUND,
    Z_TOLERANCE,
    Channel,
    Movie,
    read_data_organization,
    read_microscope,
    read_positions,
)

# Seconds that a user's expressions may take over all file names: real ones need microseconds a name.
MATCH_SECONDS = 20.0


@dataclass(frozen=True, eq=False)
class Experiment:
    """A raw experiment: its tables, checked against each other, and the files found.

    tables: the four files that describe it, by `open_experiment`'s names. positions: (fov, 2) float64, stage x, y in
    micrometre. image_dimensions: (width, height) of a frame as stored, None if the microscope file does not say. After
    reading, an image is transposed, then flipped along x (``flip_horizontal``), then along y (``flip_vertical``).
    bits are in codebook order and share the planes ``z`` (micrometre, ascending). files: (movie, fov) -> path;
    `preflight` lists what is missing. registered: the files hold whole stacks whose rounds lie on each other already.
    """

    folder: Path
    tables: dict[str, Path]
    codebook: Codebook
    microns_per_pixel: float
    transpose: bool
    flip_horizontal: bool
    flip_vertical: bool
    image_dimensions: tuple[int, int] | None
    positions: np.ndarray
    bits: tuple[Channel, ...]
    stains: tuple[Channel, ...]
    files: Mapping[tuple[Movie, int], Path]
    registered: bool = False

    @property
    def fovs(self) -> tuple[int, ...]:
        """Every field that has a stage position."""
        return tuple(range(len(self.positions)))

    @property
    def z(self) -> tuple[float, ...]:
        """Planes of the bits, micrometre, ascending."""
        return self.bits[0].z

    @cached_property
    def frames_needed(self) -> dict[Movie, dict[int, list[str]]]:
        """Which frames of each movie are used, and by which channels, beads as "beads"."""
        needed: dict[Movie, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for channel in (*self.bits, *self.stains):
            for frame in channel.frames:
                needed[channel.movie][frame].append(channel.name)
            if channel.fiducial is not None:
                movie, frame = channel.fiducial
                needed[movie][frame].append("beads")
        return {movie: dict(frames) for movie, frames in needed.items()}

    def file(self, movie: Movie, fov: int) -> Path:
        """The file of ``movie`` for a field. Raises InputError if there is none."""
        if fov not in self.fovs:
            raise InputError(
                f"field {fov} has no stage position; the experiment has fields 0 to {len(self.positions) - 1}"
            )
        path = self.files.get((movie, fov))
        if path is None:
            raise InputError(
                f"{self.folder}: no file for image type {movie.image_type!r}, field {fov}, "
                f"imaging round {movie.imaging_round}; expected a name matching {movie.regexp}"
            )
        return path


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
        raise InputError(f"{root}: expected a folder with the images of an experiment")
    tables = {
        "data_organization": Path(data_organization or root / "data_organization.csv"),
        "codebook": Path(codebook or root / "codebook.csv"),
        "positions": Path(positions or root / "positions.csv"),
        "microscope": Path(microscope or root / "microscope.json"),
    }
    if data_organization is None and not tables["data_organization"].exists():
        from merfish.imaging.registered import open_registered, stack_files

        if stacks := stack_files(root):
            del tables["data_organization"]
            return open_registered(root, stacks, tables)
    book = read_codebook(tables["codebook"])
    channels = read_data_organization(tables["data_organization"], book.bit_names)
    bits, stains = _match_bits(channels, book, tables["data_organization"])
    stage = read_positions(tables["positions"])
    scope = read_microscope(tables["microscope"])
    movies = {channel.movie for channel in channels} | {c.fiducial[0] for c in channels if c.fiducial is not None}
    files = _find_files(root, movies, len(stage), tables["data_organization"])
    return Experiment(root, tables, book, positions=stage, bits=bits, stains=stains, files=files, **scope)


def preflight(experiment: Experiment, fovs: Iterable[int] | None = None) -> pd.DataFrame:
    """Check every image file that some fields (default: all) need, reading headers, and look for files given twice.

    Returns one row a field and file: fov, channel (names, comma separated), round, file, expected, found, problem
    (empty if there is none). Expected are uint16 frames of the microscope's dimensions (else of the commonest size),
    as many as in most files of the same image type and enough for the data organization.

    Raises InputError for a field without a stage position.
    """
    chosen = list(experiment.fovs if fovs is None else fovs)
    sources = [(movie, fov) for fov in chosen for movie in experiment.frames_needed]
    paths: dict[tuple[Movie, int], Path] = {}
    for movie, fov in sources:
        with suppress(InputError):
            paths[movie, fov] = experiment.file(movie, fov)
        if fov not in experiment.fovs:
            experiment.file(movie, fov)
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(paths, pool.map(_header_or_reason, paths.values()), strict=True))
    readable = {source: header for source, header in headers.items() if isinstance(header, images.Header)}
    shape = _expected_shape(experiment, readable)
    usual = {
        kind: Counter(h.frames for (m, _), h in readable.items() if m.image_type == kind).most_common(1)[0][0]
        for kind in {movie.image_type for movie, _ in readable}
    }
    twins = _same_content([paths[source] for source in readable])
    rows = []
    for movie, fov in sources:
        needed = experiment.frames_needed[movie]
        frames = max(usual.get(movie.image_type, 0), max(needed) + 1)
        found = headers.get((movie, fov), f"missing: no name matches {movie.regexp} with type {movie.image_type!r}")
        path = paths.get((movie, fov))
        rows.append(
            {
                "fov": fov,
                "channel": ", ".join(dict.fromkeys(name for names in needed.values() for name in names)),
                "round": movie.imaging_round,
                "file": path.name if path else "",
                "expected": _describe(frames, shape, np.dtype(np.uint16)),
                "found": found if isinstance(found, str) else _describe(found.frames, found.shape, found.dtype),
                "problem": _problem(found, frames, max(needed), shape, experiment.registered) or twins.get(path, ""),
            }
        )
    return pd.DataFrame(rows, columns=["fov", "channel", "round", "file", "expected", "found", "problem"])


def _header_or_reason(path: Path) -> images.Header | str:
    try:
        return images.read_header(path)
    except InputError as error:
        return str(error)


def _expected_shape(experiment: Experiment, headers: Mapping[tuple[Movie, int], images.Header]) -> tuple[int, int]:
    if experiment.image_dimensions is not None:
        width, height = experiment.image_dimensions
        return height, width
    shapes = Counter(header.shape for header in headers.values())
    return shapes.most_common(1)[0][0] if shapes else (0, 0)


def _describe(frames: int, shape: tuple[int, int], dtype: np.dtype) -> str:
    return f"{frames} frames, {shape[1]} x {shape[0]} px, {dtype}"


def _problem(found: images.Header | str, frames: int, last: int, shape: tuple[int, int], registered: bool) -> str:
    if isinstance(found, str):
        return "missing" if found.startswith("missing") else found
    problems = [found.problem] if found.problem else []
    if found.frames <= last:
        problems.append(f"{found.frames} frames, but frame {last} (from 0) is needed")
    elif found.frames != frames:
        problems.append(f"{found.frames} frames, most files of this type have {frames}")
    if found.shape != shape:
        problems.append(f"size {found.shape[1]} x {found.shape[0]} px instead of {shape[1]} x {shape[0]}")
    if found.dtype != np.uint16 and not (registered and found.dtype.kind in "uif"):
        problems.append(f"pixels are {found.dtype} instead of uint16")
    return "; ".join(problems)


def _same_content(paths: Iterable[Path]) -> dict[Path | None, str]:
    """Files whose bytes equal another's, with what to say; files that hold nothing but one value do not count."""
    alike: dict[object, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        alike[images.fingerprint(path, whole=False)].append(path)
    same: dict[object, list[Path]] = defaultdict(list)
    for group in alike.values():
        if len(group) > 1 and not images.is_constant(group[0]):
            for path in group:
                same[images.fingerprint(path, whole=True)].append(path)
    return {
        path: f"same content as {next(other.name for other in group if other != path)}: a field or round given twice"
        for group in same.values()
        if len(group) > 1
        for path in group
    }


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
            raise InputError(f"{path}: bitNumber {bit + 1} stands in several rows: {lines}")
    bits = tuple(rows[bit][0] for bit in range(book.n_bits))
    _check_names(bits, book, path)
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
        raise InputError(f"{path}: channel names stand in several rows: {', '.join(doubled)}")
    return bits, stains


def _check_names(bits: tuple[Channel, ...], book: Codebook, path: Path) -> None:
    """If codebook and data organization name the same readouts, they must number them alike."""
    for k, channel in enumerate(bits):
        if channel.readout in book.bit_names and book.bit_names[k] != channel.readout:
            raise InputError(
                f"{path}: line {channel.line}: bitNumber {k + 1} is readout {channel.readout!r}, but the codebook's "
                f"bit {k + 1} is {book.bit_names[k]!r} and its bit {book.bit_names.index(channel.readout) + 1} is "
                f"{channel.readout!r}"
            )


def _find_files(root: Path, movies: Iterable[Movie], n_fovs: int, table: Path) -> dict[tuple[Movie, int], Path]:
    """Match the names of a folder's images; each may be one movie of one field."""
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
                raise InputError(
                    f"{root / name}: field {fov}, but the positions list {n_fovs} fields, 0 to {n_fovs - 1}"
                )
            refuse_escape(root, entries[name])
            movie = same_type[number]
            other = files.setdefault((movie, fov), root / name)
            if other != root / name:
                raise InputError(f"{other} and {name} are both {movie.image_type!r} field {fov} round {number}")
    if not files:
        raise InputError(f"{root}: none of its {len(names)} image files matches the expressions of {table}")
    return files


def _name_number(where: str, group: str, text: str | None, default: int | None) -> int:
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{where}: group {group}: expected a number, got {text!r}")
    return int(text)


def refuse_escape(root: Path, entry: os.DirEntry[str]) -> None:
    """Raise InputError for a link that leads out of the experiment's folder."""
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{entry.path}: links to {Path(entry.path).resolve()}, outside the experiment's folder")


# Runs in a process of its own: Python's matcher cannot be interrupted from a thread, and some expressions take
# exponential time. An expression must match a name up to its extension; if it matches none so, from its start.
_MATCHER = r"""
import json, re, sys
expressions, names = json.load(sys.stdin)
stem = re.compile(r"(?:\.ome)?\.[A-Za-z0-9]+$")
result = []
for text in expressions:
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        result.append(str(error))
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
    """Match every name against every expression within `MATCH_SECONDS`.

    Returns, for each expression, the groups of each name that it matches, or what is wrong with it.
    Raises InputError if matching takes too long.
    """
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([expressions, names]),
            capture_output=True,
            text=True,
            timeout=MATCH_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"matching {len(names)} file names took more than {MATCH_SECONDS:g} s; simplify the expressions: "
            + " ; ".join(expressions)
        ) from error
    result: list[dict[str, dict[str, str | None]] | str] = json.loads(answer.stdout)
    return result
