"""What results depend on: each step reuses an earlier result only if the parts that it depends on are equal."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import merfish
from merfish.cells.measure import load_segmenter
from merfish.config import RunConfig
from merfish.imaging.experiment import Experiment
from merfish.imaging.images import fingerprint
from merfish.imaging.organization import Channel
from merfish.pipeline.folder import digest

# Folders of the package whose code affects results.
_CODE = ("calls", "cells", "decoding", "imaging", "pipeline", "simulate")


class Manifest:
    """Digests of everything that results depend on.

    Images are identified by name, size, modification time and samples of their bytes; tables by their content, so that
    a change of format alone has no effect.
    """

    def __init__(self, experiment: Experiment, config: RunConfig) -> None:
        self.experiment = experiment
        self.shared = {
            "data organization": digest([_said(c) for c in (*experiment.bits, *experiment.stains)]),
            "microscope": digest(
                [
                    experiment.microns_per_pixel,
                    experiment.transpose,
                    experiment.flip_horizontal,
                    experiment.flip_vertical,
                    experiment.image_dimensions,
                    experiment.registered,
                ]
            ),
            "codebook": _codebook(experiment),
            "program": digest([versions(), _source()]),
        }
        self.config = config
        flats = {color: fingerprint(path, whole=True)[1].hex() for color, path in config.flat_fields.items()}
        self._parameters = {
            **config.model_dump(exclude={"misidentification_rate"}),
            "flat_fields": flats,
            "segmenter": config.segmenter and [config.segmenter, _source_of(load_segmenter(config.segmenter))],
        }
        self._images: dict[int, str] = {}

    def images(self, fov: int) -> str:
        """Return the digest of the image files of a field; missing files are included as missing."""
        if fov not in self._images:
            files = {}
            for movie in self.experiment.frames_needed:
                path = self.experiment.files.get((movie, fov))
                files[f"{movie.image_type} {movie.imaging_round}"] = None if path is None else _image(path)
            self._images[fov] = digest(files)
        return self._images[fov]

    def of_survey(self, fov: int) -> dict[str, str]:
        """Return what the survey of a field depends on."""
        return {**self.shared, "parameters": digest(self._parameters), "images": self.images(fov)}

    def of_field(self, fov: int, calibration: str, spiked: bool) -> dict[str, str]:
        """Return what the record of a field depends on.

        calibration: its digest. spiked: whether molecules are added to the field.
        """
        return {**self.of_survey(fov), "calibration": calibration, "spike-in": str(spiked)}

    def of_results(self, fields: Mapping[int, Mapping[str, str]], failed: Mapping[int, str]) -> str:
        """Return the key of the results made from fields with these parts."""
        positions = self.experiment.positions.tolist()
        return digest([dict(fields), dict(failed), positions, self.config.misidentification_rate, self.shared])


def changed_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts that differ."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the results."""
    return {name: version(name) for name in ("merfish", "numpy", "scipy", "numba", "scikit-image")}


def _said(channel: Channel) -> dict[str, Any]:
    return {name: value for name, value in asdict(channel).items() if name != "line"}


def _codebook(experiment: Experiment) -> str:
    book = experiment.codebook
    return digest([book.names, book.bit_names, book.words.tolist(), book.is_blank.tolist()])


def _image(path: Path) -> list[Any]:
    size, sample = fingerprint(path, whole=False)
    times = max(p.stat().st_mtime_ns for p in (path.rglob("*") if path.is_dir() else [path]))
    return [path.name, size, times, sample.hex()]


def _source_of(function: Callable[..., Any]) -> str:
    """Return the digest of the file in which a function is defined, empty if there is none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None
    return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _source() -> str:
    root = Path(merfish.__file__).parent
    source = hashlib.sha256()
    for path in sorted(p for folder in _CODE for p in (root / folder).rglob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()
