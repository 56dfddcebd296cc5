"""Section on cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from merfish import results
from merfish._parquet import between, parts
from merfish.report import figures
from merfish.report.page import Picture, Section, picture
from merfish.report.run import STAINS, Run
from merfish.report.summary import genes_of_cells, sum_cells

FEWEST_MAPPED = 10  # cells; a map of fewer shows mostly empty space


def cell_section(run: Run) -> Section | None:
    """Return the number of cells, a map, and histograms of molecules, genes and volumes per cell."""
    made = run.record["figures"]
    if not made["n_cells"]:
        return None
    path = run.stage / results.CELLS
    cells = sum_cells(path, genes_of_cells(run.stage / results.CELL_BY_GENE), *run.corners)
    text = [
        f"{made['n_cells']:,} cells, {made['transcripts_per_cell']:,.0f} molecules per cell (median); "
        f"{made['share_in_cells']:.0%} of the molecules are in cells. "
        f"{int((cells.n_molecules == 0).sum()):,} cells are empty."
    ]
    shown = []
    if made["n_cells"] >= FEWEST_MAPPED:
        if run.outlines is None:
            caption = "Molecules per cell, mean over the cells in each square"
            figure = figures.square_map(cells.mean_molecules, cells.squares, "molecules", "viridis", figures.NORMAL)
        else:
            caption = "Molecules per cell"
            figure = figures.cell_map(run.outlines, cells.n_molecules, "molecules")
        shown = [picture("cells", figure, caption, lambda: _described_cells(path, cells.n_genes))]
    shown += _stain_picture(run)
    for name, values, label, counted in (
        ("cell_molecules", cells.n_molecules, "molecules per cell", "cells"),
        ("cell_genes", cells.n_genes, "genes per cell", "cells"),
        ("cell_volume", cells.volume, "volume [µm³]", "cells"),
        ("assigned", run.fields["in cells"].to_numpy(float), "share of a field's molecules in cells", "fields"),
    ):
        numbers = pd.DataFrame({label: values})
        figure = figures.histogram(values, label, counted)
        shown.append(picture(name, figure, f"Histogram: {label}", numbers, "small"))
    return Section("Cells", text, figures=shown)


def _described_cells(path: Path, n_genes: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield the numbers of the map of cells in parts."""
    first = 0
    for part in parts(path, ["cell_id", "center_x", "center_y", "volume", "n_transcripts"]):
        yield part.to_pandas().assign(n_genes=n_genes[first : first + len(part)])
        first += len(part)


def _stain_picture(run: Run) -> list[Picture]:
    """Draw the stains of the field with the most cells, under the outlines of the run."""
    import shapely

    row = int(np.argmax(run.fields["outlines"]))
    fov, scale = int(run.fovs[row]), run.record["microns_per_pixel"]
    path = results.field_folder(run.out, fov) / STAINS
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as saved:
        stains, names, step = saved["stains"], saved["names"].tolist(), float(saved["step"])
    low, high = run.places[row], run.places[row] + run.size
    around = np.array(run.size) / 4  # cells with their centre outside the field may extend into it
    near = between(run.stage / results.CELLS, ["cell_id", "geometry"], "center", low - around, high + around)
    pieces, cell = shapely.get_parts(shapely.from_wkb(near["geometry"].to_numpy()), return_index=True)
    # the centre of a pixel of the reduced image is the centre of its block of pixels
    rings = [
        ((shapely.get_coordinates(ring) - low) / scale - (step - 1) / 2) / step
        for ring in shapely.get_exterior_ring(pieces)
    ]
    ids = near["cell_id"].to_numpy()[cell]
    corners = [pd.DataFrame(ring, columns=["x", "y"]).assign(cell_id=i) for ring, i in zip(rings, ids, strict=True)]
    caption = f"Field {fov}, which has the most cells: its stains, and outlines of cells"
    figure = figures.stains_under_outlines(stains, names, rings)
    return [picture("stains", figure, caption, pd.concat(corners) if corners else None)]
