"""The way of the data: one field, the whole experiment."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely

from merfish import runfolder
from merfish._files import whole_file
from merfish.calls.error_model import bit_error_rates, held_out_rate, misidentification_rate, word_statistics
from merfish.calls.filtering import few_blanks, keep_calls, rate_calls
from merfish.calls.overlap import duplicates_between_fields
from merfish.calls.stitching import Stitching, stitch
from merfish.cluster import map_fields
from merfish.codebook import Codebook, check_codebook, read_codebook
from merfish.config import RunConfig, read_config
from merfish.decoding.methods import decode_filtered
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration, calibrate
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import known_light, register_field, register_stain, survey_field
from merfish.imaging.images import read_stack
from merfish.imaging.opening import open_experiment
from merfish.imaging.preflight import preflight
from merfish.stack import decode_all
from merfish.transcripts import read_transcripts, transcript_table, write_transcripts

if TYPE_CHECKING:
    from anndata import AnnData

OVERVIEW_WHITE = 1.5  # height, in molecules, that the overview picture shows as white


def decode_file(
    stack: Path, codebook: Path, out: Path, *, method: str, preprocess: bool, misidentification_rate: float
) -> dict[str, Any]:
    """Decode an image file; write transcripts before and after filtering, and ``run.json``. Returns its figures."""
    started = time.perf_counter()
    book = read_codebook(codebook)
    found = decode_all(read_stack(stack), book, method=method, preprocess=preprocess)
    kept = keep_calls(found, misidentification_rate)
    with runfolder.owned(out):
        write_transcripts(found, out / runfolder.ALL_TRANSCRIPTS)
        write_transcripts(kept, out / runfolder.TRANSCRIPTS)
        inputs = {
            path.name: {"path": str(path), **runfolder.file_record(path)}
            for path in (stack, codebook)
            if path.is_file()
        }
        record = {
            "versions": versions(),
            "parameters": {
                "method": method,
                "preprocess": preprocess,
                "misidentification_rate": misidentification_rate,
            },
            "inputs": inputs,
            "bit_error_rates": bit_error_rates(found, book).to_dict("list"),
            "figures": call_figures(found, kept, book),
            "seconds": {"total": time.perf_counter() - started},
        }
        runfolder.write_json(out / runfolder.RUN, record)
    return call_figures(found, kept, book)


def process_field(experiment: Experiment, fov: int, config: RunConfig, calibration: Calibration, folder: Path) -> None:
    """Decode and segment one field into ``folder``: calls, outlines (pixel), overview picture, figures."""
    started = time.perf_counter()
    field, normalization = register_field(experiment, fov, config, calibration), calibration.normalization
    calls = decode_filtered(field.bits, experiment.codebook, normalization, method=config.method)
    calls = place_in_stage_frame(calls, experiment, fov, field.valid)
    height = (field.bits.max(axis=1) - normalization.background[:, None, None]) * normalization.gain[:, None, None]
    overview = (np.clip(height.max(axis=0) / OVERVIEW_WHITE, 0, 1) * 255).astype(np.uint8)
    outlines = segment_field(experiment, fov, config)
    with whole_file(folder) as part:
        part.mkdir()
        calls.to_parquet(part / "calls.parquet", index=False)
        pd.DataFrame({"geometry": shapely.to_wkb(np.array(outlines, dtype=object))}).to_parquet(
            part / "outlines.parquet"
        )
        np.save(part / "overview.npy", overview)
        record = {
            "drift": field.drift.to_dict("records"),
            "shape": field.valid.shape,
            "saturated": field.saturated.tolist(),
            "n_found": len(calls),
            "n_outlines": len(outlines),
            "seconds": time.perf_counter() - started,
        }
        runfolder.write_json(part / "field.json", record)


def place_in_stage_frame(calls: pd.DataFrame, experiment: Experiment, fov: int, valid: np.ndarray) -> pd.DataFrame:
    """Drop calls where some round has no image (valid (y, x) False) and add fov and micrometre columns."""
    inside = valid[np.rint(calls["y"]).astype(int), np.rint(calls["x"]).astype(int)]
    calls = calls[inside].reset_index(drop=True)
    global_z = np.interp(calls["z"].astype(float), np.arange(len(experiment.z)), experiment.z)
    calls = calls.assign(fov=np.int32(fov), global_z=global_z)
    return at_positions(calls, experiment.positions, experiment.microns_per_pixel)


def at_positions(calls: pd.DataFrame, positions: np.ndarray, microns_per_pixel: float) -> pd.DataFrame:
    """Calls with global_x and global_y by the positions (fov, 2) of their fields, micrometre."""
    x, y = positions[calls["fov"]].T
    return calls.assign(
        global_x=x + calls["x"].astype(float) * microns_per_pixel,
        global_y=y + calls["y"].astype(float) * microns_per_pixel,
    )


def stitch_fields(calls: pd.DataFrame, experiment: Experiment, shape: tuple[int, ...]) -> Stitching:
    """True positions of the fields, of shape (y, x), from the molecules that they share."""
    scale = experiment.microns_per_pixel
    word, x, y, fov = (calls[column].to_numpy() for column in ("barcode_id", "x", "y", "fov"))
    size = (shape[1] * scale, shape[0] * scale)
    return stitch(word, x.astype(float) * scale, y.astype(float) * scale, fov, experiment.positions, size)


def run(
    experiment: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    config: RunConfig | str | os.PathLike[str] | None = None,
    fovs: Sequence[int] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    tables: Mapping[str, Path | None] | None = None,
    keep_going: bool = False,
    progress: bool = False,
) -> AnnData:
    """Decode a whole raw experiment into ``out`` and return its table of counts.

    experiment: folder in MERlin's layout (see `merfish.imaging.experiment.open_experiment`); tables: the same files
    by other paths. config: a `RunConfig` or a YAML file. fovs: some of the fields. workers, scheduler: see
    `merfish.cluster.map_fields`. keep_going: leave out fields whose files are faulty instead of refusing.

    Fields that are there already are not computed again; a field that cannot be registered is listed in ``run.json``
    and on the report, and the rest goes on. Raises InputError for faulty tables or files, before any work.
    """
    started = time.perf_counter()
    out = Path(out)
    settings = config if isinstance(config, RunConfig) else read_config(config)
    source = open_experiment(experiment, **dict(tables or {}))
    chosen = choose_fovs(source, fovs)
    failed = check_files(source, chosen, keep_going)
    good = [fov for fov in chosen if fov not in failed]
    with runfolder.owned(out):
        runfolder.claim(out, {"experiment": str(source.folder.resolve()), **settings.model_dump()})
        calibration = shared_calibration(source, good, settings, out, progress)
        todo = [fov for fov in good if not runfolder.field_folder(out, fov).is_dir()]
        work = partial(_work, source, settings, calibration, out)
        for fov, outcome in _track(
            map_fields(work, todo, workers=workers, scheduler=scheduler), len(todo), "decode", progress
        ):
            if isinstance(outcome, Exception):
                failed[fov] = _reason(outcome)
        done = [fov for fov in good if fov not in failed]
        return combine(source, done, failed, settings, calibration, out, started)


def _work(experiment: Experiment, config: RunConfig, calibration: Calibration, out: Path, fov: int) -> None:
    process_field(experiment, fov, config, calibration, runfolder.field_folder(out, fov))


def _reason(error: Exception) -> str:
    """Why a field failed, if its data or its worker are to blame; any other error is ours and is raised."""
    if isinstance(error, InputError):
        return str(error)
    if type(error).__name__ == "KilledWorker":
        return "its worker died three times"
    raise error


def _track(outcomes: Any, total: int, what: str, progress: bool) -> Any:
    if not progress:
        return outcomes
    from rich.progress import track

    return track(outcomes, description=what, total=total)


def choose_fovs(experiment: Experiment, fovs: Sequence[int] | None) -> list[int]:
    """The fields asked for, sorted. Raises InputError for one that has no position."""
    if fovs is None:
        return list(experiment.fovs)
    unknown = sorted(set(fovs) - set(experiment.fovs))
    if unknown:
        raise InputError(f"fields {unknown} are asked for, the experiment has 0 to {len(experiment.fovs) - 1}")
    return sorted(set(fovs))


def check_files(experiment: Experiment, fovs: Sequence[int], keep_going: bool) -> dict[int, str]:
    """Fields with faulty files and why. Raises InputError listing every fault unless ``keep_going``."""
    listing = preflight(experiment, fovs)
    faults = listing[listing["problem"] != ""]
    if len(faults) and not keep_going:
        lines = [f"field {row.fov}: {row.file}: {row.problem}" for row in faults.itertuples()]
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise InputError(f"{experiment.folder}: {len(faults)} of {len(listing)} files cannot be used:\n  {shown}")
    return {fov: "; ".join(faults.loc[faults["fov"] == fov, "problem"]) for fov in faults["fov"].unique().tolist()}


def shared_calibration(
    experiment: Experiment, fovs: Sequence[int], config: RunConfig, out: Path, progress: bool
) -> Calibration:
    """What all fields share, measured on some of them spread over the experiment."""
    given = known_light(experiment, config)
    path = runfolder.field_folder(out, 0).parent / runfolder.CALIBRATION
    if path.is_file():
        return Calibration.from_json(path.read_text(), given)
    sample = [
        fovs[k] for k in np.unique(np.linspace(0, len(fovs) - 1, config.normalization_fields).round().astype(int))
    ]
    surveys = []
    for fov in _track(sample, len(sample), "calibrate", progress):
        with suppress(InputError):  # listed when the field's turn comes
            surveys.append(survey_field(experiment, fov, config))
    calibration = calibrate(surveys, experiment.bits, given)
    with whole_file(path) as part:
        part.write_text(calibration.to_json())
    return calibration


def segment_field(experiment: Experiment, fov: int, config: RunConfig) -> list[shapely.Polygon]:
    """Outlines of the cells of a field, pixels of round 0; none without a stain of the nuclei."""
    from merfish.cells.segmentation import outlines, segment

    stains = {stain.name.lower() for stain in experiment.stains}
    if config.nuclei_stain.lower() not in stains:
        return []
    nuclei = register_stain(experiment, fov, config.nuclei_stain)
    cytoplasm = None
    if config.cytoplasm_stain.lower() in stains:
        cytoplasm = register_stain(experiment, fov, config.cytoplasm_stain)
    return list(outlines(segment(nuclei, cytoplasm, experiment.microns_per_pixel)).values())


def combine(
    experiment: Experiment,
    fovs: Sequence[int],
    failed: dict[int, str],
    config: RunConfig,
    calibration: Calibration,
    out: Path,
    started: float,
) -> AnnData:
    """Rate, filter and count the molecules of all fields once, put them into cells, write the results."""
    from merfish.cells.counts import assign_cells, count_table, write_cells
    from merfish.cells.segmentation import merge_fields
    from merfish.report import write_run_report

    folders = {fov: runfolder.field_folder(out, fov) for fov in fovs}
    fields = {fov: runfolder.read_json(folder / "field.json") for fov, folder in folders.items()}
    unrated = gather_calls(experiment, folders)
    found = rate_calls(unrated, experiment.codebook)
    kept = keep_calls(found, config.misidentification_rate)
    shape = next((tuple(field["shape"]) for field in fields.values()), (1, 1))
    stitching = stitch_fields(kept, experiment, shape)
    found, kept = (at_positions(calls, stitching.positions, experiment.microns_per_pixel) for calls in (found, kept))
    distinct = kept[~seen_in_two_fields(kept, fields)].reset_index(drop=True)
    outlines = {fov: read_outlines(folder / "outlines.parquet") for fov, folder in folders.items()}
    cells = merge_fields(outlines, stitching.positions, shape, experiment.microns_per_pixel)
    distinct["cell_id"] = assign_cells(
        distinct["global_x"].to_numpy(),
        distinct["global_y"].to_numpy(),
        cells["geometry"].to_numpy(),
        cells["cell_id"].to_numpy(),
    )
    table = count_table(distinct, cells, experiment.codebook)
    words = word_statistics(found, kept, experiment.codebook).set_index("gene")
    stated = ["detection_efficiency", "confidence_ratio", "misidentification_rate"]
    table.var[stated] = words[stated]
    cells["n_transcripts"] = table.obs["n_transcripts"].to_numpy()

    write_transcripts(found, out / runfolder.ALL_TRANSCRIPTS)
    write_transcripts(distinct, out / runfolder.TRANSCRIPTS)
    write_cells(cells, out / runfolder.CELLS)
    with whole_file(out / runfolder.CELL_BY_GENE) as part:
        table.write_h5ad(part)
    record = {
        "versions": versions(),
        "parameters": config.model_dump(),
        "inputs": describe_inputs(experiment, fovs),
        "codebook": {"names": experiment.codebook.names, "is_blank": experiment.codebook.is_blank.tolist()},
        "bits": {
            "names": experiment.codebook.bit_names,
            "colors": [channel.color for channel in experiment.bits],
            **calibration.normalization.to_dict(),
        },
        "chromatic": calibration.to_dict()["chromatic"],
        "light": calibration.light_figures(),
        "bit_error_rates": bit_error_rates(found, experiment.codebook).to_dict("list"),
        "stage": stitching.to_dict(),
        "fields": fields,
        "failed": failed,
        "figures": {
            **call_figures(found, kept, experiment.codebook),
            "by_blanks": interval(misidentification_rate(kept, experiment.codebook)),
            "held_out": interval(held_out_rate(unrated, experiment.codebook, config.misidentification_rate)),
            "n_fields": len(fovs),
            "n_duplicates": len(kept) - len(distinct),
            "n_kept": len(distinct),
            "n_cells": len(cells),
            "share_in_cells": float((distinct["cell_id"] >= 0).mean()) if len(distinct) else 0.0,
            "transcripts_per_cell": float(cells["n_transcripts"].median()) if len(cells) else 0.0,
        },
        "seconds": {"total": time.perf_counter() - started},
    }
    runfolder.write_json(out / runfolder.RUN, record)
    write_run_report(out)
    return table


def read_outlines(path: Path) -> dict[int, shapely.Polygon]:
    """Cell outlines of a field by their number, pixels."""
    return dict(enumerate(shapely.from_wkb(pd.read_parquet(path)["geometry"].to_numpy()), start=1))


def gather_calls(experiment: Experiment, folders: Mapping[int, Path]) -> pd.DataFrame:
    """Every molecule of all fields, not yet rated, with ids that are unique in the run."""
    empty = transcript_table(experiment.codebook, np.empty(0, np.int32), x=[], y=[], hamming_distance=[], intensity=[])
    parts = [calls for folder in folders.values() if len(calls := read_transcripts(folder / "calls.parquet"))]
    found = pd.concat(parts, ignore_index=True) if parts else empty
    return found.assign(transcript_id=np.arange(len(found)))


def seen_in_two_fields(calls: pd.DataFrame, fields: Mapping[int, Any]) -> np.ndarray:
    """Which molecules stand a second time, better, in another field; (molecule,) bool."""
    size = np.array([fields[fov]["shape"] for fov in calls["fov"]]).reshape(-1, 2)
    x, y = calls["x"].to_numpy(float), calls["y"].to_numpy(float)
    edge = np.minimum.reduce([x, y, size[:, 1] - 1 - x, size[:, 0] - 1 - y])
    return duplicates_between_fields(
        calls["barcode_id"].to_numpy(),
        calls["global_x"].to_numpy(),
        calls["global_y"].to_numpy(),
        calls["fov"].to_numpy(),
        edge,
    )


def call_figures(found: pd.DataFrame, kept: pd.DataFrame, codebook: Codebook) -> dict[str, Any]:
    """Numbers of molecules before and after filtering, the share of the kept that is expected to be wrong, warnings."""
    wrong = 1 - kept["probability"].to_numpy(float)
    return {
        "n_found": len(found),
        "n_found_blank": int(found["is_blank"].sum()),
        "n_kept": len(kept),
        "n_blank": int(kept["is_blank"].sum()),
        "misidentification_rate": float(wrong.mean()) if len(kept) and not np.isnan(wrong).any() else None,
        "warnings": list(check_codebook(codebook).warnings),
    }


def interval(rate: tuple[float, float, float]) -> dict[str, float] | None:
    """A rate and the ends of its interval for a record, None where it is not known."""
    return None if np.isnan(rate[0]) else dict(zip(("rate", "low", "high"), rate, strict=True))


def describe_inputs(experiment: Experiment, fovs: Sequence[int]) -> dict[str, Any]:
    """The tables with their hashes, and the images with their sizes."""
    images = {
        str(path.relative_to(experiment.folder)): path.stat().st_size
        for (_, fov), path in experiment.files.items()
        if fov in fovs
    }
    tables = {name: {"path": str(path), **runfolder.file_record(path)} for name, path in experiment.tables.items()}
    return {"folder": str(experiment.folder), "tables": tables, "images": images}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("merfish", "numpy", "scipy", "numba", "scikit-image")}


def molecule_lines(figures: Mapping[str, Any]) -> list[str]:
    """How many molecules were found, how many of them are wrong, and what the codebook leaves open, for a terminal."""
    rate = figures["misidentification_rate"]
    line = f"{figures['n_kept']:,} molecules ({figures['n_blank']:,} blanks) of {figures['n_found']:,} found"
    warnings = [f"codebook: {warning}" for warning in figures["warnings"]]
    if rate is None:
        return [line, *warnings]
    few = few_blanks(figures["n_found_blank"])
    return [f"{line}, {rate:.1%} expected wrong", *([few] if few else []), *warnings]


def run_summary(out: str | os.PathLike[str]) -> dict[str, Any]:
    """A finished run in a few lines, and the fields that failed."""
    from merfish.report import bit_warnings, untied_text

    record = runfolder.read_json(Path(out) / runfolder.RUN)
    figures, failed = record["figures"], record["failed"]
    lines = [
        *molecule_lines(figures),
        *bit_warnings(record),
        *filter(None, [untied_text(record["stage"])]),
        f"{figures['n_cells']:,} cells, {figures['transcripts_per_cell']:.0f} molecules a cell in the median",
        *(f"field {fov} failed: {reason}" for fov, reason in failed.items()),
        f"results in {out}, report in {Path(out) / runfolder.REPORT}",
    ]
    return {"lines": lines, "failed": failed}
