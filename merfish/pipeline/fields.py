"""Map over fields: images -> a record of molecules, cell outlines, and the summaries that later steps add up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish import results
from merfish._parquet import read_table
from merfish.calls.filtering import Tally, call_features, tally_calls
from merfish.calls.fit import count_fit
from merfish.cells.measure import FieldCells, column_name, find_cells, find_stacked_cells, load_segmenter, no_cells
from merfish.cells.merging import DEPTH
from merfish.codebook import Codebook
from merfish.config import RunConfig
from merfish.decoding.assumptions import measure_optics
from merfish.decoding.methods import decode_filtered
from merfish.decoding.psf import psf_sigma
from merfish.decoding.sequential import SPOT_DTYPE, find_molecules
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import (
    aligned_gene,
    aligned_stain,
    chosen_stains,
    other_stains,
    register_field,
    stain_shifts,
)
from merfish.imaging.normalize import Normalization
from merfish.imaging.preprocess import Bandpassed, in_rows
from merfish.pipeline.folder import new_record
from merfish.pipeline.images import new_images, write_images
from merfish.report import OVERVIEW, STAINS
from merfish.simulate.spikes import spike_in

OVERVIEW_WHITE = 1.5  # height, in molecules, that is white in the overview image
STAIN_SIDE = 512  # pixels; longest side of the small images of stains
CALLS, OUTLINES, SPOTS, TALLY = "calls.parquet", "outlines.parquet", "sequential.npy", "tally.npz"
SPIKES, SPIKE_SEED = "spikes.npz", 0
# Columns of the calls of a field; nuclear: whether the call lies in a nucleus. The other columns of
# `merfish.transcripts.COLUMNS` follow from the run.
CALL_COLUMNS = (
    "barcode_id", "x", "y", "z", "hamming_distance", "probability", "intensity", "area", "distance", "shown",
    "nuclear",
)  # fmt: skip


SPOTS_DTYPE = np.dtype([("gene", "i4"), *SPOT_DTYPE.descr])


@dataclass(frozen=True, eq=False)
class FieldWork:
    """Decodes and segments one field, and writes its record.

    parts: what the record of each field depends on. spiked: fields that are decoded again with added molecules. images:
    whether the registered images are saved too.
    """

    experiment: Experiment
    config: RunConfig
    calibration: Calibration
    out: Path
    parts: Mapping[int, Mapping[str, str]]
    spiked: frozenset[int]
    images: bool = False

    def __call__(self, fov: int) -> int:
        """Return the number of molecules found."""
        parts, spiked = self.parts[fov], fov in self.spiked
        with (
            new_record(results.field_folder(self.out, fov), parts) as (folder, says),
            new_images(self.out, fov, parts) if self.images else nullcontext() as images,
        ):
            says |= process_field(self.experiment, fov, self.config, self.calibration, folder, spiked, images)
        return int(says["n_found"])


def process_field(
    experiment: Experiment,
    fov: int,
    config: RunConfig,
    calibration: Calibration,
    folder: Path,
    spiked: bool,
    images: Path | None = None,
) -> dict[str, Any]:
    """Decode and segment one field into files of ``folder``; returns the contents of its record.

    spiked: decode it again with added molecules, to measure the detection efficiency. images: folder for its registered
    images, None to skip saving them.
    """
    clock = _Clock()
    field = register_field(experiment, fov, config, calibration)
    clock.lap("register")
    calls = decode_filtered(field.bits, experiment.codebook, calibration.normalization, method=config.method)
    # pixels without an image in some round cannot be decoded
    calls = calls[field.valid[np.rint(calls["y"]).astype(int), np.rint(calls["x"]).astype(int)]]
    clock.lap("decode")
    optics = None
    if config.method != "spots":
        rows, height = in_rows(field.bits)
        optics = measure_optics(rows, calibration.normalization, height, config.filter_sigmas)
        clock.lap("check assumptions")
    if spiked:
        spikes = spikes_of(
            field.bits, calls, experiment.codebook, calibration.normalization, config.method, config.filter_sigmas
        )
        write_spikes(spikes, folder)
        clock.lap("spike in")
    stains, genes = other_stains(experiment, config)
    shifts, faults = stain_shifts(experiment, fov, [*stains, *genes])
    aligned = aligned_stains(experiment, fov, {name: shifts[name] for name in stains}, field.valid.shape)
    cells = segment_field(experiment, config, aligned, field.valid.shape)
    height = np.interp(calls["z"].to_numpy(float), np.arange(len(experiment.z)), experiment.z)
    calls["nuclear"] = cells.in_nucleus(calls["x"].to_numpy(), calls["y"].to_numpy(), height)
    clock.lap("segment")
    spots = [find_spots_of(experiment, fov, gene, shifts[gene], config, calibration, field.valid) for gene in genes]
    clock.lap("sequential")
    pq.write_table(pa.table({name: calls[name].to_numpy() for name in CALL_COLUMNS}), folder / CALLS)
    write_outlines(list(cells.outlines), folder / OUTLINES, cells.measured)
    write_spots(spots, folder / SPOTS)
    np.save(folder / OVERVIEW, overview(field.bits, calibration.normalization))
    write_small_stains({name: image.max(axis=0) for name, image in aligned.items()}, folder / STAINS)
    write_tally(calls, experiment.codebook, folder / TALLY)
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
        "optics": optics,
        "n_outlines": len(cells.outlines),
        "n_sequential": dict(zip(genes, map(len, spots), strict=True)),
        "stains_not_aligned": faults,
        "seconds": clock.laps,
    }


class _Clock:
    """Seconds of consecutive steps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def overview(bits: np.ndarray, normalization: Normalization) -> np.ndarray:
    """Return the brightest bit of each pixel, uint8 (y, x), with `OVERVIEW_WHITE` molecules as white."""
    brightest = np.zeros(bits.shape[-2:], np.float32)
    # bit by bit: a second stack of heights would use as much memory as the field itself
    for image, background, gain in zip(bits, normalization.background, normalization.gain, strict=True):
        np.maximum(brightest, (image.max(axis=0) - background) * gain, out=brightest)
    return (np.minimum(brightest / OVERVIEW_WHITE, 1) * 255).astype(np.uint8)


