"""Assign the molecules of a finished run to cells from another program, without decoding again.

A map over fields, as in `merfish.pipeline.assemble`: cells are stored by field, and molecules are read from
``transcripts.parquet`` one field at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from merfish import results
from merfish.cells.counts import OUTSIDE
from merfish.codebook import Codebook
from merfish.errors import InputError
from merfish.exchange.run import read_var
from merfish.imaging.experiment import Experiment
from merfish.pipeline import folder
from merfish.pipeline.assemble import count_pairs, place_in_cells, read_cell_part
from merfish.pipeline.cluster import RunMap, run_map_on
from merfish.pipeline.progress import Display, display
from merfish.pipeline.reconcile import Fields, map_all
from merfish.pipeline.segmentations import Segmentation, find_segmentation, part_by_field, slice_depth
from merfish.pipeline.tables import write_counts
from merfish.report import write_run_report

MOLECULES = (results.TRANSCRIPTS, results.SEQUENTIAL)


def assign(out: Path, segmentation: Path, *, workers: int | None = None, progress: bool = False) -> dict[str, Any]:
    """Assign the molecules of a finished run to other cells, and rewrite its tables, record and report together.

    segmentation: see `find_segmentation` and `merfish.exchange.outlines.read_outlines`. Polygons of the whole section
    are in micrometres in the frame of the stage; a label image of the whole section needs MERSCOPE's 3 x 3 transform
    from micrometres to pixels in a file ``micron_to_mosaic_pixel_transform.csv`` beside it. Files of single fields are
    in pixels of the images after the transposition and flips in ``microscope.json``; cells seen in several fields are
    merged. Label images (z, y, x) and MERSCOPE's polygons with as many planes as the run give each cell an outline in
    every plane, so that cells may lie above each other; otherwise cells have one outline for all planes.

    Returns the figures of the run. Raises InputError if the cells do not fit the run.
    """
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; expected that of a finished run")
    with folder.owned(out), display(out, progress) as shown, run_map_on(workers, shared=out) as run_map:
        record = results.read_run(out)
        cells = find_segmentation(segmentation, [int(fov) for fov in record["fields"]])
        return replace_cells(out, cells, record, run_map, shown)


def segmented_key(key: str, cells: Segmentation) -> str:
    """Return the key of results with these cells; key: that of the run with its own cells."""
    return folder.digest([key, cells.digest()])


def replace_cells(
    out: Path, cells: Segmentation, record: dict[str, Any], run_map: RunMap, shown: Display
) -> dict[str, Any]:
    """Do the work of `assign` in a folder that this process has locked."""
    fields = _fields_of(out, record, cells.planes(record["z"]))
    var = read_var(out)
    groups = {name: field_groups(out / name) for name in MOLECULES if (out / name).is_file()}
    with shown.step("read cells"):
        schema = part_by_field(fields, cells, slice_depth(record["z"]), run_map, shown)
    bounds = {fov: _bounds(fields, fov) for fov in fields.fovs}
    work = AssignWork(out, fields, groups, bounds, var.index[var["sequential"]].to_list())
    placed = map_all("assign molecules", work, fields.fovs, run_map, shown)
    contributors: dict[int, list[int]] = {fov: [] for fov in fields.fovs}
    for fov, (_, homes) in sorted(placed.items()):
        for home in homes:
            contributors[home].append(fov)
    stage = folder.new_stage(out)
    with shown.step("write tables"):
        per_cell = write_counts(fields, contributors, var, stage, shown, schema)
        for name in groups:
            _write_placed(fields, out / name, stage, shown)
    n_in_cells = sum(count for count, _ in placed.values())
    n_kept = record["figures"]["n_kept"]
    figures = {
        **record["figures"],
        "n_cells": len(per_cell),
        "share_in_cells": n_in_cells / n_kept if n_kept else 0.0,
        "transcripts_per_cell": float(np.median(per_cell)) if len(per_cell) else 0.0,
    }
    own = own_key(record)
    told = {"path": str(cells.path.resolve()), "per_field": bool(cells.files), "run_key": own}
    sizes = {path.name: path.stat().st_size for path in stage.iterdir()}
    changed = {"figures": figures, "segmentation": told, "key": segmented_key(own, cells)}
    record = {**record, **changed, "results": {**record.get("results", {}), **sizes}}
    record.pop("embedding", None)  # the embedding belongs to the replaced cells
    record["seconds"] = {**record.get("seconds", {}), "assign": shown.timings()["total"]}
    folder.write_json(stage / results.RUN, record)
    write_run_report(out, stage)
    folder.publish(out)
    folder.remove_work(out)
    return figures


def own_key(record: Mapping[str, Any]) -> str:
    """Return the key of a run's results with its own cells, also if these have been replaced."""
    return str(record.get("segmentation", {}).get("run_key", record.get("key", "")))


def _fields_of(out: Path, record: Mapping[str, Any], planes: np.ndarray | None) -> Fields:
    """Return the fields of a run from its record; the images are not needed.

    planes: those in which the new cells have separate outlines, see `merfish.pipeline.reconcile.Fields`.
    """
    if not record["fields"]:
        raise InputError(f"{out}: no field of this run was decoded, so there are no molecules to assign")
    try:
        names, words = record["codebook"]["names"], record["codebook"]["words"]
        book = Codebook(names, names, np.array([list(map(int, word)) for word in words]), record["bits"]["names"])
        scale, positions = float(record["microns_per_pixel"]), np.array(record["stage"]["positions"], float)
        height, width = next(iter(record["fields"].values()))["shape"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{out / results.RUN}: written by another version, without {error}; run the experiment again"
        ) from error
    experiment = Experiment(out, {}, book, scale, False, False, False, None, positions, (), (), {})
    work = folder.new_work(out)
    return Fields(work, work, experiment, tuple(sorted(map(int, record["fields"]))), (height, width), {}, planes)


