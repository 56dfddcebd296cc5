"""Image processing from camera to decoder with all disturbances at once: python benchmarks/imaging.py.

Writes benchmarks/results/imaging.md in about five minutes. ``--quick`` is a smoke run on small fields.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np
import pandas as pd
from registration import draw, expose, scene
from scipy import fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tables import RESULTS, as_markdown
from timing import best_of

import merfish
from merfish import results
from merfish.calls.filtering import keep_calls
from merfish.config import RunConfig
from merfish.imaging import field as field_module
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.opening import open_experiment
from merfish.imaging.registration import measure_drift
from merfish.pipeline.survey import read_calibration
from merfish.simulate import Disturbances, match_calls, simulate_experiment

EVERYTHING = Disturbances(
    stage_error=2.0,
    chromatic=3.0,
    vignetting=0.5,
    loose_beads=0.2,
    autofluorescence=100.0,
    haze=0.3,
    bleaching=0.03,
    hot_pixels=200,  # in 512 x 512
)
DRIFT = 20.0  # pixels
DENSITY = 0.01  # molecules per pixel of a cell
MARGIN = 35  # pixels; drift may hide the border up to this width
PRECISIONS = (0.90, 0.94, 0.97)
RADIUS = 1.5  # pixels, of a correct call


@dataclass(frozen=True, eq=False)
class Case:
    """A simulated experiment and its run."""

    raw: Path
    out: Path
    record: dict[str, Any]
    source: Experiment
    calls: pd.DataFrame  # all calls found
    molecules: pd.DataFrame
    fields: np.ndarray  # true positions (fov, 2), in micrometres


def run_case(folder: Path, name: str, shape: tuple[int, int], seed: int, drift: float, wrong: Disturbances) -> Case:
    """Simulate 3 x 3 fields with a seed, run them, and read the results."""
    raw, out = folder / name, folder / f"{name}_out"
    simulate_experiment(raw, fields=(3, 3), shape=shape, density=DENSITY, drift=drift, seed=seed, disturbances=wrong)
    merfish.run(raw, out=out)
    truth = raw / "truth"
    return Case(
        raw,
        out,
        results.read_run(out),
        open_experiment(raw),
        pd.read_parquet(out / results.ALL_TRANSCRIPTS),
        pd.read_parquet(truth / "molecules.parquet"),
        pd.read_csv(truth / "fields.csv")[["x", "y"]].to_numpy(),
    )


# --- colours ----------------------------------------------------------------------------------------------------


def true_maps(raw: Path) -> dict[str, np.ndarray]:
    """Return the positions in each colour of what the beads show, (3, 3) of (y, x, 1)."""
    table = pd.read_csv(raw / "truth" / "chromatic.csv", dtype={"color": str})
    return {
        row.color: np.array([[row.yy, row.yx, row.y1], [row.xy, row.xx, row.x1], [0, 0, 1]])
        for row in table.itertuples()
    }


def reference_color(case: Case) -> str:
    """Return the colour to which the others are mapped."""
    others = case.record["chromatic"]
    return next(bit.color for bit in case.source.bits if bit.color not in others)


def chromatic(case: Case) -> list[dict[str, Any]]:
    """Return the rms distance over the field between measured and true maps of each colour, and without correction."""
    width, height = case.source.image_dimensions or (0, 0)
    y, x = np.meshgrid(np.linspace(0, height - 1, 21), np.linspace(0, width - 1, 21))
    places = np.stack([y.ravel(), x.ravel(), np.ones(y.size)])
    maps = true_maps(case.raw)
    back = np.linalg.inv(maps[reference_color(case)])
    rows = []
    for color, fit in case.record["chromatic"].items():
        true = (maps[color] @ back @ places)[:2]
        rows.append(
            {
                "colour": color,
                "rms before, px": rms(true - places[:2]),
                "rms after, px": rms(true - np.array(fit["map"]) @ places),
                "largest after, px": float(np.hypot(*(true - np.array(fit["map"]) @ places)).max()),
            }
        )
    return rows


def rms(steps: np.ndarray) -> float:
    return float(np.sqrt((steps**2).sum(axis=0).mean()))


# --- molecules --------------------------------------------------------------------------------------------------


def true_places(case: Case, fov: int) -> np.ndarray:
    """Return the positions (molecule, 2) y, x of molecules in a field of the reference colour, in pixels."""
    scale = case.source.microns_per_pixel
    steps = case.molecules[["global_y", "global_x"]].to_numpy() - case.fields[fov][::-1]
    at = true_maps(case.raw)[reference_color(case)]
    return steps / scale @ at[:2, :2].T + at[:2, 2]


def within(places: np.ndarray, case: Case, margin: float) -> np.ndarray:
    width, height = case.source.image_dimensions or (0, 0)
    return np.asarray(((places >= margin) & (places <= np.array([height, width]) - 1 - margin)).all(axis=1))


def matched(case: Case, calls: pd.DataFrame) -> np.ndarray:
    """Return the row of the molecule that each call shows, -1 = wrong; by field, so that stage errors do not matter."""
    row = np.full(len(calls), -1)
    for fov in np.unique(calls["fov"]):
        rows = np.flatnonzero(calls["fov"] == fov)
        places = true_places(case, fov)
        near = np.flatnonzero(within(places, case, -5))
        truth = case.molecules.iloc[near][["barcode_id"]].assign(y=places[near, 0], x=places[near, 1])
        call, real = match_calls(calls.iloc[rows], truth, radius=RADIUS)
        row[rows[call]] = near[real]
    return row


def recall(case: Case, skip: tuple[int, ...] = ()) -> dict[str, float]:
    """Return the recall of all but some fields at some precisions, ranked by probability, and at the default rate."""
    fovs = [fov for fov in case.source.fovs if fov not in skip]
    n_truth = sum(within(true_places(case, fov), case, MARGIN).sum() for fov in fovs)
    calls = case.calls[case.calls["fov"].isin(fovs)]
    calls = calls.sort_values("probability", ascending=False, kind="stable").reset_index(drop=True)
    right = matched(case, calls) >= 0
    inner = within(calls[["y", "x"]].to_numpy(float), case, MARGIN)
    right, kept = right[inner], keep_calls(calls, case.record["parameters"]["misidentification_rate"]).index
    found, precision = np.cumsum(right) / n_truth, np.cumsum(right) / np.arange(1, len(right) + 1)
    row = {f"recall at {p}": float(found[precision >= p].max(initial=0)) for p in PRECISIONS}
    last = int(inner[: len(kept)].sum()) - 1
    return {**row, "recall, default": float(found[last]), "precision, default": float(precision[last])}


def overlaps(case: Case) -> dict[str, float]:
    """Return for correct calls in overlaps the share counted twice in the result, and the share of molecules lost."""
    kept = keep_calls(case.calls, case.record["parameters"]["misidentification_rate"])
    final = pd.read_parquet(case.out / results.TRANSCRIPTS)
    seen = sum(within(true_places(case, fov), case, 0).astype(int) for fov in case.source.fovs) >= 2
    before = np.unique(in_overlap(matched(case, kept), seen))
    after = in_overlap(matched(case, final), seen)
    return {
        "molecules called in overlaps": len(before),
        "duplicates left": 1 - len(np.unique(after)) / max(len(after), 1),
        "lost": 1 - len(np.unique(after)) / max(len(before), 1),
    }


def in_overlap(rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    rows = rows[rows >= 0]
    return rows[seen[rows]]


def positions(case: Case) -> dict[str, float]:
    """Return the position error of the fields, in pixels, in the largest group connected by shared molecules.

    A shift of the whole group cannot be determined and is removed.
    """
    scale, links = case.source.microns_per_pixel, pd.DataFrame(case.record["stage"]["links"])
    links, n = links[links["used"]], len(case.fields)
    _, group = connected_components(coo_array((np.ones(len(links)), (links["a"], links["b"])), shape=(n, n)))
    tied = group == np.bincount(group).argmax()
    said, found = (np.array(case.record["stage"][key])[tied] for key in ("said", "positions"))
    true = case.fields[tied]
    at = true_maps(case.raw)[reference_color(case)]
    bent = true @ at[:2, :2][::-1, ::-1].T  # x, y; with the magnification of the reference colour
    return {
        "fields tied": int(tied.sum()),
        "links": len(links),
        "stage, median px": float(np.median(off(said, true))) / scale,
        "stitched, median px": float(np.median(off(found, true))) / scale,
        "as magnified, median px": float(np.median(off(found, bent))) / scale,
        "as magnified, largest px": float(off(found, bent).max()) / scale,
    }


def off(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    steps = found - true
    return np.hypot(*(steps - steps.mean(axis=0)).T)


# --- beads and time ---------------------------------------------------------------------------------------------


def few_beads(rounds: int, size: int = 256) -> pd.DataFrame:
    """Measure drift from few beads: number of accepted rounds, and their errors."""
    rows = []
    nothing = (np.array([], int), np.array([], int))
    for count in (1, 2, 3, 4, 6, 10, 20):
        errors, wrong = [], 0
        for seed in range(rounds):
            rng = np.random.default_rng([count, seed])
            _, _, cells = scene(rng, size, 0, 0)
            points, light = rng.uniform(DRIFT, size - DRIFT, (count, 2)), 1000 * rng.lognormal(0, 0.7, count)
            step = rng.uniform(-DRIFT, DRIFT, 2)
            images = [expose(rng, size, points, light, cells, move, nothing) for move in (np.zeros(2), step)]
            found = measure_drift(np.stack(images)).iloc[1]
            if found["ok"]:
                errors.append(float(np.hypot(found["dy"] - step[0], found["dx"] - step[1])))
                wrong += errors[-1] > 1
        rows.append(
            {
                "beads": count,
                "accepted": len(errors) / rounds,
                "error, median px": np.median(errors) if errors else np.nan,
                "largest px": max(errors, default=np.nan),
                "accepted and wrong by more than 1 px": wrong,
            }
        )
    return pd.DataFrame(rows)


def field_time(size: int, calibration: Calibration, source: Experiment) -> list[dict[str, Any]]:
    """Time one field of 16 bits and 8 bead images in memory, from camera counts to the filtered stack."""
    rng = np.random.default_rng(0)
    beads = scene(rng, size, 1.5e-4, 300)
    nothing = (np.array([], int), np.array([], int))
    steps = np.vstack([[0, 0], rng.uniform(-5, 5, (7, 2))])
    rounds = np.stack([expose(rng, size, *beads, step, nothing) for step in steps])
    points = rng.uniform(0, size, (int(0.0025 * size**2), 2))
    spots = draw(points, np.full(len(points), 400.0), size, 1.3)
    bits = np.stack([rng.poisson(100 + spots).astype(np.uint16)[None] for _ in range(16)])
    read = {"read_bits": bits, "read_fiducials": (rounds, np.repeat(np.arange(8), 2))}
    with mock.patch.multiple(field_module, **{name: (lambda *_, value=value: value) for name, value in read.items()}):
        seconds = best_of(lambda: field_module.register_field(source, 0, RunConfig(), calibration))
        plain = best_of(lambda: field_module.register_field(source, 0, RunConfig(), replace(calibration, chromatic={})))
    planes = np.concatenate([bits[:, 0], rounds]).astype(np.float32)
    floor = best_of(lambda: [fft.irfft2(fft.rfft2(p, workers=2), workers=2) for p in planes])
    pixels = planes.size
    return [
        {"what": name, "seconds": value, "ns per pixel": value / pixels * 1e9}
        for name, value in (
            ("field with drift and colours", seconds),
            ("field with drift alone", plain),
            ("FFT of each image and back", floor),
        )
    ]


# --- report -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small fields")
    parser.add_argument("--keep", type=Path, help="folder for experiments and runs, which are kept")
    quick, keep = (lambda a: (a.quick, a.keep))(parser.parse_args())
    started = time.perf_counter()
    folder = Path(keep or tempfile.mkdtemp())
    shape, size = ((256, 256), 512) if quick else ((512, 512), 2048)
    everything = replace(EVERYTHING, hot_pixels=round(EVERYTHING.hot_pixels * shape[0] * shape[1] / 512**2))
    broken = replace(everything, dead_bit=5, saturated_fov=4)
    cases = {
        "perfect": run_case(folder, "perfect", shape, 5, 0.0, Disturbances()),
        "all disturbances": run_case(folder, "all", shape, 5, DRIFT, everything),
        "and a dead bit, a saturated field": run_case(folder, "broken", shape, 5, DRIFT, broken),
    }
    stage = run_case(folder, "stage", shape, 6, 5.0, Disturbances(stage_error=2.0))
    disturbed = cases["all disturbances"]
    calibration = read_calibration(disturbed.out)
    moved = {"stage error alone": stage, "all disturbances": disturbed}
    perfect, lost = recall(cases["perfect"]), recall(disturbed)
    text = f"""Made by `python benchmarks/imaging.py`{" --quick" if quick else ""}.

