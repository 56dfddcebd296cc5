"""Segmentation of simulated tissues with several cell sizes and densities: quality, and CPU time.

Each tissue is stained, imaged (blur, uneven brightness between and within cells, camera noise), segmented, and compared
with its true outlines: F1 of cells at an intersection over union of 0.5, cells merged or split, and the share of
positions more than 1 micrometre inside a cell that are assigned to it. "Full" is the same segmentation at full camera
resolution.

    python benchmarks/cells.py
"""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pandas as pd
import shapely
from scipy.ndimage import gaussian_filter
from skimage.draw import polygon
from tables import RESULTS, as_markdown

from merfish.cells import segmentation
from merfish.cells.counts import assign_cells
from merfish.cells.measure import find_cells
from merfish.cells.merging import field_frame, in_stage_frame, merge_outlines, number_cells, same_cells, trim_overlaps
from merfish.simulate import tissue as simulated
from merfish.simulate.disturbances import illumination
from merfish.simulate.field import DAPI_LIGHT, GRAIN_SIGMA, MICRONS_PER_PIXEL, POLYT_LIGHT, STAIN_BACKGROUND, STAIN_BLUR
from merfish.simulate.optics import Imaging, expose

SIDE = 1024  # pixels
SEEN = 0.5  # share of a cell that must lie in the field to count it as missed
PLANE_STEP = 1.5  # micrometres
TISSUES = {
    "usual": {"CELL_SPACING": 10.0},
    "small cells": {"CELL_SPACING": 6.5, "CELL_GAP": 0.6, "CORNER_RADIUS": 1.0},
    "large cells": {"CELL_SPACING": 18.0, "CELL_GAP": 1.0, "CORNER_RADIUS": 3.0},
    "nearly touching": {"CELL_GAP": 0.4},
    "sparse": {"CELL_GAP": 1.5, "MISSING_CELLS": 0.5},
    "dim, noisy": {"CELL_SPACING": 10.0, "light": 0.2},
}


def stained(
    tissue: simulated.Tissue, corner: tuple[float, float], planes: int, light: float, seed: int, noise: int = 0
) -> tuple:
    """Return stains (stain, z, y, x) of a field with its first pixel at ``corner``, and true outlines and volumes.

    With several planes, a cell is an ellipsoid, widest at its own height.
    """
    rng = np.random.default_rng(seed)
    n = len(tissue.outlines)
    middle, half = rng.uniform(0, (planes - 1) * PLANE_STEP, n), rng.uniform(3.0, 6.0, n)
    strength = light * np.array([[DAPI_LIGHT], [POLYT_LIGHT]]) * np.exp(rng.normal(0, 0.25, (2, n)))
    scale = np.ones((planes, n))
    if planes > 1:
        height = PLANE_STEP * np.arange(planes)[:, None]
        scale = np.sqrt(np.maximum(1 - ((height - middle) / half) ** 2, 0))
    image = np.zeros((2, planes, SIDE, SIDE), np.float32)
    grains = [rng.normal(0, 0.25, (n, 20, 2)), rng.uniform(0.1, 0.4, (n, 20))]
    for z in range(planes):
        for row in np.flatnonzero(scale[z] > 0.1):
            center = shapely.get_coordinates(shapely.centroid(tissue.outlines[row]))[0]
            for stain, shape, amount in ((1, tissue.outlines[row], 1.0), (1, tissue.nuclei[row], -0.4),
                                         (0, tissue.nuclei[row], 1.0)):  # fmt: skip
                if shape.is_empty:
                    continue
                xy = center + (shapely.get_coordinates(shape.exterior) - center) * scale[z, row]
                px, py = ((xy - corner) / MICRONS_PER_PIXEL).T
                image[stain, z][polygon(py, px, (SIDE, SIDE))] += amount * strength[stain, row]
            place = center + grains[0][row] * scale[z, row] * np.sqrt(tissue.outlines[row].area)
            px, py = np.rint((place - corner) / MICRONS_PER_PIXEL).astype(int).T
            inside = (px >= 0) & (py >= 0) & (px < SIDE) & (py < SIDE)
            # drawn sharp, blurred below
            grain = strength[1, row] * grains[1][row] * 2 * np.pi * GRAIN_SIGMA**2
            np.add.at(image[1, z], (py[inside], px[inside]), grain[inside] / 4)
        for stain in range(2):
            image[stain, z] = gaussian_filter(image[stain, z], STAIN_BLUR) + STAIN_BACKGROUND
    image *= illumination((SIDE, SIDE), 0.3)
    counts = expose(image.reshape(-1, SIDE, SIDE), Imaging(), np.random.SeedSequence([seed, noise])).reshape(
        image.shape
    )
    widest = scale.max(axis=0)
    grown = [shapely.affinity.scale(o, s, s, origin="centroid") for o, s in zip(tissue.outlines, widest, strict=True)]
    return counts, np.array(grown, dtype=object), shapely.area(tissue.outlines) * (scale**2).sum(axis=0) * PLANE_STEP