def segment_field(
    experiment: Experiment, config: RunConfig, images: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> FieldCells:
    """Return the cells of a field of shape (y, x), in pixels of round 0; none without a stain of the nuclei.

    images: aligned stains (z, y, x). ``measured`` also gets the mean of each over each cell, in camera counts. A stain
    that cannot be aligned is used as it is: an error of a few pixels shifts the outlines, but without the stain the
    field would have no cells.
    """
    nuclei, body = chosen_stains(experiment, config)
    if nuclei is None:
        cells = no_cells(shape, experiment.microns_per_pixel)
    else:
        heights, planes = np.array(experiment.stain(body or nuclei).z), stacked_planes(experiment, config)
        segmenter = None if config.segmenter is None else load_segmenter(config.segmenter)
        cytoplasm = None if body is None else images[body]
        scale = experiment.microns_per_pixel
        if planes is None:
            cells = find_cells(images[nuclei], cytoplasm, heights, scale, segmenter)
        else:
            cells = find_stacked_cells(images[nuclei], cytoplasm, planes, scale)
    means = {f"{column_name(name)}_mean": cells.mean(image) for name, image in images.items()}
    return replace(cells, measured=cells.measured.assign(**means))


def stacked_planes(experiment: Experiment, config: RunConfig) -> np.ndarray | None:
    """Return the heights [µm] of the planes in which cells have separate outlines; None if they have one for all."""
    nuclei, body = chosen_stains(experiment, config)
    if nuclei is None or not config.stacked_cells or config.segmenter is not None:
        return None
    heights = np.array(experiment.stain(body or nuclei).z, float)
    return heights if len(heights) > 1 else None


def aligned_stains(
    experiment: Experiment, fov: int, shifts: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Return the stains (z, y, x) of a field of shape (y, x), corrected for their drift ``shifts`` (2,), by name."""
    return {
        name: _same_shape(aligned_stain(experiment, fov, name, shift), shape, fov, name)
        for name, shift in shifts.items()
    }


def find_spots_of(
    experiment: Experiment,
    fov: int,
    gene: str,
    shift: np.ndarray,
    config: RunConfig,
    calibration: Calibration,
    valid: np.ndarray,
) -> np.ndarray:
    """Return the molecules of a gene imaged alone, `SPOT_DTYPE`, where all rounds have an image (``valid``)."""
    planes = aligned_gene(experiment, fov, gene, shift, config, calibration)
    spots = find_molecules(_same_shape(planes, valid.shape, fov, gene))
    row, column = (np.clip(np.rint(spots[k]).astype(int), 0, n - 1) for k, n in zip("yx", valid.shape, strict=True))
    return spots[valid[row, column]]


def _same_shape(image: np.ndarray, shape: tuple[int, ...], fov: int, name: str) -> np.ndarray:
    if image.shape[-2:] != shape:
        raise InputError(f"field {fov}: images of {name} have shape {image.shape[-2:]} (y, x), those of bits {shape}")
    return image


def spikes_of(
    bits: np.ndarray | Bandpassed,
    calls: pd.DataFrame,
    book: Codebook,
    normalization: Normalization,
    method: str,
    filters: tuple[float, float],
) -> pd.DataFrame:
    """Add molecules to a field (bit, [z,] y, x), decode it again, and return them with the calls that find them.

    filters: sigmas of the band-pass filter of the field, in pixels.
    """
    return spike_in(
        bits,
        book,
        normalization,
        calls,
        lambda stack: decode_filtered(stack, book, normalization, method=method),
        sigma=psf_sigma(*in_rows(bits), filters),
        seed=SPIKE_SEED,
    )


# --- the files of a record ----------------------------------------------------------------------------------------


def read_calls(out: Path, fov: int) -> pd.DataFrame:
    """Read every call of a field, columns `CALL_COLUMNS`."""
    return read_table(results.field_folder(out, fov) / CALLS).to_pandas()


def write_outlines(outlines: list[shapely.Polygon], path: Path, measured: pd.DataFrame | None = None) -> None:
    """Write outlines (outline,) in pixels and a row of measurements of each (see `merfish.cells.measure.FieldCells`).

    Outlines without measurements get the depth `DEPTH`.
    """
    measured = pd.DataFrame({"depth": np.full(len(outlines), DEPTH)}) if measured is None else measured
    column = pa.array(shapely.to_wkb(np.array(outlines, dtype=object)), pa.binary())
    pq.write_table(pa.Table.from_pandas(measured, preserve_index=False).append_column("geometry", column), path)


def read_outlines(out: Path, fov: int) -> np.ndarray:
    """Read the outlines of a field (outline,), in pixels."""
    table = read_table(results.field_folder(out, fov) / OUTLINES, columns=["geometry"])
    return np.asarray(shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False)), dtype=object)


def write_small_stains(stains: Mapping[str, np.ndarray], path: Path) -> None:
    """Write reduced images of a field's stains: uint8 (stain, y, x), their names, and the pixels per block."""
    if stains:
        step = -(-max(next(iter(stains.values())).shape) // STAIN_SIDE)
        small = [stretch(block_mean(image, step)) for image in stains.values()]
        np.savez(path, stains=np.stack(small), names=np.array(list(stains)), step=step)


def block_mean(image: np.ndarray, step: int) -> np.ndarray:
    """Average over squares of ``step`` x ``step`` pixels, float32; incomplete squares at the ends are dropped."""
    height, width = (side // step for side in image.shape)
    squares = image[: height * step, : width * step].reshape(height, step, width, step)
    return squares.mean(axis=(1, 3), dtype=np.float32)


def stretch(image: np.ndarray) -> np.ndarray:
    """Scale an image to uint8: black at its 1st percentile, white at its 99.8th."""
    low, high = np.percentile(image, [1, 99.8])
    return (np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def read_measured(out: Path, fov: int) -> pd.DataFrame:
    """Read the measurements of a field's cells, one row per outline."""
    return read_table(results.field_folder(out, fov) / OUTLINES).drop_columns("geometry").to_pandas()


def write_spots(spots: list[np.ndarray], path: Path) -> None:
    """Write the molecules of genes imaged one by one, as `SPOTS_DTYPE`."""
    every = np.empty(sum(map(len, spots)), SPOTS_DTYPE)
    every["gene"] = np.repeat(np.arange(len(spots)), [len(found) for found in spots])
    for name in SPOT_DTYPE.names or ():
        every[name] = np.concatenate([np.empty(0, np.float32), *(found[name] for found in spots)])
    np.save(path, every)


def read_spots(out: Path, fov: int) -> np.ndarray:
    """Read what `write_spots` wrote; gene: index in the list of genes imaged one by one."""
    return np.asarray(np.load(results.field_folder(out, fov) / SPOTS))


def write_spikes(spikes: pd.DataFrame, folder: Path) -> None:
    """Write the words of the added molecules, and the features by which the calls that find them are filtered."""
    found = spikes[spikes["x"].notna()] if "x" in spikes else spikes
    features = call_features(found)[0] if len(found) else np.empty((0, 1))
    np.savez(folder / SPIKES, word=spikes["spike"].to_numpy(), found=found.index.to_numpy(np.int64), features=features)


def read_spikes(out: Path, fov: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read words (spike,) of the added molecules, indices of those found (call,), and features (call, feature)."""
    with np.load(results.field_folder(out, fov) / SPIKES, allow_pickle=False) as arrays:
        return arrays["word"], arrays["found"], arrays["features"]


def write_tally(calls: pd.DataFrame, book: Codebook, path: Path) -> None:
    """Write the input of the filter: tallies of the left and right halves, and the number of calls of each word."""
    features, evidence = call_features(calls)
    blank = calls["is_blank"].to_numpy(bool)
    right = calls["x"].to_numpy() > calls["x"].median()
    halves = [tally_calls(features[side], blank[side], evidence) for side in (~right, right)]
    arrays = {f"{name}{k}": getattr(half, name) for k, half in enumerate(halves) for name in _TALLY}
    np.savez(path, found=np.bincount(calls["barcode_id"].to_numpy(), minlength=book.n_words), **arrays)


_TALLY = ("values", "calls", "blanks")


def read_tally(out: Path, fov: int) -> tuple[Tally, Tally]:
    """Read the tallies of the left and right halves of a field."""
    with np.load(results.field_folder(out, fov) / TALLY, allow_pickle=False) as arrays:
        left, right = (Tally(*(arrays[f"{name}{k}"] for name in _TALLY)) for k in (0, 1))
    return left, right


def read_found(out: Path, fov: int) -> np.ndarray:
    """Read the number of calls of each word, int64 (word,), of a field."""
    with np.load(results.field_folder(out, fov) / TALLY, allow_pickle=False) as arrays:
        return np.asarray(arrays["found"])
