"""An experiment: its tables, checked against each other, and the paths of its images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from merfish.codebook import Codebook
from merfish.errors import InputError
from merfish.imaging.organization import Channel, Movie


@dataclass(frozen=True, eq=False)
class Experiment:
    """A raw experiment: its tables, checked against each other, and its image files.

    tables: the four files that describe it, by their names in `open_experiment`. positions: (fov, 2) float64, stage
    x, y in micrometres. image_dimensions: (width, height) of a frame as stored, None if not given. After reading, an
    image is transposed, then flipped along x (``flip_horizontal``), then along y (``flip_vertical``).
    bits: in codebook order, with the same planes ``z`` (micrometre, ascending). files: (movie, fov) -> path;
    `preflight` lists missing files. registered: the files are whole stacks whose rounds are aligned already.
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
        """All fields that have a stage position."""
        return tuple(range(len(self.positions)))

    @property
    def z(self) -> tuple[float, ...]:
        """Planes of the bits, micrometre, ascending."""
        return self.bits[0].z

    @cached_property
    def frames_needed(self) -> dict[Movie, dict[int, list[str]]]:
        """Frames of each movie that are used, and the channels that use them; beads are named "beads"."""
        needed: dict[Movie, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for channel in (*self.bits, *self.stains):
            for frame in channel.frames:
                needed[channel.movie][frame].append(channel.name)
            if channel.fiducial is not None:
                movie, frame = channel.fiducial
                needed[movie][frame].append("beads")
        return {movie: dict(frames) for movie, frames in needed.items()}

    def stain(self, name: str) -> Channel:
        """Channel of a stain; the case of its name is ignored. Raises InputError if there is none."""
        for channel in self.stains:
            if channel.name.lower() == name.lower():
                return channel
        known = ", ".join(channel.name for channel in self.stains) or "none"
        raise InputError(f"no stain {name!r} in the data organization; it has {known}")

    def file(self, movie: Movie, fov: int) -> Path:
        """File of ``movie`` for a field. Raises InputError if there is none."""
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
