"""Map: one field's images -> its record: molecules, cell outlines, and the summaries that later steps add up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish import results
from merfish.calls.filtering import Tally, call_features, tally_calls
from merfish.calls.fit import count_fit
from merfish.config import RunConfig
from merfish.decoding.methods import decode_filtered
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import chosen_stains, register_field, register_stains
from merfish.imaging.normalize import Normalization
from merfish.pipeline.folder import new_record
from merfish.pipeline.images import new_images, write_images
from merfish.report import OVERVIEW, STAINS

OVERVIEW_WHITE = 1.5  # height, in molecules, that the overview picture shows as white
STAIN_SIDE = 512  # pixels, at most, of the small pictures of stains
CALLS, OUTLINES, TALLY = "calls.parquet", "outlines.parquet", "tally.npz"
# What a field knows of its calls; the rest of `merfish.transcripts.COLUMNS` follows from the run.
CALL_COLUMNS = (
    "barcode_id", "x", "y", "z", "hamming_distance", "probability", "intensity", "area", "distance", "shown",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FieldWork:
    """Decodes and segments one field into its record; parts: of each field, what the record depends on.

    images: whether its registered images are saved too.
    """

    experiment: Experiment
    config: RunConfig
    calibration: Calibration
    out: Path
    parts: Mapping[int, Mapping[str, str]]
    images: bool = False

    def __call__(self, fov: int) -> int:
        """The number of molecules found."""
        parts = self.parts[fov]
        with (
            new_record(results.field_folder(self.out, fov), parts) as (folder, says),
            new_images(self.out, fov, parts) if self.images else nullcontext() as images,
        ):
            says |= process_field(self.experiment, fov, self.config, self.calibration, folder, images)
        return int(says["n_found"])


def process_field(
    experiment: Experiment,
    fov: int,
    config: RunConfig,
    calibration: Calibration,
    folder: Path,
    images: Path | None = None,
) -> dict[str, Any]:
    """Decode and segment one field into files of ``folder``; returns what the record says of it.

    images: a folder for its registered images, None if they are not wanted.
    """
    clock = _Clock()
    field = register_field(experiment, fov, config, calibration)
    clock.lap("register")
    calls = decode_filtered(field.bits, experiment.codebook, calibration.normalization, method=config.method)
    # where some round has no image nothing can be told
    calls = calls[field.valid[np.rint(calls["y"]).astype(int), np.rint(calls["x"]).astype(int)]]
    clock.lap("decode")
    outlines, stains, faults = segment_field(experiment, fov, config)
    clock.lap("segment")
    pq.write_table(pa.Table.from_pandas(calls[list(CALL_COLUMNS)], preserve_index=False), folder / CALLS)
    write_outlines(outlines, folder / OUTLINES)
    np.save(folder / OVERVIEW, overview(field.bits, calibration.normalization))
    write_small_stains(stains, folder / STAINS)
    write_tally(calls, folder / TALLY)
    clock.lap("write")
    if images is not None:
        write_images(experiment, fov, field.bits, calibration, images)
        clock.lap("save images")
    return {
        "drift": field.drift.to_dict("records"),
        "shape": field.valid.shape,
        "saturated": field.saturated.tolist(),
        "quality": field.quality.to_dict("list"),
        "n_found": len(calls),
        "fit": asdict(count_fit(calls)),
        "n_outlines": len(outlines),
        "stains_not_aligned": faults,
        "seconds": clock.laps,
    }


class _Clock:
    """Seconds of each of the steps that follow each other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def overview(bits: np.ndarray, normalization: Normalization) -> np.ndarray:
    """The brightest bit of each pixel, uint8 (y, x)."""
    brightest = np.zeros(bits.shape[-2:], np.float32)
    # bit by bit: a second stack of heights would take as much memory as the field itself
    for image, background, gain in zip(bits, normalization.background, normalization.gain, strict=True):
        np.maximum(brightest, (image.max(axis=0) - background) * gain, out=brightest)
    return (np.minimum(brightest / OVERVIEW_WHITE, 1) * 255).astype(np.uint8)


def segment_field(
    experiment: Experiment, fov: int, config: RunConfig
) -> tuple[list[shapely.Polygon], dict[str, np.ndarray], dict[str, str]]:
    """Outlines of the cells of a field, pixels of round 0, none without a stain of the nuclei; stains and their faults.

    A stain that cannot be aligned is used as it is: outlines bear a drift of some pixels, a field without cells helps
    nobody.
    """
    from merfish.cells.segmentation import outlines, segment

    nuclei, body = chosen_stains(experiment, config)
    if nuclei is None:
        return [], {}, {}
    images, faults = register_stains(experiment, fov, [name for name in (nuclei, body) if name is not None])
    labels = segment(images[nuclei], None if body is None else images[body], experiment.microns_per_pixel)
    return list(outlines(labels).values()), images, faults


# --- the files of a record ----------------------------------------------------------------------------------------


def read_calls(out: Path, fov: int) -> pd.DataFrame:
    """Every call of a field, columns `CALL_COLUMNS`."""
    return pq.read_table(results.field_folder(out, fov) / CALLS).to_pandas()


def write_outlines(outlines: list[shapely.Polygon], path: Path) -> None:
    """Write outlines (pixel)."""
    column = pa.array(shapely.to_wkb(np.array(outlines, dtype=object)), pa.binary())
    pq.write_table(pa.table({"geometry": column}), path)


def read_outlines(out: Path, fov: int) -> np.ndarray:
    """Outlines of a field (outline,), pixels."""
    table = pq.read_table(results.field_folder(out, fov) / OUTLINES)
    return np.asarray(shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False)), dtype=object)


def write_small_stains(stains: Mapping[str, np.ndarray], path: Path) -> None:
    """Write small pictures of the stains (y, x) of a field: uint8 (stain, y, x), names, pixels of the field in one."""
    if stains:
        step = -(-max(next(iter(stains.values())).shape) // STAIN_SIDE)
        small = [stretch(block_mean(image, step)) for image in stains.values()]
        np.savez(path, stains=np.stack(small), names=np.array(list(stains)), step=step)


def block_mean(image: np.ndarray, step: int) -> np.ndarray:
    """Mean of squares of ``step`` pixels, float32; rows and columns left over at the end are dropped."""
    height, width = (side // step for side in image.shape)
    squares = image[: height * step, : width * step].reshape(height, step, width, step)
    return squares.mean(axis=(1, 3), dtype=np.float32)


def stretch(image: np.ndarray) -> np.ndarray:
    """An image as uint8, black at its first percentile, white at the 99.8th."""
    low, high = np.percentile(image, [1, 99.8])
    return (np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def write_tally(calls: pd.DataFrame, path: Path) -> None:
    """Write what filtering learns from a field: the tallies of its left and right halves."""
    features, evidence = call_features(calls)
    blank = calls["is_blank"].to_numpy(bool)
    right = calls["x"].to_numpy() > calls["x"].median()
    halves = [tally_calls(features[side], blank[side], evidence) for side in (~right, right)]
    arrays = {f"{name}{k}": getattr(half, name) for k, half in enumerate(halves) for name in _TALLY}
    np.savez(path, **arrays)


_TALLY = ("values", "calls", "blanks")


def read_tally(out: Path, fov: int) -> tuple[Tally, Tally]:
    """What `write_tally` wrote."""
    with np.load(results.field_folder(out, fov) / TALLY, allow_pickle=False) as arrays:
        left, right = (Tally(*(arrays[f"{name}{k}"] for name in _TALLY)) for k in (0, 1))
    return left, right
