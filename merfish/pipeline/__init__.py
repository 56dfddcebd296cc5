"""Process a whole experiment: maps over fields, with small reductions between them.

Only this package handles folders, resuming and workers. Its modules, in the order of a run: `manifest` identifies what
results depend on, `survey` calibrates, `fields` decodes, `reconcile` makes fields consistent, `assemble` assigns
molecules to cells, `tables` and `record` write; `folder` stores records on disk, `cluster` runs the maps, `progress`
displays them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merfish import results
from merfish._files import Packed, pack
from merfish._jit import compilation_said
from merfish.calls.error_model import word_statistics
from merfish.calls.fit import refuse_misfit
from merfish.cells.measure import load_segmenter
from merfish.config import RunConfig, read_config
from merfish.errors import InputError
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import chosen_stains, other_stains
from merfish.imaging.opening import open_experiment
from merfish.imaging.preflight import preflight
from merfish.pipeline import folder
from merfish.pipeline.assemble import assemble
from merfish.pipeline.assign import own_key, replace_cells, segmented_key
from merfish.pipeline.cluster import Failure, RunMap, cores, run_map_on
from merfish.pipeline.fields import FieldWork, stacked_planes
from merfish.pipeline.images import ImageWork, has_images
from merfish.pipeline.manifest import Manifest, changed_parts
from merfish.pipeline.progress import Display, display, log
from merfish.pipeline.reconcile import Fields, kept_spikes, map_all, reconcile
from merfish.pipeline.record import judge_codebook, run_record
from merfish.pipeline.segmentations import find_segmentation
from merfish.pipeline.survey import Calibrated, shared_calibration
from merfish.pipeline.tables import write_tables
from merfish.report import write_run_report

if TYPE_CHECKING:
    from anndata import AnnData


def run(
    experiment: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    config: RunConfig | str | os.PathLike[str] | None = None,
    fovs: Sequence[int] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    slurm_jobs: int | None = None,
    tables: Mapping[str, Path | None] | None = None,
    keep_going: bool = False,
    segmentation: str | os.PathLike[str] | None = None,
    save_images: bool = False,
    progress: bool = False,
) -> AnnData:
    """Decode a whole raw experiment into ``out`` and return its table of counts.

    experiment: folder in MERlin's layout (see `merfish.imaging.opening.open_experiment`); tables: paths of its tables
    if they lie elsewhere. config: a `merfish.RunConfig` or a YAML file. fovs: numbers of the fields to process, all by
    default; fields that the results in ``out`` already cover are kept. workers, scheduler, slurm_jobs: see
    `merfish.pipeline.cluster.run_map_on`. keep_going: skip fields with faulty files instead of raising. segmentation:
    cells from another program, used instead of segmenting (see `merfish.pipeline.assign.assign`). save_images: save the
    registered, filtered bits and the stains of each field as OME-Zarr under ``out/images``.

    Existing results are reused if nothing that they depend on has changed; otherwise they are recomputed. A field that
    fails is listed in ``run.json`` and in the report, and the others are still processed. Raises InputError for faulty
    tables or files, before any work, and CodebookMisfit, after decoding, if the images do not fit the codebook.
    """
    import anndata

    process(
        experiment,
        out=out,
        config=config,
        fovs=fovs,
        workers=workers,
        scheduler=scheduler,
        slurm_jobs=slurm_jobs,
        tables=tables,
        keep_going=keep_going,
        segmentation=segmentation,
        save_images=save_images,
        progress=progress,
    )
    return anndata.read_h5ad(Path(out) / results.CELL_BY_GENE)


def process(
    experiment: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    config: RunConfig | str | os.PathLike[str] | None,
    fovs: Sequence[int] | None,
    workers: int | None,
    scheduler: str | None,
    slurm_jobs: int | None,
    tables: Mapping[str, Path | None] | None,
    keep_going: bool,
    segmentation: str | os.PathLike[str] | None,
    save_images: bool,
    progress: bool,
    verbose: bool = False,
) -> None:
    """Run as `run` does, but only write the results to disk."""
    out = Path(out)
    settings = config if isinstance(config, RunConfig) else read_config(config)
    source = open_experiment(experiment, **dict(tables or {}))
    # report what is missing before any work
    chosen_stains(source, settings)
    other_stains(source, settings)
    if settings.segmenter is not None:
        load_segmenter(settings.segmenter)
    chosen = choose_fovs(source, fovs)
    failed = check_files(source, chosen, keep_going)
    if segmentation is not None:
        find_segmentation(Path(segmentation), [fov for fov in chosen if fov not in failed])  # raise before any work
    refuse_folder(out, source)
    with (
        folder.owned(out),
        display(out, progress, verbose) as shown,
        compilation_said(shown.say),
        run_map_on(workers, scheduler, slurm_jobs, out) as run_map,
    ):
        if workers is not None and workers > cores():
            shown.say(f"{workers} workers requested; using {cores()}, one for each core of this machine")
        manifest = Manifest(source, settings)
        calibrated = shared_calibration(source, settings, manifest, out, run_map, shown)
        target = covered(out, chosen, manifest, calibrated)
        good = [fov for fov in target if fov not in failed]
        parts = {fov: manifest.of_field(fov, calibrated.digest, fov in calibrated.spiked) for fov in good}
        work = FieldWork(source, settings, calibrated.calibration, out, parts, calibrated.spiked, save_images)
        says = decode_fields(work, run_map, failed, shown)
        if save_images:
            lacking = [fov for fov in says if not has_images(out, fov, parts[fov])]
            images = ImageWork(source, settings, calibrated.calibration, out, parts)
            map_all("save images", images, lacking, run_map, shown)
        if settings.misidentification_rate < 1:
            refuse_misfit(judge_codebook(source.codebook, says, calibrated))
        key = manifest.of_results({fov: parts[fov] for fov in says}, failed)
        cells = None if segmentation is None else find_segmentation(Path(segmentation), list(says))
        before = published(out)
        if before.get("key") == (key if cells is None else segmented_key(key, cells)):
            shown.say(f"{out}: this run is complete, and its inputs and parameters have not changed; nothing to do")
            return
        if cells is None and (given := before.get("segmentation")):
            shown.say(f"{out}: cells from {given['path']} are replaced by cells of the run; --segmentation keeps them")
        is_current = own_key(before) == key
        del before  # large for a run of many fields
        if cells is None or not is_current:
            stage = folder.new_stage(out)
            write_results(source, settings, out, says, failed, calibrated, key, stage, run_map, shown)
            publish_results(out, stage)  # nothing else of the run is in memory here
        if cells is not None:
            replace_cells(out, cells, results.read_run(out), run_map, shown)


def choose_fovs(experiment: Experiment, fovs: Sequence[int] | None) -> list[int]:
    """Return the requested fields, sorted. Raises InputError for a field that has no position."""
    if fovs is None:
        return list(experiment.fovs)
    if isinstance(fovs, str) or not isinstance(fovs, Iterable):
        raise InputError(f"fovs: expected field numbers such as [0, 3], got {fovs!r}")
    unknown = sorted(set(fovs) - set(experiment.fovs))
    if unknown:
        raise InputError(
            f"no such field: {', '.join(map(str, unknown))}; the experiment has fields 0 to {len(experiment.fovs) - 1}"
        )
    return sorted(set(fovs))


def check_files(experiment: Experiment, fovs: Sequence[int], keep_going: bool) -> dict[int, str]:
    """Return the fields with faulty files, and the faults of each.

    Raises InputError that lists the faults, unless ``keep_going`` is true and at least one field has none.
    """
    listing = preflight(experiment, fovs)
    faults = listing[listing["problem"] != ""]
    bad = faults["fov"].unique().tolist()
    if len(faults) and (not keep_going or len(bad) == len(fovs)):
        lines = [f"field {row.fov}: {row.file}: {row.problem}" for row in faults.itertuples()]
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise InputError(f"{experiment.folder}: {len(faults)} of {len(listing)} files cannot be used:\n  {shown}")
    return {
        fov: "; ".join(f"{row.file}: {row.problem}" for row in faults[faults["fov"] == fov].itertuples()) for fov in bad
    }


def refuse_folder(out: Path, source: Experiment) -> None:
    """Raise InputError if ``out`` is the folder of the experiment, or holds the results of ``merfish decode``."""
    if out.resolve() == source.folder.resolve():
        raise InputError(f"{out} is the folder of the experiment; choose another folder for the results")
    if (out / results.RUN).is_file() and not (out / results.FIELDS).is_dir():
        raise InputError(f"{out} holds results of merfish decode, not of a run; choose another folder or remove it")


def published(out: Path) -> dict[str, Any]:
    """Return the record of the results in a folder, empty if there are none or they are incomplete."""
    try:
        record = results.read_run(out)
    except InputError:
        return {}
    sizes = record.get("results", {})
    whole = sizes and all((out / name).is_file() and (out / name).stat().st_size == n for name, n in sizes.items())
    return record if whole else {}


def covered(out: Path, chosen: Sequence[int], manifest: Manifest, calibrated: Calibrated) -> list[int]:
    """Return the requested fields and those that the results in ``out`` already cover.

    Raises InputError if results of other fields would be lost.
    """
    try:
        before = [int(fov) for fov in results.read_run(out)["fields"]]
    except (InputError, ValueError):
        return list(chosen)
    others = sorted(set(before) - set(chosen))
    lost = [fov for fov in others if fov not in manifest.experiment.fovs]
    stale = [fov for fov in others if fov not in lost and _stale(out, fov, manifest, calibrated)]
    if (lost or stale) and len(chosen) < len(manifest.experiment.fovs):
        raise InputError(
            f"{out} holds results of {len(before)} fields, but their inputs or parameters have changed since; a run of "
            f"{len(chosen)} fields would replace them. Run all fields, or choose another folder"
        )
    return sorted({*chosen, *others} - set(lost))


def _stale(out: Path, fov: int, manifest: Manifest, calibrated: Calibrated) -> bool:
    record = folder.read_record(results.field_folder(out, fov))
    return record is None or record["parts"] != manifest.of_field(fov, calibrated.digest, fov in calibrated.spiked)


def decode_fields(work: FieldWork, run_map: RunMap, failed: dict[int, str], shown: Display) -> Packed[int]:
    """Decode the fields whose records are missing or out of date, and report the reason.

    Fields that fail are added to ``failed``. Returns the contents of all records, packed. Raises OSError if the disk is
    full.
    """
    out, says = work.out, dict[int, bytes]()
    again: dict[str, list[int]] = {}
    for fov, parts in work.parts.items():
        place = results.field_folder(out, fov)
        record = folder.read_record(place)
        if record is not None and record["parts"] == parts:
            says[fov] = pack(folder.said(record))
        elif place.exists():
            why = changed_parts(record["parts"], parts) if record else ["damaged on disk"]
            again.setdefault(", ".join(why), []).append(fov)
    for reason, fovs in again.items():
        shown.say(f"{fields_text(fovs)}: recomputed ({reason})")
    todo = [fov for fov in work.parts if fov not in says]
    if says and todo:
        shown.say(f"{len(says)} of {len(work.parts)} fields are already done; decoding the other {len(todo)}")
    with shown.step("fields"):
        n_molecules, started = 0, time.time()
        for done, (fov, outcome) in enumerate(shown.track(run_map(work, todo), len(todo), "decode"), 1):
            if isinstance(outcome, Failure):
                if outcome.disk_full:
                    raise OSError(errno.ENOSPC, f"no space left; {done - 1} fields were decoded and are kept", str(out))
                failed[fov] = outcome.reason
                log.error("field %d failed: %s\n%s", fov, outcome.reason, outcome.traceback)
            else:
                n_molecules += outcome
                log.info("field %d: %d molecules found", fov, outcome)
                shown.note(f"{n_molecules:,} molecules")
            folder.write_progress(out, started, done, len(todo), failed)
    for fov in todo:
        record = None if fov in failed else folder.read_record(results.field_folder(out, fov))
        if record is not None:
            says[fov] = pack(folder.said(record))
    return Packed(dict(sorted(says.items())))


def fields_text(fovs: Iterable[int]) -> str:
    """Format field numbers as a list of ranges.

    >>> fields_text([0, 1, 2, 5])
    'fields 0-2, 5'
    """
    runs: list[list[int]] = []
    for fov in sorted(fovs):
        if runs and fov == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], fov]
        else:
            runs.append([fov])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"field{'' if len(runs) == 1 and len(runs[0]) == 1 else 's'} {text}"


def write_results(
    experiment: Experiment,
    config: RunConfig,
    out: Path,
    says: Mapping[int, Mapping[str, Any]],
    failed: Mapping[int, str],
    calibrated: Calibrated,
    key: str,
    stage: Path,
    run_map: RunMap,
    shown: Display,
) -> None:
    """Write the tables and the record of the run into ``stage``, from the records of all fields (``says``)."""
    work = folder.new_work(out)
    shape, outlines = (1, 1), {}
    for fov, said in says.items():
        shape, outlines[fov] = tuple(said["shape"]), int(said["n_outlines"])
    fields = Fields(out, work, experiment, tuple(says), shape, outlines, stacked_planes(experiment, config))
    found = reconcile(fields, config.misidentification_rate, run_map, shown)
    spikes = kept_spikes(fields, calibrated.spiked, found.filter)
    words = word_statistics(found.words, experiment.codebook, found.filter.blank_share, *spikes)
    assemble(fields, found, run_map, shown)
    genes = other_stains(experiment, config)[1]
    written = write_tables(fields, found, words, genes, stage, shown)
    record = run_record(fields, says, failed, config, calibrated, found, words, spikes[1], written)
    sizes = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
    folder.write_json(stage / results.RUN, {**record, "key": key, "results": sizes, "seconds": shown.timings()})


def publish_results(out: Path, stage: Path) -> None:
    """Write the report of the results in ``stage``, and publish all of them together."""
    write_run_report(out, stage)
    if not (stage / results.SEQUENTIAL).exists():
        (out / results.SEQUENTIAL).unlink(missing_ok=True)
    folder.publish(out)
    folder.remove_work(out)
