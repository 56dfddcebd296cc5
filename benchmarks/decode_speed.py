"""Time and memory of the decoders, compared with lower bounds: python benchmarks/decode_speed.py.

Writes benchmarks/results/decode_speed.md and decode_speed.png. ``--quick`` is a smoke run of a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numba
import numpy as np
import pandas as pd
from memory import forget_peak, peak_bytes
from tables import RESULTS, as_markdown
from timing import best_of

from merfish import decode, mhd4_codebook, plots, simulate_stack
from merfish.calls.filtering import rate_calls
from merfish.codebook import Codebook
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.decoding.molecules import extract_molecules
from merfish.decoding.pixels import decode_hard, decode_soft, distance_threshold, magnitude_threshold
from merfish.imaging.normalize import Normalization, peak_normalization
from merfish.imaging.preprocess import Bandpassed, bandpass

BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
SIDES, WORDS = (256, 512, 1024, 1536, 2048), (20, 50, 80, 110, 140)


@numba.njit(parallel=True)
def read_once(flat: np.ndarray) -> int:
    """Sum all words of memory, the minimum that any decoder must do."""
    total = np.uint64(0)
    for k in numba.prange(len(flat)):
        total += flat[k]
    return total


def ball_tree_reference(stack: np.ndarray) -> int:
    """Decode with scikit-learn's neighbours of pixels and scikit-image's regions, as MERlin and starfish do."""
    from skimage.measure import label, regionprops
    from sklearn.neighbors import NearestNeighbors

    n_bits, height, width = stack.shape
    vectors = np.maximum(stack.reshape(n_bits, -1).T, 0)
    norm = np.linalg.norm(vectors, axis=1)
    words = BOOK.words / np.linalg.norm(BOOK.words, axis=1, keepdims=True)
    tree = NearestNeighbors(n_neighbors=1, algorithm="ball_tree").fit(words)
    distance, word = tree.kneighbors(vectors / np.maximum(norm, 1e-6)[:, None])
    good = (distance[:, 0] < distance_threshold(4)) & (norm > magnitude_threshold(4))
    image = np.where(good, word[:, 0] + 1, 0).reshape(height, width)
    weight = norm.reshape(height, width)
    return sum(
        len([r.centroid_weighted for r in regionprops(label(image == w + 1), intensity_image=weight)])
        for w in range(BOOK.n_words)
    )


def speed(side: int) -> tuple[pd.DataFrame, float]:
    """Measure a side x side stack at 0.01 molecules per pixel, and the reference on a crop, scaled to the same size."""
    raw, _ = simulate_stack(BOOK, shape=(side, side), density=0.01, seed=1)
    floor = best_of(lambda: read_once(raw.ravel().view(np.uint64)))
    seen = Bandpassed(raw, smoothing=1.0, background=3.0)
    smooth, scale = seen[:, :], peak_normalization(seen)
    smooth -= scale.background[:, None, None]
    smooth *= scale.gain[:, None, None]
    same = Normalization.identity(16)
    level = Normalization(scale.background + np.median(raw[:, ::8, ::8], axis=(1, 2)), scale.scale)

    def molecules() -> None:
        extract_molecules(decode_soft(smooth, BOOK, same), smooth, BOOK, same, height=side)

    rows = [
        ("read the raw stack once", floor),
        ("hamming: kernel, uint16", best_of(lambda: decode_hard(raw, BOOK, level))),
        ("hamming: kernel, filtered float32", best_of(lambda: decode_hard(smooth, BOOK, same))),
        ("band-pass alone", best_of(lambda: bandpass(raw, smoothing=1.0, background=3.0))),
        ("background and scale of each bit", best_of(lambda: peak_normalization(seen))),
        ("pixels: kernel, filtered float32", best_of(lambda: decode_soft(smooth, BOOK, same))),
        ("pixels: kernel with band-pass, uint16", best_of(lambda: decode_soft(seen, BOOK, scale))),
        ("pixels: kernel and molecules", best_of(molecules)),
    ]
    for name in METHODS:

        def from_filtered(name: str = name) -> None:
            rate_calls(decode_filtered(smooth, BOOK, same, method=name), BOOK)

        def from_raw(name: str = name) -> None:
            decode(raw, BOOK, method=name)

        rows.append((f"{name}: filtered stack, everything", best_of(from_filtered)))
        rows.append((f"{name}: raw stack, everything", best_of(from_raw)))
    crop = min(side, 256)
    start = time.perf_counter()
    ball_tree_reference(np.ascontiguousarray(smooth[:, :crop, :crop]))
    rows.append(("ball tree and regionprops, scaled from a crop", (time.perf_counter() - start) * (side / crop) ** 2))
    table = pd.DataFrame(rows, columns=["what", "seconds"])
    table["ns_per_pixel"] = table["seconds"] / side**2 * 1e9
    table["times_reading"] = table["seconds"] / floor
    return table, floor


def peak_memory(side: int) -> pd.DataFrame:
    """Measure the peak memory of a decode with its stack, as a multiple of the stack, each in a new process."""
    rows = []
    for method, preprocess in [(name, flag) for name in METHODS for flag in (False, True)]:
        command = [sys.executable, __file__, "--memory", method, str(int(preprocess)), str(side)]
        ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append((method, "raw uint16" if preprocess else "filtered float32", ratio))
    return pd.DataFrame(rows, columns=["method", "stack", "peak_over_stack"])


def measure_memory(method: str, preprocess: bool, side: int) -> float:
    """Return the growth of the peak resident size by one decode, divided by the bytes of the stack."""
    small, _ = simulate_stack(BOOK, shape=(64, 64), seed=1)
    decode(small, BOOK, method=method)  # excludes the memory of compilation
    decode(small.astype(np.float32), BOOK, method=method, preprocess=False)
    stack, _ = simulate_stack(BOOK, shape=(side, side), density=0.01, seed=1)
    if not preprocess:
        stack = bandpass(stack, smoothing=1.0, background=3.0)
        stack /= peak_normalization(stack).scale[:, None, None]
    before = forget_peak()  # excludes the memory of the simulator
    decode(stack, BOOK, method=method, preprocess=preprocess)
    return (peak_bytes() - before + stack.nbytes) / stack.nbytes


def scaling() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the time of raw stacks by number of pixels, and of 1024 x 1024 px by number of words."""
    by_pixels, by_words = [], []
    for side in SIDES:
        raw, _ = simulate_stack(BOOK, shape=(side, side), density=0.01, seed=2)
        row = {name: best_of(lambda raw=raw, name=name: decode(raw, BOOK, method=name), 3) for name in METHODS}
        by_pixels.append({"pixels of a plane": side**2, **row})
    for n in WORDS:
        chosen = np.sort(np.random.default_rng(0).permutation(BOOK.n_words)[:n])
        names = tuple(BOOK.names[k] for k in chosen)
        book = Codebook(names, ("",) * n, BOOK.words[chosen], BOOK.bit_names)
        raw, _ = simulate_stack(book, shape=(1024, 1024), density=0.01, seed=2)
        row = {
            name: best_of(lambda raw=raw, book=book, name=name: decode(raw, book, method=name), 3) for name in METHODS
        }
        by_words.append({"words": n, **row})
    return pd.DataFrame(by_pixels), pd.DataFrame(by_words)


