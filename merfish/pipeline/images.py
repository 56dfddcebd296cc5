"""Registered images of fields on disk: filtered bits and stains as OME-Zarr, complete or absent for each field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merfish import results
from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import aligned_stain, register_field, stain_shifts
from merfish.imaging.ngff import create_image, fill_levels, open_image, tiles
from merfish.pipeline.folder import new_record, read_record

if TYPE_CHECKING:
    import zarr

BITS, STAINS = "bits.zarr", "stains.zarr"
LEVELS_OF_MOLECULE = 1000  # stored levels per height of a molecule: finer than noise; files are a third as large


def image_folder(out: Path, fov: int) -> Path:
    """Return the folder of the images of a field."""
    return out / results.IMAGES / f"fov_{fov:04d}"


@contextmanager
def new_images(out: Path, fov: int, parts: Mapping[str, str]) -> Iterator[Path]:
    """Yield a folder for the images of a field; it appears, with what they depend on, once all are written."""
    with new_record(image_folder(out, fov), parts) as (folder, says):
        yield folder
        says["sizes"] = _sizes(folder)


def has_images(out: Path, fov: int, parts: Mapping[str, str]) -> bool:
    """Return whether the images of a field exist and were made from the current inputs and parameters."""
    folder = image_folder(out, fov)
    says = read_record(folder)
    return says is not None and says["parts"] == dict(parts) and says["sizes"] == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files in the stores of a folder, in bytes."""
    files = (path for store in folder.iterdir() if store.is_dir() for path in store.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


@dataclass(frozen=True, eq=False)
class ImageWork:
    """Registers one field that was decoded before, and saves its images."""

    experiment: Experiment
    config: RunConfig
    calibration: Calibration
    out: Path
    parts: Mapping[int, Mapping[str, str]]

    def __call__(self, fov: int) -> None:
        bits = register_field(self.experiment, fov, self.config, self.calibration).bits
        with new_images(self.out, fov, self.parts[fov]) as folder:
            write_images(self.experiment, fov, bits, self.calibration, folder)


def write_images(experiment: Experiment, fov: int, bits: np.ndarray, calibration: Calibration, folder: Path) -> None:
    """Write the bits of a field (bit, z, y, x) in camera counts after filtering, and its stains, in pixels of round 0.

    Bits are rounded to a power of two that is at most a thousandth of a molecule's height.
    """
    scale = experiment.microns_per_pixel
    z_step = float(np.median(np.diff(experiment.z))) if len(experiment.z) > 1 else 1.0
    microns = (z_step, scale, scale)
    steps = [2.0 ** np.floor(np.log2(height / LEVELS_OF_MOLECULE)) if height > 0 else 0.0
             for height in calibration.normalization.scale]  # fmt: skip
    names = [channel.name for channel in experiment.bits]
    levels = create_image(folder / BITS, bits.shape, "float32", names, microns)
    for k, (image, step) in enumerate(zip(bits, steps, strict=True)):
        _write_channel(levels[0], k, np.rint(image / step) * step if step else image)
    fill_levels(levels)
    shifts, _ = stain_shifts(experiment, fov, [channel.name for channel in experiment.stains])
    stains = {name: aligned_stain(experiment, fov, name, shift).max(axis=0) for name, shift in shifts.items()}
    if stains:
        shape = (len(stains), 1, *next(iter(stains.values())).shape)
        levels = create_image(folder / STAINS, shape, "uint16", list(stains), microns)
        for k, image in enumerate(stains.values()):
            _write_channel(levels[0], k, np.clip(np.rint(image), 0, 65535)[None])
        fill_levels(levels)


def _write_channel(level: zarr.Array[Any], channel: int, image: np.ndarray) -> None:
    for y, x in tiles(image.shape):
        level[channel, :, y, x] = image[:, y, x]


# --- reading ------------------------------------------------------------------------------------------------------


def saved_channels(out: Path, fov: int) -> dict[str, tuple[Path, int]]:
    """Return the saved stains and bits of a field by name: the OME-Zarr image and the index of the channel.

    Raises InputError if the images of the field are missing, damaged, or do not belong to its results.
    """
    decoded = read_record(results.field_folder(out, fov))
    if decoded is None or not has_images(out, fov, decoded["parts"]):
        raise InputError(
            f"{image_folder(out, fov)}: no saved images of the results in {out}; "
            "repeat the run into the same folder with --save-images"
        )
    found: dict[str, tuple[Path, int]] = {}
    for name in (STAINS, BITS):
        path = image_folder(out, fov) / name
        if path.is_dir():
            found |= {label: (path, k) for k, label in enumerate(open_image(path)[1])}
    return found
