"""Open a folder of registered stacks, one for each field, as an experiment."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from merfish._files import refuse_escape
from merfish.codebook import read_codebook
from merfish.errors import InputError
from merfish.imaging import images
from merfish.imaging.experiment import Experiment
from merfish.imaging.organization import NO_ROUND, Channel, Movie, read_microscope, read_positions

BITS = "stack"  # stack_0.tif, stack_1.tif, ... contain the bits; DAPI_0.tif, ... the stain DAPI
_NAME = re.compile(r"(.+?)_0*(\d{1,9})(?:\.ome)?\.[A-Za-z0-9]+")


def stack_files(folder: Path) -> dict[str, dict[int, Path]]:
    """Find the image files NAME_FIELD.ext of a folder, by name and field; empty if no name is ``stack``.

    Raises InputError for two files with the same name and field, and for links to files outside the folder.
    """
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        match = _NAME.fullmatch(entry.name)
        if match and Path(entry.name).suffix.lower() in images.SUFFIXES:
            refuse_escape(folder, entry)
            other = found[match[1]].setdefault(int(match[2]), folder / entry.name)
            if other.name != entry.name:
                raise InputError(f"{other} and {entry.name} are both {match[1]!r} of field {int(match[2])}")
    return dict(found) if BITS in found else {}


def open_registered(folder: Path, files: dict[str, dict[int, Path]], tables: dict[str, Path]) -> Experiment:
    """Open registered stacks as an experiment without rounds and drift, of one colour.

    files: as from `stack_files`: each ``stack`` is (bit, y, x) or (bit, z, y, x) of any real dtype, bits in codebook
    order; other names are stains. tables: codebook, positions, microscope; only microns_per_pixel of the last is used,
    since stacks are assumed to be oriented. z is the plane index.

    Raises InputError for stacks that do not match the codebook or the positions.
    """
    book, stage = read_codebook(tables["codebook"]), read_positions(tables["positions"])
    scope = read_microscope(tables["microscope"])
    beyond = [path for group in files.values() for fov, path in group.items() if fov >= len(stage)]
    if beyond:
        raise InputError(f"{beyond[0]}: {tables['positions']} lists {len(stage)} fields, 0 to {len(stage) - 1}")
    movies = {name: Movie(name, f"{re.escape(name)}_(?P<fov>[0-9]+)", NO_ROUND) for name in files}
    n_planes = _planes(next(iter(files[BITS].values())), book.n_bits)
    bits = [
        _channel(name, k, movies[BITS], range(k * n_planes, (k + 1) * n_planes))
        for k, name in enumerate(book.bit_names)
    ]
    stains = [
        _channel(name, None, movies[name], range(images.read_header(next(iter(group.values()))).frames))
        for name, group in files.items()
        if name != BITS
    ]
    return Experiment(
        folder=folder,
        tables=tables,
        codebook=book,
        microns_per_pixel=scope["microns_per_pixel"],
        transpose=False,
        flip_horizontal=False,
        flip_vertical=False,
        image_dimensions=None,
        positions=stage,
        bits=tuple(bits),
        stains=tuple(stains),
        files={(movies[name], fov): path for name, group in files.items() for fov, path in group.items()},
        registered=True,
    )


def _planes(path: Path, n_bits: int) -> int:
    frames = images.read_header(path).frames
    if frames == 0 or frames % n_bits:
        raise InputError(f"{path}: {frames} images, which is not a multiple of the codebook's {n_bits} bits")
    return frames // n_bits


def _channel(name: str, bit: int | None, movie: Movie, frames: range) -> Channel:
    z = tuple(float(k) for k in range(len(frames)))
    return Channel(name, name, 0, bit, "", movie, tuple(frames), z, None)