def field_groups(path: Path) -> dict[int, list[int]]:
    """Return the row groups of a run's table that may contain each field. Raises InputError for other files."""
    groups: dict[int, list[int]] = {}
    last = -1
    try:
        metadata = pq.read_metadata(path)
        column = metadata.schema.names.index("fov")
        for k in range(metadata.num_row_groups):
            found = metadata.row_group(k).column(column).statistics
            if metadata.row_group(k).num_rows:
                if found.min < last:
                    raise ValueError(f"row group {k}: its fields are not sorted")
                last = found.max
                for fov in range(found.min, found.max + 1):
                    groups.setdefault(fov, []).append(k)
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a transcript table of a run: {error}") from error
    return groups


def _bounds(fields: Fields, fov: int) -> np.ndarray:
    """Return the bounds x, y, x, y of the cells of a field in micrometres, NaN if there are none."""
    bounds = shapely.bounds(read_cell_part(fields, "cells", fov)["geometry"].to_numpy(object))
    if not len(bounds):
        return np.full(4, np.nan)
    return np.concatenate([bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)])


# --- molecules ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AssignWork:
    """Assigns the molecules of a field, also those of genes imaged one by one, to cells.

    groups: for each table of molecules in ``out``, the row groups that may contain each field. bounds: of the cells of
    each field, in micrometres. sequential: names of the genes imaged one by one, in order.
    """

    out: Path
    fields: Fields
    groups: Mapping[str, Mapping[int, Sequence[int]]]
    bounds: Mapping[int, np.ndarray]
    sequential: Sequence[str]

    def __call__(self, fov: int) -> tuple[int, list[int]]:
        """Return the number of molecules in cells, and the fields whose cells may contain them.

        The cells of the molecules are written to files named after the tables, the counts to ``counts``.
        """
        tables = {name: self._molecules(name, fov) for name in self.groups}
        molecules = pd.concat(tables.values())
        x, y = molecules["global_x"].to_numpy(), molecules["global_y"].to_numpy()
        homes = [home for home in self.bounds if len(x) and self._near(home, x, y)]
        cell, planes = np.full(len(x), OUTSIDE), self.fields.planes
        if homes:
            cells = pd.concat([read_cell_part(self.fields, "cells", home) for home in homes], ignore_index=True)
            height = np.zeros(len(x)) if planes is None else np.interp(molecules["z"], np.arange(len(planes)), planes)
            cell = place_in_cells(x, y, height, cells, planes)
        ends = np.cumsum([len(table) for table in tables.values()])
        for name, placed in zip(tables, np.split(cell, ends[:-1]), strict=True):
            self.fields.write_rows(name, fov, placed)
        counts = count_pairs(cell, molecules["word"].to_numpy(), molecules["probability"].to_numpy())
        self.fields.write_rows("counts", fov, counts)
        return int((cell[: len(tables[results.TRANSCRIPTS])] >= 0).sum()), homes

    def _molecules(self, name: str, fov: int) -> pd.DataFrame:
        """Return word, position (x, y in µm, z in planes) and probability of the molecules of a field in a table."""
        single = name == results.SEQUENTIAL
        columns = ["fov", "global_x", "global_y", "z", *(["gene"] if single else ["barcode_id", "probability"])]
        with pq.ParquetFile(self.out / name) as file:
            table = file.read_row_groups(list(self.groups[name].get(fov, [])), columns=columns)
        table = table.filter(pc.field("fov") == fov).drop_columns("fov").to_pandas()
        if not single:
            return table.rename(columns={"barcode_id": "word"})
        # a gene that is also in the codebook has another name among the counts
        names = [name.removesuffix("_sequential") for name in self.sequential]
        word = self.fields.experiment.codebook.n_words + pd.Index(names).get_indexer(table.pop("gene").astype(object))
        # spots of a gene that is imaged alone need no decoding
        return table.assign(word=word, probability=np.ones(len(table), np.float32))

    def _near(self, home: int, x: np.ndarray, y: np.ndarray) -> bool:
        left, low, right, high = self.bounds[home]
        return bool(left <= x.max() and right >= x.min() and low <= y.max() and high >= y.min())


def _write_placed(fields: Fields, path: Path, stage: Path, shown: Display) -> None:
    """Write a table of molecules with their new cells, one row group at a time, in the same order."""
    with pq.ParquetFile(path) as file:
        schema, written = file.schema_arrow, Counter[int]()
        column = schema.get_field_index("cell_id")
        with pq.ParquetWriter(stage / path.name, schema) as kept:
            for k in shown.track(range(file.num_row_groups), file.num_row_groups, "write calls"):
                table, cells = file.read_row_group(k), [np.empty(0, np.int64)]
                for fov, n in zip(*np.unique(table["fov"].to_numpy(), return_counts=True), strict=True):
                    placed = fields.read_rows(path.name, fov, np.dtype(np.int64))
                    cells.append(placed[written[fov] : written[fov] + n])
                    written[fov] += n
                table = table.set_column(column, schema.field(column), pa.array(np.concatenate(cells)))
                kept.write_table(table, row_group_size=max(len(table), 1))
