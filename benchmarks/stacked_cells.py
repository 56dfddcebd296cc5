"""Cells above each other: 3-D segmentation of simulated tissue of two layers of cells, with seeds that were not used in
development.

Each field of 400 x 400 pixels is simulated (`simulate_experiment(layers=2)`: blur along z, uneven brightness, camera
noise, drift), and its stains are aligned and segmented. F1 of cells at an intersection over union of their volumes of
0.5: recall of the cells of which the field shows more than half, precision of all cells. "In one outline" is the number
of cells that the segmentation without `stacked_cells` finds.

    python benchmarks/stacked_cells.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from tables import RESULTS, as_markdown

from merfish.cells.counts import read_cells
from merfish.cells.measure import find_cells, find_stacked_cells
from merfish.cells.merging import in_stage_frame
from merfish.cells.stacks import planes
from merfish.imaging.field import aligned_stain, stain_shifts
from merfish.imaging.opening import open_experiment
from merfish.simulate import simulate_experiment

SEEDS, PLANES = (101, 102, 103), (8, 10)
SHAPE = (400, 400)


def measure(seed: int, n_planes: int, folder: Path) -> dict:
    """Return a row of the table."""
    raw = simulate_experiment(
        folder / "raw", fields=(1, 1), shape=SHAPE, planes=n_planes, layers=2, density=2e-4, seed=seed
    )
    experiment = open_experiment(raw)
    shifts, _ = stain_shifts(experiment, 0, ["DAPI", "polyT"])
    dapi, polyt = (aligned_stain(experiment, 0, name, shift) for name, shift in shifts.items())
    heights, scale = np.array(experiment.stain("DAPI").z), experiment.microns_per_pixel
    started = time.process_time()
    cells = find_stacked_cells(dapi, polyt, heights, scale)
    seconds = time.process_time() - started
    flat = len(find_cells(dapi, polyt, heights, scale).outlines)
    outlines = planes(in_stage_frame(cells.outlines, experiment.positions[0], scale))
    truth = read_cells(raw / "truth" / "cells.parquet")
    here = (heights >= heights[-1] / 2) == truth["layer"].to_numpy(bool)[:, None]
    shapes = truth["geometry"].to_numpy(object)[:, None, None]
    common = (shapely.area(shapely.intersection(shapes, outlines)) * here[:, None]).sum(axis=2)
    volume = (truth["area"].to_numpy() * here.sum(axis=1))[:, None]
    same = common / (volume + shapely.area(outlines).sum(axis=1) - common) > 0.5
    real = truth["visible"].to_numpy() > 0.5
    recall, precision = same[real].any(axis=1).mean(), same.any(axis=0).mean()
    return {
        "seed": seed,
        "planes": n_planes,
        "cells": int(real.sum()),
        "recall": recall,
        "precision": precision,
        "F1": 2 * recall * precision / (recall + precision),
        "found": len(outlines),
        "in one outline": flat,
        "CPU seconds": seconds,
    }


def main(quick: bool) -> None:
    """Print the table and write it to results/stacked_cells.md."""
    rows = []
    for seed in SEEDS[:1] if quick else SEEDS:
        for n_planes in PLANES[:1] if quick else PLANES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(seed, n_planes, Path(folder)))
            print(rows[-1], flush=True)
    text = f"{(__doc__ or '').strip()}\n\n{as_markdown(pd.DataFrame(rows))}\n"
    (RESULTS / "stacked_cells.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tissue")
    main(parser.parse_args().quick)
