"""Drift measured on simulated bead images with disturbances, compared with the truth, and time for 2048 x 2048 px.

    python benchmarks/registration.py

Writes benchmarks/results/registration.md in about two minutes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from scipy import ndimage
from tables import RESULTS, as_markdown

from merfish.imaging.preprocess import bandpass
from merfish.imaging.registration import align, measure_drift

BAD = ("dark", "noise", "out of range", "another field")
ROUNDS = 8
DRIFT = 20.0


def draw(points: np.ndarray, light: np.ndarray, size: int, sigma: float) -> np.ndarray:
    y, x = (np.exp(-0.5 * ((np.arange(size) - p[:, None]) / sigma) ** 2) for p in points.T)
    return (light[:, None] * y).T @ x


def scene(
    rng: np.random.Generator, size: int, density: float, glow: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate beads (y, x), a tenth of them saturated, and textured autofluorescence of cells, 40 px wider."""
    count = max(3, rng.poisson(density * (size + 60) ** 2))
    light = 1000 * rng.lognormal(0, 0.7, count) * np.where(rng.random(count) < 0.1, 80, 1)
    cells = ndimage.gaussian_filter(rng.normal(size=(size + 80, size + 80)), 12)
    texture = np.clip(1 + 3.5 * ndimage.gaussian_filter(rng.normal(size=cells.shape), 2), 0, None)
    return rng.uniform(-30, size + 30, (count, 2)), light, glow * np.clip(cells / cells.std() - 0.3, 0, None) * texture


def expose(
    rng: np.random.Generator,
    size: int,
    points: np.ndarray,
    light: np.ndarray,
    cells: np.ndarray,
    step: np.ndarray,
    hot: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Simulate a camera image: vignetting to half in the corners, offset 100, read noise 3, hot pixels, saturation."""
    seen = 100 + draw(points + step, light, size, 1.4) + ndimage.shift(cells, step, order=1)[40:-40, 40:-40]
    across = np.linspace(-1, 1, size) ** 2
    image = rng.poisson(seen * (1 - 0.25 * (across[:, None] + across))) + rng.normal(100, 3, seen.shape)
    image[hot] += 2000
    return np.clip(image, 0, 65535).astype(np.uint16)


def later_round(rng, size, beads, hot, step, bad, others):  # type: ignore[no-untyped-def]
    """Simulate a later round: a fifth of the beads loose (3 px), a fifth lost, a tenth of the rounds unusable."""
    points, light, cells = others if bad == "another field" else beads
    loose = (rng.random(len(points)) < 0.2)[:, None] * rng.normal(0, 3, points.shape)
    left = light * (rng.random(len(points)) > 0.2) * rng.lognormal(0, 0.1, len(points))
    if bad == "dark":
        return np.zeros((size, size), np.uint16)
    if bad == "noise":
        left, cells = 0 * left, 0 * cells
    if bad == "out of range":
        step = np.array([70.0, 70.0])
    return expose(rng, size, points + loose, left, cells, step, hot)


def accuracy(size: int, density: float, glow: float, fields: int = 29, seed: int = 0) -> dict[str, float]:
    """Return the errors of measured drift, and the number of rounds that were misjudged."""
    errors, lost, unusable, accepted = [], 0, 0, 0
    for field in range(fields):
        rng = np.random.default_rng([seed, field])
        beads, others = scene(rng, size, density, glow), scene(rng, size, density, glow)
        y, x = rng.integers(0, size, (2, int(2e-4 * size**2)))
        steps = np.vstack([[0, 0], rng.uniform(-DRIFT, DRIFT, (ROUNDS - 1, 2))])
        bad = [None] + [rng.choice(BAD) if rng.random() < 0.1 else None for _ in steps[1:]]
        images = [expose(rng, size, *beads, steps[0], (y, x))]
        images += [later_round(rng, size, beads, (y, x), s, b, others) for s, b in zip(steps[1:], bad[1:], strict=True)]
        table = measure_drift(np.stack(images))
        off = np.hypot(*(table[["dy", "dx"]].to_numpy(float) - steps).T)
        for number in range(1, ROUNDS):
            ok = bool(table["ok"][number])
            unusable += bad[number] is not None
            accepted += bad[number] is not None and ok
            lost += bad[number] is None and not ok
            if bad[number] is None and ok:
                errors.append(off[number])
    return {
        "px": size,
        "beads/px": density,
        "glow": glow,
        "rounds": len(errors),
        "error, median px": float(np.median(errors)),
        "99th percentile": float(np.quantile(errors, 0.99)),
        "largest": max(errors),
        "usable rounds lost": lost,
        "unusable": unusable,
        "unusable accepted": accepted,
    }


def speed(size: int) -> list[dict[str, str | float]]:
    """Return the fastest of three runs of each step."""
    rng = np.random.default_rng(0)
    beads = scene(rng, size, 1.5e-4, 300)
    nothing = (np.array([], int), np.array([], int))
    images = np.stack([expose(rng, size, *beads, rng.uniform(-5, 5, 2), nothing) for _ in range(ROUNDS)])
    bits = np.repeat(images, 2, axis=0)
    shifts = rng.uniform(-5, 5, (len(bits), 2))
    bent = np.tile(np.eye(2, 3), (len(bits), 1, 1)) * 1.001
    jobs = {
        f"drift of {ROUNDS} bead images": lambda: measure_drift(images),
        f"align {len(bits)} planes, drift": lambda: align(bits, shifts),
        f"align {len(bits)} planes, drift and colour": lambda: align(bits, shifts, bent),
        "band-pass, sigma 1 and 3, 1 plane": lambda: bandpass(images[0], smoothing=1.0, background=3.0),
    }
    rows: list[dict[str, str | float]] = []
    for name, job in jobs.items():
        job()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
        rows.append({"step": f"{name}, {size} x {size}", "seconds": min(seconds)})
    return rows


def main(quick: bool) -> None:
    settings = ((512, 1.5e-4, 300), (512, 1.5e-4, 2000), (256, 1.5e-4, 300), (128, 4e-4, 300))
    text = f"""Made by `python benchmarks/registration.py{" --quick" if quick else ""}`.

Drift of usable rounds against the truth; `usable rounds lost` and
`unusable accepted`: what the check of a round gets wrong.

{as_markdown(pd.DataFrame([accuracy(*setting) for setting in (settings[-1:] if quick else settings)]))}

{as_markdown(pd.DataFrame(speed(512 if quick else 2048)))}
"""
    (RESULTS / "registration.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one setting, small images")
    main(parser.parse_args().quick)