def draw_tissue(settings: dict, side: float, seed: int) -> simulated.Tissue:
    """Simulate a tissue in a square of ``side`` micrometres."""
    constants = {name: value for name, value in settings.items() if name != "light"}
    with mock.patch.multiple(simulated, **constants):
        return simulated.make_tissue((0, 0, side, side), 3, np.random.default_rng(seed))


def find(image: np.ndarray, corner: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return outlines (micrometres), volumes, and the CPU time."""
    started = time.process_time()
    found = find_cells(image[0], image[1], PLANE_STEP * np.arange(image.shape[1]), MICRONS_PER_PIXEL)
    seconds = time.process_time() - started
    outlines = in_stage_frame(found.outlines, np.array(corner), MICRONS_PER_PIXEL)
    return outlines, shapely.area(outlines) * found.measured["depth"].to_numpy(), seconds


def score(
    found: np.ndarray, volume: np.ndarray, truth: np.ndarray, true_volume: np.ndarray, frame, planes: int
) -> dict:
    """Compare outlines with the truth within a field (``frame``)."""
    seen = shapely.intersection(truth, frame)
    share = shapely.area(seen) / shapely.area(truth)
    real = share > SEEN
    i, j = shapely.STRtree(found).query(seen, predicate="intersects")
    common = shapely.area(shapely.intersection(seen[i], found[j]))
    of_true, of_found = common / shapely.area(seen[i]), common / shapely.area(found[j])
    union = shapely.area(seen[i]) + shapely.area(found[j]) - common
    same = common / union > 0.5
    matched = np.isin(np.arange(len(truth)), i[same])
    recall, precision = matched[real].mean(), np.isin(np.arange(len(found)), j[same]).mean()
    in_one = np.bincount(j[(of_true > 0.5) & real[i]], minlength=len(found))  # true cells mostly within a found cell
    of_one = np.bincount(i[of_found > 0.5], minlength=len(truth))  # found cells mostly within a true cell
    merged = np.isin(np.arange(len(truth)), i[(of_true > 0.5) & (in_one[j] > 1)])
    wrong = real & (merged | (of_one > 1))
    best = np.full(len(found), -1)
    order = np.argsort(common)
    best[j[order]] = i[order]
    right, whole = places_inside(seen, found, best, frame), same & (share[i] > 0.999)
    ratio = volume[j[whole]] / true_volume[i[whole]]
    return {
        "cells": int(real.sum()),
        "F1": 2 * recall * precision / (recall + precision),
        "merged or split": wrong.sum() / real.sum(),
        "IoU, median": float(np.median((common / union)[same])),
        "positions right": right,
        "volume found / true, median": float(np.median(ratio)) if planes > 1 else np.nan,
        "volume, r": float(np.corrcoef(volume[j[whole]], true_volume[i[whole]])[0, 1]) if planes > 1 else np.nan,
    }


def places_inside(truth: np.ndarray, found: np.ndarray, best: np.ndarray, frame: shapely.Polygon) -> float:
    """Return the share of places more than 1 micrometre inside true cells that lie in the matching found cell."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(frame.bounds[:2], frame.bounds[2:], (60_000, 2)).T
    cell = assign_cells(x, y, shapely.buffer(truth, -1.0), np.arange(len(truth)))
    x, y, cell = x[cell >= 0], y[cell >= 0], cell[cell >= 0]
    row = assign_cells(x, y, found, np.arange(len(found)))
    return float(((row >= 0) & (best[row] == cell)).mean())


def counted_once(tissue: simulated.Tissue, planes: int) -> dict:
    """Check on four overlapping fields that cells that cross a border and lie within the section are counted once."""
    step = 0.9 * SIDE * MICRONS_PER_PIXEL
    corners = [(20 + step * column, 20 + step * row) for row in range(2) for column in range(2)]
    frames = [field_frame(np.array(corner), (SIDE, SIDE), MICRONS_PER_PIXEL) for corner in corners]
    shapes = []
    for fov, corner in enumerate(corners):
        image, truth, _ = stained(tissue, corner, planes, 1.0, 7, noise=fov)
        shapes.append(find(image, corner)[0])
    links = [
        (a, p, b, q)
        for a in range(4)
        for b in range(a + 1, 4)
        for p, q in zip(*same_cells(shapes[a], shapes[b], frames[a], frames[b]), strict=True)
    ]
    numbers = number_cells({fov: len(shapes[fov]) for fov in range(4)}, np.array(links, int).reshape(-1, 4))
    members = numbers.members(np.arange(len(numbers.home)))
    geometry = np.array([shapes[row.fov][row.outline] for row in members.itertuples()], dtype=object)
    merged = merge_outlines(members, geometry, pd.DataFrame({"depth": np.ones(len(members))}))
    found = trim_overlaps(merged, merged)["geometry"].to_numpy(object)
    inside = shapely.within(truth, shapely.union_all(frames))
    crossing = inside & (shapely.crosses(truth[:, None], [f.exterior for f in frames]).any(axis=1))
    i, j = shapely.STRtree(found).query(truth, predicate="intersects")
    mostly = shapely.area(shapely.intersection(truth[i], found[j])) > 0.5 * shapely.area(found[j])
    times = np.bincount(i[mostly], minlength=len(truth))
    return {"cells that cross a border": int(crossing.sum()), "counted once": float((times[crossing] == 1).mean())}


def main() -> None:
    """Print the tables and write them to results/cells.md."""
    side = SIDE * MICRONS_PER_PIXEL
    frame = field_frame(np.array([20.0, 20.0]), (SIDE, SIDE), MICRONS_PER_PIXEL)
    rows, ratios = [], []
    for seed, (name, settings) in enumerate(TISSUES.items()):
        tissue = draw_tissue(settings, side + 40, seed)
        for planes in (1, 5):
            image, truth, volume = stained(tissue, (20.0, 20.0), planes, settings.get("light", 1.0), seed)
            seconds = {}
            for label, block in (("full", 1e-9), ("blocks", segmentation.BLOCK)):
                with mock.patch.object(segmentation, "BLOCK", block):
                    found, its_volume, seconds[label] = find(image, (20.0, 20.0))
                figures = score(found, its_volume, truth, volume, frame, planes)
                rows.append({"tissue": name, "planes": planes, "resolution": label, **figures})
                print(rows[-1], flush=True)
            ratios.append(
                {"tissue": name, "planes": planes, "CPU time, full / blocks": seconds["full"] / seconds["blocks"]}
            )
    tissue = draw_tissue(TISSUES["usual"], 2 * side + 40, 1)
    borders = [{"planes": planes, **counted_once(tissue, planes)} for planes in (1, 5)]
    text = "\n\n".join(as_markdown(pd.DataFrame(table)) for table in (rows, ratios, borders))
    (RESULTS / "cells.md").write_text(f"{(__doc__ or '').strip()}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
