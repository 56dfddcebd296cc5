"""MERSCOPE's output folder (Vizgen)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from merfish import results
from merfish._parquet import geo_schema
from merfish.exchange._reading import count_adata, find_file, matched, names_of, numbers, read_columns, read_counts
from merfish.exchange.run import (
    count_blocks,
    read_var,
    stacked_cell_tables,
    transcript_tables,
    write_dense,
    write_tables,
)

if TYPE_CHECKING:
    from anndata import AnnData

CENTRE = ["center_x", "center_y"]


def read_merscope(folder: str | os.PathLike[str]) -> AnnData:
    """Read counts of ``cell_by_gene.csv`` at the cell centres in ``cell_metadata.csv``, in micrometres.

    Features whose name contains "blank" are marked in ``var["is_blank"]``. Raises InputError naming file, row and
    column.
    """
    path = find_file(Path(folder), "cell_by_gene.csv", "*cell_by_gene*.csv")
    where = find_file(Path(folder), "cell_metadata.csv", "*cell_metadata*.csv")
    rows, genes, counts = read_counts(path)
    names = names_of(path, rows.iloc[:, 0])
    cells = read_columns(where, CENTRE, dtype={"EntityID": str, "Unnamed: 0": str})
    # the first column contains the names of the cells; before 2022 it had no header
    cells.index = names_of(where, cells.iloc[:, 0])
    cells = cells.iloc[matched(path, names, where, cells.index), 1:]
    var = pd.DataFrame({"is_blank": genes.str.lower().str.contains("blank")}, index=genes.rename("gene"))
    return count_adata(path, counts, cells.drop(columns=CENTRE), var, numbers(where, cells, CENTRE), "merscope")


BOUNDARIES = pa.schema(
    [
        ("ID", pa.int64()),
        ("EntityID", pa.int64()),
        ("ZIndex", pa.int64()),
        ("Geometry", pa.binary()),
        ("Type", pa.string()),
        ("ZLevel", pa.float64()),
        ("Name", pa.string()),
        ("ParentID", pa.int64()),
        ("ParentType", pa.string()),
    ]
)


def write_merscope(run: Path, out: Path) -> None:
    """Write the tables of a run into a new folder in MERSCOPE's format, with the transform but without images.

    Blanks are named ``Blank-*``, as its readers expect; ``global_z`` is the index of the plane. A cell with one outline
    for all planes gets that outline in each plane. The transform gives pixels of a mosaic of the fields.
    """
    record = results.read_run(run)
    var = read_var(run)
    renamed = {name: f"Blank-{name}" for name in var.index[var["is_blank"]] if not name.startswith("Blank-")}
    out.mkdir()
    write_tables(out / "detected_transcripts.csv", (_detected(table, renamed) for table in transcript_tables(run)))
    write_dense(
        out / "cell_by_gene.csv", "cell", var.index.map(lambda name: renamed.get(name, name)), count_blocks(run)
    )
    _write_cells(run, out, record.get("z") or [0.0])
    scale = 1 / float(record.get("microns_per_pixel", 1.0))
    left, top = results.mosaic_origin(record)
    (out / "images").mkdir()
    matrix = [[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]]
    np.savetxt(out / "images" / "micron_to_mosaic_pixel_transform.csv", matrix)


def _detected(table: pa.Table, renamed: Mapping[str, str]) -> pa.Table:
    gene = pa.array(table["gene"].to_pandas().replace(dict(renamed)), pa.string())
    others = {"": table["transcript_id"], "global_z": table["z"], "gene": gene}
    order = ("", "barcode_id", "global_x", "global_y", "global_z", "x", "y", "fov", "gene", "transcript_id", "cell_id")
    columns = {name: others[name] if name in others else table[name] for name in order}
    return pa.table(columns)


def _write_cells(run: Path, out: Path, planes: Sequence[float]) -> None:
    """``cell_metadata.csv`` and ``cell_boundaries.parquet``."""
    number, schema = 0, geo_schema(BOUNDARIES, "Geometry")
    with (
        open(out / "cell_metadata.csv", "w", encoding="utf-8", newline="") as metadata,
        pq.ParquetWriter(out / "cell_boundaries.parquet", schema) as boundaries,
    ):
        for k, (cells, outlines) in enumerate(stacked_cell_tables(run, len(planes))):
            _metadata(cells).to_csv(metadata, header=k == 0)
            row, plane = np.nonzero(~shapely.is_empty(outlines).reshape(len(cells), len(planes)))
            n = len(row)
            whole = [shapely.multipolygons(shapely.get_parts(outline)) for outline in outlines[row, plane]]
            rows = {
                "ID": np.arange(number, number + n),
                "EntityID": cells["cell_id"].to_numpy()[row],
                "ZIndex": plane,
                "Geometry": shapely.to_wkb(np.array(whole, dtype=object)),
                "Type": np.repeat("cell", n),
                "ZLevel": np.asarray(planes, float)[plane],
                **dict.fromkeys(("Name", "ParentID", "ParentType"), np.full(n, None)),
            }
            boundaries.write_table(pa.Table.from_pydict(rows, BOUNDARIES))
            number += n


def _metadata(cells: pd.DataFrame) -> pd.DataFrame:
    outlines = cells["geometry"].to_numpy(object)
    bounds, area = shapely.bounds(outlines).reshape(-1, 4), shapely.area(outlines)
    box = shapely.oriented_envelope(outlines) if len(outlines) else outlines
    sides = np.array([_sides(shape) for shape in box]).reshape(-1, 2)
    columns: dict[str, Any] = {name: cells[name] for name in ("fov", "volume", "center_x", "center_y")}
    columns |= dict(zip(("min_x", "min_y", "max_x", "max_y"), bounds.T, strict=True))
    columns |= {
        "anisotropy": sides[:, 1] / sides[:, 0],
        "transcript_count": cells["n_transcripts"],
        "perimeter_area_ratio": shapely.length(outlines) / area,
        "solidity": area / shapely.area(shapely.convex_hull(outlines)),
    }
    return pd.DataFrame(columns).set_index(pd.Index(cells["cell_id"], name="EntityID"))


def _sides(rectangle: shapely.Geometry) -> tuple[float, float]:
    """Return the shorter and the longer side of a rectangle."""
    corners = shapely.get_coordinates(rectangle)
    one, other = np.hypot(*np.diff(corners[:3], axis=0).T)
    return min(one, other), max(one, other)