{platform.machine()}, {os.cpu_count()} cores, {numba.get_num_threads()} threads, Python {platform.python_version()},
NumPy {np.__version__}, Numba {numba.__version__}.

Disturbances: {everything}, drift up to {DRIFT:g} px in y and x. 3 x 3 fields of {shape[0]} x {shape[1]} px,
{DENSITY:g} molecules per pixel of cell, `spots`; the tissue is the same in all experiments.

## Molecules

Recall {MARGIN} px inside each field, calls ranked by their probability; `default`: the calls that a run keeps.
At 0.94 precision the disturbances cost {100 * (perfect["recall at 0.94"] - lost["recall at 0.94"]):.1f} points.

{as_markdown([{"experiment": k, **recall(c, (4,) if "saturated" in k else ())} for k, c in cases.items()])}

The last row refers to the other eight fields. Words that contain the dead bit lose one bit.

## Colours

{as_markdown(chromatic(disturbed))}

## Overlaps

{as_markdown([{"experiment": name, **overlaps(case)} for name, case in moved.items()])}

## Positions

{as_markdown([{"experiment": name, **positions(case)} for name, case in moved.items()])}

Nine fields, with a mean overlap of 51 px, less the borders that drift moves out of view in either field.
"As magnified": true positions are multiplied by the magnification of the reference colour, which differs from the
colour of the beads and cannot be measured from molecules.

## Drift from few beads

{as_markdown(few_beads(5 if quick else 40))}

## Time of a field of {size} x {size}, 16 bits and 8 bead images

{as_markdown(field_time(size, calibration, disturbed.source))}

Whole benchmark: {time.perf_counter() - started:.0f} s.
"""
    print(text)
    (RESULTS / "imaging.md").write_text(text)
    if keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
