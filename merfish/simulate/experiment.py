"""Simulated raw experiment on disk, in MERlin's layout, with its truth."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shapely
import tifffile

from merfish._files import whole_file
from merfish.cells.counts import count_table, write_cells
from merfish.codebook import Codebook, mhd4_codebook, write_codebook
from merfish.errors import InputError
from merfish.simulate.disturbances import Disturbances, draw_chromatic
from merfish.simulate.field import (
    MICRONS_PER_PIXEL,
    Plan,
    Scene,
    draw_beads,
    draw_stains,
    field_counts,
)
from merfish.simulate.optics import Imaging, draw_bits, draw_brightness, pack_bits, show_bits
from merfish.simulate.tissue import Tissue, make_tissue, scatter_molecules

OVERLAP = 0.1  # relative to the side of a field
ORIGIN = (250.0, -120.0)  # stage position of the first field, micrometre
COLORS = ("750", "650")
BEAD_COLOR = "561"
STAINS = (("DAPI", "405"), ("polyT", "488"))
_NAME = r"(?P<imageType>[\w|-]+)_(?P<fov>[0-9]+)_(?P<imagingRound>[0-9]+)"


def simulate_experiment(
    out: str | os.PathLike[str],
    *,
    codebook: Codebook | None = None,
    genes: int = 60,
    fields: tuple[int, int] = (4, 4),
    shape: tuple[int, int] = (512, 512),
    density: float = 0.012,
    planes: int = 1,
    layers: int = 1,
    drift: float = 5.0,
    seed: int = 0,
    imaging: Imaging | None = None,
    disturbances: Disturbances | None = None,
    progress: bool = False,
) -> Path:
    """Simulate a tissue, and write it as a raw experiment together with the truth.

    The folder ``out`` contains ``data_organization.csv``, ``codebook.csv``, ``positions.csv``, ``microscope.json`` and
    one TIFF (frame, y, x) uint16 for each field and round: bits of two colours, then beads; the last round has DAPI,
    polyT and beads. ``out/truth`` contains

    - molecules.parquet: barcode_id, gene, is_blank, cell_id (-1 = outside cells), global_x, global_y, global_z
      (micrometre), brightness, shown (uint64, the bits that are on, first least significant);
    - cells.parquet: cell_id, domain, cell_type, layer, center_x, center_y, area, visible, geometry (WKB), of the part
      of each cell that was imaged (visible: its fraction of the cell's area), micrometre; cell_by_gene.h5ad: true
      counts of the same cells;
    - drift.csv: dy, dx (pixels) by fov and round; fields.csv: true positions (micrometre); bits.csv: PSF and brightness
      of each bit; chromatic.csv: map from positions (y, x) in the beads' colour to those in each colour:
      y' = yy y + yx x + y1 and likewise x'; settings.json.

    The bits of a molecule, including errors, are the same in all fields that contain it. There is no drift in round 0:
    global = position + pixel * microns_per_pixel.

    codebook: genes and words; by default an MHD4 codebook is built for ``genes`` genes.
    fields: (rows, columns), overlapping by a tenth. shape: (y, x) of a frame. density: molecules per pixel
    of cell and plane. planes: number of z planes. layers: number of layers of cells above each other, at most
    ``planes``. drift: largest drift of a round along y and x, pixels.

    The same arguments give the same bytes. ``out`` is written atomically.
    Raises InputError for numbers out of range, and if ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; choose another folder")
    if min(*fields, planes) < 1 or min(shape) < 32 or not (density >= 0 and drift >= 0):
        raise InputError(
            f"expected at least one field and plane, frames of at least 32 pixels a side, density and drift >= 0; "
            f"got fields {fields}, planes {planes}, shape {shape}, density {density}, drift {drift}"
        )
    if not 1 <= layers <= planes:
        raise InputError(f"expected 1 to {planes} layers of cells in {planes} planes, got {layers}")
    streams = np.random.SeedSequence(seed).spawn(3)
    imaging, disturbances = imaging or Imaging(), disturbances or Disturbances()
    optics, biology = np.random.default_rng(streams[0]), np.random.default_rng(streams[1])
    n_bits = codebook.n_bits if codebook else 16
    plan = _draw_plan(n_bits, fields, shape, planes, drift, imaging, disturbances, optics)
    codebook, scene = _draw_scene(plan, codebook, genes, density, layers, biology)
    with whole_file(out) as folder:
        (folder / "truth").mkdir(parents=True)
        _write_description(folder, codebook, plan)
        for fov, stream in _track(streams[2].spawn(len(plan.nominal)), progress):
            _write_field(folder, plan, fov, *field_counts(plan, scene, fov, stream))
        _write_truth(folder / "truth", codebook, plan, scene)
        settings = {"seed": seed, "imaging": asdict(imaging), "disturbances": asdict(disturbances)}
        (folder / "truth" / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    return out


def _draw_plan(
    n_bits: int,
    fields: tuple[int, int],
    shape: tuple[int, int],
    planes: int,
    drift: float,
    imaging: Imaging,
    disturbances: Disturbances,
    rng: np.random.Generator,
) -> Plan:
    step = np.round(np.array(shape) * (1.0 - OVERLAP)) * MICRONS_PER_PIXEL
    grid = np.array([(column * step[1], row * step[0]) for row in range(fields[0]) for column in range(fields[1])])
    nominal = grid + ORIGIN
    bit = np.arange(n_bits)
    round_of_bit = bit // len(COLORS)
    n_rounds = int(round_of_bit[-1]) + 2  # including that of the stains
    moves = rng.uniform(-drift, drift, (len(grid), n_rounds, 2))
    moves[:, 0] = 0.0
    _, peak = draw_bits(imaging, n_bits, rng)
    color_of_bit = (bit + round_of_bit + 1) % len(COLORS)  # 650, 750, 750, 650, 650, ..., the usual order
    return Plan(
        shape=shape,
        n_planes=planes,
        nominal=nominal,
        actual=nominal + rng.normal(0.0, 1.0, nominal.shape) * disturbances.stage_error,
        drift=moves,
        sigma=rng.uniform(*imaging.psf_sigma, len(COLORS))[color_of_bit],
        peak=peak,
        round_of_bit=round_of_bit,
        color_of_bit=color_of_bit,
        chromatic=draw_chromatic(len(COLORS), shape, disturbances.chromatic, rng),
        hot_pixels=rng.integers(0, shape, (disturbances.hot_pixels, 2)),
        imaging=imaging,
        disturbances=disturbances,
    )


def _draw_scene(
    plan: Plan, codebook: Codebook | None, genes: int, density: float, layers: int, rng: np.random.Generator
) -> tuple[Codebook, Scene]:
    largest = np.abs(plan.drift).max() + plan.disturbances.chromatic + 10.0
    # At least 12, so that the same seed gives the same tissue with and without common disturbances.
    beyond = max(largest * MICRONS_PER_PIXEL + 4.0 * plan.disturbances.stage_error, 12.0)
    x0, y0, x1, y1 = _imaged(plan)
    bounds = (x0 - beyond, y0 - beyond, x1 + beyond, y1 + beyond)
    coding = np.arange(genes) if codebook is None else np.flatnonzero(~codebook.is_blank)
    if not len(coding):
        raise InputError("expected at least one gene, got a codebook of blanks only")
    tissue = make_tissue(bounds, len(coding), rng, layers)
    if codebook is None:
        names = [f"Gene{k:03d}" for k in range(1, genes + 1)]
        codebook = mhd4_codebook(names, expression=list(tissue.profile.mean(axis=0)))
    imaging = plan.imaging
    thickness = (plan.n_planes - 1) * imaging.plane_step
    amount = density * plan.n_planes / MICRONS_PER_PIXEL**2
    molecules = scatter_molecules(tissue, bounds, amount, thickness, rng)
    molecules["barcode_id"] = coding[molecules.pop("gene")].astype(np.int32)
    shown = show_bits(codebook.words[molecules["barcode_id"]], imaging.lost, imaging.gained, rng)
    molecules["brightness"], bit_brightness = draw_brightness(imaging, shown, rng)
    molecules["shown"] = pack_bits(shown)
    stains = draw_stains(tissue, rng)
    beads = draw_beads(bounds, plan.drift.shape[1], plan.disturbances.loose_beads, rng)
    return codebook, Scene(molecules, bit_brightness, *beads, tissue, *stains)


def _imaged(plan: Plan) -> tuple[float, float, float, float]:
    """Rectangle (x0, y0, x1, y1), micrometre, covered by the fields, to the outer edges of their pixels."""
    height, width = plan.shape
    x0, y0 = plan.nominal.min(axis=0) - 0.5 * MICRONS_PER_PIXEL
    x1, y1 = plan.nominal.max(axis=0) + (np.array([width, height]) - 0.5) * MICRONS_PER_PIXEL
    return float(x0), float(y0), float(x1), float(y1)


def _write_field(folder: Path, plan: Plan, fov: int, bits: np.ndarray, beads: np.ndarray, stains: np.ndarray) -> None:
    """Write one TIFF for each round: planes of the first colour, of the second (from the top down), then beads."""
    for imaging_round in range(len(beads) - 1):
        frames: list[np.ndarray] = []
        for color in range(len(COLORS)):
            bit = np.flatnonzero((plan.round_of_bit == imaging_round) & (plan.color_of_bit == color))
            if len(bit):
                frames.extend(bits[bit[0]] if color == 0 else bits[bit[0], ::-1])
        _write_frames(folder / f"merfish_{fov:03d}_{imaging_round:02d}.tif", [*frames, beads[imaging_round]])
    frames = [*stains.reshape(-1, *plan.shape), beads[-1]]
    _write_frames(folder / f"stains_{fov:03d}_{len(beads) - 1:02d}.tif", frames)


def _write_frames(path: Path, frames: list[np.ndarray]) -> None:
    tifffile.imwrite(path, np.stack(frames), photometric="minisblack")


def _write_description(folder: Path, codebook: Codebook, plan: Plan) -> None:
    write_codebook(codebook, folder / "codebook.csv")
    positions = "".join(f"{x:.4f},{y:.4f}\n" for x, y in plan.nominal)
    (folder / "positions.csv").write_text(positions)
    microscope = {
        "flip_horizontal": False,
        "flip_vertical": False,
        "transpose": False,
        "microns_per_pixel": MICRONS_PER_PIXEL,
        "image_dimensions": [plan.shape[1], plan.shape[0]],
    }
    (folder / "microscope.json").write_text(json.dumps(microscope, indent=2) + "\n")
    n = plan.n_planes
    heights = np.arange(n) * plan.imaging.plane_step
    rows = []
    for bit, (imaging_round, color) in enumerate(zip(plan.round_of_bit, plan.color_of_bit, strict=True)):
        in_round = plan.color_of_bit[plan.round_of_bit == imaging_round]
        first = n * int((in_round < color).sum())
        z = heights if color == 0 else heights[::-1]
        beads = n * len(in_round)
        name = f"bit{bit + 1}"
        rows.append(_channel(name, "merfish", bit + 1, imaging_round, COLORS[color], first, z, beads))
    for stain, (name, color_name) in enumerate(STAINS):
        beads = n * len(STAINS)
        stain_round = plan.drift.shape[1] - 1
        rows.append(_channel(name, "stains", "", stain_round, color_name, n * stain, heights, beads))
    with open(folder / "data_organization.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _channel(
    name: str,
    image_type: str,
    bit: int | str,
    imaging_round: int,
    color: str,
    first: int,
    heights: np.ndarray,
    bead_frame: int,
) -> dict[str, object]:
    """Row of the data organization: planes at ``heights`` (micrometre) in frames from ``first`` on."""
    single = len(heights) == 1
    frames = range(first, first + len(heights))
    return {
        "channelName": name,
        "readoutName": name,
        "imageType": image_type,
        "imageRegExp": _NAME,
        "bitNumber": bit,
        "imagingRound": imaging_round,
        "color": color,
        "frame": first if single else "[" + " ".join(str(frame) for frame in frames) + "]",
        "zPos": f"{heights[0]:g}" if single else "[" + " ".join(f"{z:g}" for z in heights) + "]",
        "fiducialImageType": image_type,
        "fiducialRegExp": _NAME,
        "fiducialImagingRound": imaging_round,
        "fiducialFrame": bead_frame,
        "fiducialColor": BEAD_COLOR,
    }


def _write_truth(folder: Path, codebook: Codebook, plan: Plan, scene: Scene) -> None:
    cells = _true_cells(plan, scene.tissue)
    molecules = _true_molecules(codebook, plan, scene, cells)
    molecules.to_parquet(folder / "molecules.parquet", index=False)
    write_cells(cells, folder / "cells.parquet")
    count_table(molecules, cells, codebook).write_h5ad(folder / "cell_by_gene.h5ad")
    fovs, rounds = (index.ravel() for index in np.indices(plan.drift.shape[:2]))
    dy, dx = plan.drift.reshape(-1, 2).T
    tables: dict[str, dict[str, Any]] = {
        "drift": {"fov": fovs, "round": rounds, "dy": dy, "dx": dx},
        "fields": {"fov": range(len(plan.actual)), "x": plan.actual[:, 0], "y": plan.actual[:, 1]},
        "bits": {
            "bit": np.arange(len(plan.peak)) + 1,
            "color": np.array(COLORS)[plan.color_of_bit],
            "round": plan.round_of_bit,
            "sigma": plan.sigma,
            "peak": plan.peak,
        },
        "chromatic": {
            "color": COLORS,
            **{f"{a}{b}": plan.chromatic[:, i, j] for i, a in enumerate("yx") for j, b in enumerate("yx1")},
        },
    }
    for name, columns in tables.items():
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


def _true_cells(plan: Plan, tissue: Tissue) -> pd.DataFrame:
    """Table of the imaged part of each cell; cell_id numbers the imaged cells of the tissue from 1."""
    seen = shapely.intersection(tissue.outlines, shapely.box(*_imaged(plan)))
    rows = np.flatnonzero(shapely.area(seen) > 0.0)
    seen = seen[rows]
    center = shapely.get_coordinates(shapely.centroid(seen))
    return pd.DataFrame(
        {
            "cell_id": np.arange(1, len(rows) + 1),
            "row": rows,
            "domain": tissue.domain[rows],
            "cell_type": tissue.cell_type[rows],
            "layer": tissue.layer[rows],
            "center_x": center[:, 0],
            "center_y": center[:, 1],
            "area": shapely.area(seen),
            "visible": shapely.area(seen) / shapely.area(tissue.outlines[rows]),
            "geometry": seen,
        }
    )


def _true_molecules(codebook: Codebook, plan: Plan, scene: Scene, cells: pd.DataFrame) -> pd.DataFrame:
    """Table of the molecules within the imaged rectangle; removes the column ``row``, which it uses, from ``cells``."""
    table = scene.molecules
    x0, y0, x1, y1 = _imaged(plan)
    table = table[table["x"].between(x0, x1) & table["y"].between(y0, y1)]
    cell_id = np.full(len(scene.tissue.outlines) + 1, -1, np.int64)  # the last element is for row -1
    cell_id[cells.pop("row")] = cells["cell_id"]
    word = table["barcode_id"].to_numpy()
    return pd.DataFrame(
        {
            "barcode_id": word,
            "gene": np.array(codebook.names, dtype=object)[word],
            "is_blank": codebook.is_blank[word],
            "cell_id": cell_id[table["cell"]],
            "global_x": table["x"].to_numpy(),
            "global_y": table["y"].to_numpy(),
            "global_z": table["z"].to_numpy(),
            "brightness": table["brightness"].to_numpy(),
            "shown": table["shown"].to_numpy(),
        }
    )


def _track(streams: list[np.random.SeedSequence], show: bool) -> Iterable[tuple[int, np.random.SeedSequence]]:
    numbered = list(enumerate(streams))
    if not show:
        return numbered
    from rich.progress import track

    return track(numbered, description="Imaging fields")
