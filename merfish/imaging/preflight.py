"""Check all image files of an experiment by headers and fingerprints, before they are processed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from merfish.errors import InputError
from merfish.imaging import images
from merfish.imaging.experiment import Experiment
from merfish.imaging.organization import NO_ROUND, Movie


def preflight(experiment: Experiment, fovs: Iterable[int] | None = None) -> pd.DataFrame:
    """Check the headers of all image files that some fields (default: all) need, and find duplicate files.

    Returns one row for each field and file: fov, channel (names, comma separated), round, file (for a missing one, the
    expression that its name should match), expected, found, problem (empty if there is none). Frames are expected to be
    uint16, of the microscope's dimensions (or else of the most common size), as many as in most files of the same image
    type and enough for the data organization.

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
        found = headers.get((movie, fov), _missing(movie))
        path = paths.get((movie, fov))
        rows.append(
            {
                "fov": fov,
                "channel": ", ".join(dict.fromkeys(name for names in needed.values() for name in names)),
                "round": movie.imaging_round,
                "file": path.name if path else movie.regexp,
                "expected": _describe(frames, shape, np.dtype(np.uint16)),
                "found": found if isinstance(found, str) else _describe(found.frames, found.shape, found.dtype),
                "problem": _problem(found, frames, max(needed), shape, experiment.registered) or twins.get(path, ""),
            }
        )
    return pd.DataFrame(rows, columns=["fov", "channel", "round", "file", "expected", "found", "problem"])


def _missing(movie: Movie) -> str:
    in_round = "" if movie.imaging_round == NO_ROUND else f" and imaging round {movie.imaging_round}"
    return f"missing: no name of image type {movie.image_type!r}{in_round} matches this expression"


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
        return found
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
    """Messages for files with the same bytes as another one; images of a single value are ignored."""
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