def draw(by_pixels: pd.DataFrame, by_words: pd.DataFrame, path: Path) -> None:
    """Plot time against pixels and against words."""
    figure, axes = plots.new_figure(9, 3.8, 2)
    for ax, table, column in zip(axes, (by_pixels, by_words), ("pixels of a plane", "words"), strict=True):
        for name, colour in zip(METHODS, plots.CATEGORIES, strict=False):
            ax.plot(table[column], table[name], "o-", color=colour, label=name, markersize=4)
        ax.set(xlabel=column, xlim=(0, None), ylim=(0, None))
    axes[0].set(ylabel="seconds", title="16 bits, 0.01 molecules/px")
    axes[1].set(title="1024 x 1024 px")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main(quick: bool) -> None:
    """Run all measurements, and write the table and the plot."""
    side = 512 if quick else 2048
    times, floor = speed(side)
    memory = peak_memory(side)
    ratio = times["seconds"].iloc[-1] / times.set_index("what").loc["pixels: kernel and molecules", "seconds"]
    text = f"""Made by `python benchmarks/decode_speed.py{" --quick" if quick else ""}`.

{platform.machine()}, {os.cpu_count()} cores, {numba.get_num_threads()} threads, Python {platform.python_version()},
NumPy {version("numpy")}, Numba {version("numba")}. Shortest of five runs.

## Time of one 16 x {side} x {side} stack, 0.01 molecules/px

Lower bound: reading the stack once, {floor / side**2 * 1e9:.1f} ns per pixel. `pixels`, with the measurement of
molecules, is {ratio:.0f} times faster than the reference.

{as_markdown(times)}

## Peak memory of decoding, including the stack

{as_markdown(memory)}
"""
    (RESULTS / "decode_speed.md").write_text(text)
    if not quick:
        draw(*scaling(), RESULTS / "decode_speed.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(options.memory[0], options.memory[1] == "1", int(options.memory[2])))
    else:
        main(options.quick)
