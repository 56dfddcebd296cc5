"""Inputs and cost of a run: ``merfish run --dry-run``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merfish._text import counted
from merfish.config import RunConfig
from merfish.imaging import images
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import chosen_stains
from merfish.imaging.opening import open_experiment
from merfish.pipeline import check_files, choose_fovs, fields_text, refuse_folder
from merfish.pipeline.cluster import cores
from merfish.pipeline.status import decoded_fields

# Core seconds per field of 2048 x 2048 px, 16 bits, one plane, two stains; see benchmarks/README.md
_AREA, _BITS = 2048 * 2048, 16
_REGISTER, _DECODE, _SEGMENT, _AFTER, _CALIBRATE = 2 * 1.5, 2 * 2.3, 2 * 1.3, 2 * 0.15 + 0.5, 2 * 1.6
# Bytes: of a process before its first field; in memory per pixel and bit of a field; on disk per pixel of a field at
# the 0.01 molecules/px of the benchmark. From "tiny" and "memory" of benchmarks/results/pipeline_speed.md.
_PROCESS, _PIXEL_BIT, _PIXEL_ON_DISK = 400e6, 19.5, 3.0


@dataclass(frozen=True)
class Cost:
    """Cost of a run.

    seconds: of all fields, on ``processes`` that share the cores of the machine. memory, disk: bytes.
    """

    seconds: float
    memory: float
    disk: float


def plan_lines(
    experiment: Path,
    out: Path,
    config: RunConfig,
    fovs: Sequence[int] | None,
    workers: int | None,
    tables: Mapping[str, Path | None],
    keep_going: bool,
) -> list[str]:
    """Describe what `merfish.pipeline.process` would read and need. Reads headers only, and writes nothing.

    Raises InputError if the run would reject its input before any work.
    """
    source = open_experiment(experiment, **dict(tables))
    stains = [name for name in chosen_stains(source, config) if name is not None]
    chosen = choose_fovs(source, fovs)
    faulty = check_files(source, chosen, keep_going)
    refuse_folder(out, source)
    good = [fov for fov in chosen if fov not in faulty]
    files = {source.files[movie, fov] for movie in source.frames_needed for fov in good}
    shape = images.read_header(next(iter(files))).shape
    processes = min(workers or 1, cores())
    cost = run_cost(source, shape, len(good), segmented=bool(stains), config=config, processes=processes)
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    planes = counted(len(source.z), "plane")
    kind = "registered stacks" if source.registered else "raw images"
    size = sum(part.stat().st_size for path in files for part in (path.rglob("*") if path.is_dir() else [path]))
    there = decoded_fields(out)
    return [
        f"{source.folder}: {kind}, {source.codebook.n_bits} bits, {planes}, {shape[1]} x {shape[0]} px",
        f"stains      {', '.join(stains) or 'none: cells are not segmented'}",
        f"fields      {len(good)} of {len(source.fovs)} ({fields_text(good)})",
        *(f"skipped     field {fov}: {reason}" for fov, reason in faulty.items()),
        f"files       {len(files)}, {_bytes(size)}; all have the expected frames, size and type",
        *([f"resumes     {out} has {len(there)} fields; unchanged ones are reused"] if there else []),
        f"method      {config.method}" + ("" if config.method == "spots" else "; the time is estimated for spots"),
        f"time        about {_duration(cost.seconds)} on {processes} process{'es' if processes > 1 else ''}, "
        f"{counted(cores(), 'core')} of this machine, if no field has been decoded yet",
        f"memory      about {_bytes(cost.memory)}",
        f"disk        about {_bytes(cost.disk)} of {_bytes(free)} free"
        + ("; NOT ENOUGH: choose another folder or free some space" if cost.disk > free else ""),
        "nothing was run",
    ]


def run_cost(
    experiment: Experiment, shape: tuple[int, int], n: int, *, segmented: bool, config: RunConfig, processes: int
) -> Cost:
    """Estimate the cost of ``n`` fields of ``shape`` (y, x), scaled from a field of the benchmark.

    The time of registration and decoding is proportional to pixels, bits and planes, that of segmentation to pixels,
    and that of the steps after decoding to pixels and planes.
    """
    area, planes = shape[0] * shape[1], len(experiment.z)
    fraction = area / _AREA
    stack = fraction * planes * experiment.codebook.n_bits / _BITS
    surveyed = min(config.normalization_fields, len(experiment.fovs))
    a_field = stack * (_REGISTER + _DECODE) + segmented * fraction * _SEGMENT + fraction * planes * _AFTER
    seconds = (n * a_field + surveyed * stack * _CALIBRATE) / cores()
    memory = processes * (_PROCESS + _PIXEL_BIT * area * planes * experiment.codebook.n_bits)
    return Cost(seconds, memory, n * area * planes * _PIXEL_ON_DISK)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
