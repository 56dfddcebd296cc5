"""Read the images of one field: bits, beads, stains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from merfish._jit import map_bits
from merfish.errors import InputError
from merfish.imaging.experiment import Experiment
from merfish.imaging.images import read_frames, read_stack
from merfish.imaging.organization import Channel, Movie


def read_bits(experiment: Experiment, fov: int) -> np.ndarray:
    """Read a field's bits, uint16 (bit, z, y, x), oriented, in codebook order, planes ascending.

    Registered stacks may have any real dtype. Raises InputError for values that are not finite.
    """
    if experiment.registered:
        return _read_registered(experiment, fov)
    images = _read_channels(experiment, fov, experiment.bits)
    return np.stack(images).reshape(len(experiment.bits), -1, *images[0].shape)


def _read_registered(experiment: Experiment, fov: int) -> np.ndarray:
    path = experiment.file(experiment.bits[0].movie, fov)
    stack = read_stack(path)
    shape = (len(experiment.bits), len(experiment.z))
    if (stack.shape[0], *(stack.shape[1:-2] or (1,))) != shape:
        raise InputError(f"{path}: a stack of shape {stack.shape}, expected {shape[0]} bits of {shape[1]} planes")
    if stack.dtype.kind == "f" and not np.isfinite(stack).all():
        raise InputError(f"{path}: expected finite values, found NaN or infinity")
    return stack.reshape(*shape, *stack.shape[-2:])


def read_fiducials(experiment: Experiment, fov: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a field's bead images, oriented, each once: (round, y, x), and the round of each bit, int64 (bit,).

    Rounds are numbered in the order in which the bits first use them; round 0 is the reference. In an experiment
    without beads the first array has no rounds, (0, y, x), and rounds are the bits' movies.
    """
    beads = [channel.fiducial for channel in experiment.bits]
    if any(source is None for source in beads):
        movies = [channel.movie for channel in experiment.bits]
        order = list(dict.fromkeys(movies))
        height, width = _oriented(experiment, read_frames(experiment.file(order[0], fov), [0])[0]).shape
        return np.empty((0, height, width), np.uint16), np.array([order.index(movie) for movie in movies])
    sources = list(dict.fromkeys(source for source in beads if source is not None))
    images = [_oriented(experiment, image) for image in _read_sources(experiment, fov, sources)]
    return np.stack(images), np.array([sources.index(source) for source in beads if source is not None])


def read_reference(experiment: Experiment, fov: int) -> np.ndarray | None:
    """Read the bead image (y, x) of a field's round 0, oriented; None in an experiment without beads."""
    source = experiment.bits[0].fiducial
    if source is None or any(channel.fiducial is None for channel in experiment.bits):
        return None
    return _oriented(experiment, _read_sources(experiment, fov, [source])[0])


def read_stain(experiment: Experiment, fov: int, name: str) -> np.ndarray:
    """Read a stain, uint16 (z, y, x) with the planes of its channel, oriented.

    Raises InputError if the experiment has no stain of that name (case does not matter).
    """
    return np.stack(_read_channels(experiment, fov, [experiment.stain(name)]))


def read_stain_beads(experiment: Experiment, fov: int, name: str) -> np.ndarray | None:
    """Read the beads (y, x) of a stain's round, oriented; None without beads. Raises InputError as `read_stain`."""
    beads = experiment.stain(name).fiducial
    return None if beads is None else _oriented(experiment, _read_sources(experiment, fov, [beads])[0])


def _read_channels(experiment: Experiment, fov: int, channels: Sequence[Channel]) -> list[np.ndarray]:
    """Read the planes (y, x) of several channels, one after the other."""
    sources = [(channel.movie, frame) for channel in channels for frame in channel.frames]
    return [_oriented(experiment, image) for image in _read_sources(experiment, fov, sources)]


def _read_sources(experiment: Experiment, fov: int, sources: Sequence[tuple[Movie, int]]) -> list[np.ndarray]:
    """Read (movie, frame) pairs, opening each file once and reading each frame once."""
    wanted: dict[Movie, dict[int, None]] = defaultdict(dict)
    for movie, frame in sources:
        wanted[movie][frame] = None
    images: dict[tuple[Movie, int], np.ndarray] = {}
    paths = [experiment.file(movie, fov) for movie in wanted]
    stacks = map_bits(lambda file: read_frames(file[0], list(file[1])), list(zip(paths, wanted.values(), strict=True)))
    for (movie, frames), path, stack in zip(wanted.items(), paths, stacks, strict=True):
        if stack.dtype != np.uint16 and not experiment.registered:
            raise InputError(f"{path}: expected 16-bit unsigned images, got {stack.dtype}")
        images |= {(movie, frame): image for frame, image in zip(frames, stack, strict=True)}
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise InputError(f"{experiment.folder}: images of field {fov} differ in size: {sorted(shapes)}")
    return [images[source] for source in sources]


def _oriented(experiment: Experiment, image: np.ndarray) -> np.ndarray:
    """Transpose, then flip along x, then along y, as given in the microscope file; C-contiguous for the kernels."""
    if experiment.transpose:
        image = image.T
    if experiment.flip_horizontal:
        image = image[:, ::-1]
    if experiment.flip_vertical:
        image = image[::-1]
    return np.ascontiguousarray(image)
