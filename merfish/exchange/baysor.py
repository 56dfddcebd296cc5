"""Baysor's table of molecules; its polygons are read by `merfish.exchange.geojson`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from merfish.exchange.run import transcript_tables, write_tables


def write_baysor(run: Path, out: Path) -> None:
    """Write the molecules of a run as CSV: transcript_id, x, y, z (micrometres), gene, fov, and cell, 0 = none.

    ``baysor run -x x -y y -z z -g gene OUT :cell`` uses the cells as prior segmentation. Blanks are included as genes.
    """
    write_tables(out, (_molecules(table) for table in transcript_tables(run)))


def _molecules(table: pa.Table) -> pa.Table:
    columns = {"transcript_id": table["transcript_id"]}
    columns |= {axis: table[f"global_{axis}"] for axis in "xyz"}
    cell = pa.array(np.maximum(table["cell_id"].to_numpy(), 0))
    return pa.table({**columns, "gene": table["gene"].cast(pa.string()), "fov": table["fov"], "cell": cell})
