"""Mutated inputs of every kind: python benchmarks/fuzz.py [--number 10000] [--workers 2].

Each input is read in a process limited to 2 GB and 10 s. Writes benchmarks/results/fuzz.md.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import zarr
from tables import RESULTS

from merfish.codebook import mhd4_codebook, read_codebook, write_codebook
from merfish.config import read_config
from merfish.errors import InputError
from merfish.imaging.images import read_frames, read_header
from merfish.imaging.organization import read_data_organization, read_microscope, read_positions

SECONDS, BYTES = 10, 2 << 30
MOVIE = np.random.default_rng(0).integers(90, 4000, (4, 24, 32), dtype=np.uint16)
NUMBERS = [b"0", b"-1", b"1e300", b"NaN", b"inf", b"9" * 30, b"4294967295", b"1e-300", b"65536", b"0.5"]
ROUND = r"(?P<imageType>\w+)_(?P<fov>[0-9]+)_(?P<imagingRound>[0-9]+)"


def write_dax(folder: Path) -> None:
    MOVIE.tofile(folder / "m.dax")
    (folder / "m.inf").write_text(
        "data type = 16 bit integers (binary, little endian)\nframe dimensions = 32 x 24\nnumber of frames = 4\n"
    )


def write_organization(folder: Path) -> None:
    rows = [
        f'bit{k + 1},R{k},hal,{ROUND},{k + 1},{k // 2},750,"[{k % 2},2]","[0,1.5]",hal,{ROUND},{k // 2},6,561'
        for k in range(6)
    ]
    header = "channelName,readoutName,imageType,imageRegExp,bitNumber,imagingRound,color,frame,zPos,"
    header += "fiducialImageType,fiducialRegExp,fiducialImagingRound,fiducialFrame,fiducialColor"
    (folder / "d.csv").write_text("\n".join([header, *rows]))


def write_text(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def read_movie(name: str, folder: Path) -> None:
    """Read header and frames; the frames must have the shape given in the header."""
    header = read_header(folder / name)
    if header.problem:
        raise InputError(header.problem)
    images = read_frames(folder / name, range(min(header.frames, 4)))
    if images.shape != (min(header.frames, 4), *header.shape):
        raise AssertionError(f"wrong shape {images.shape}")


def apply(read: Callable[[Path], object], name: str, folder: Path) -> None:
    read(folder / name)


# functions that write a valid input, and that read it
KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "TIFF": (
        lambda folder: tifffile.imwrite(
            folder / "m.tif", MOVIE, photometric="minisblack", compression="zlib", metadata=None
        ),
        partial(read_movie, "m.tif"),
    ),
    "TIFF, contiguous": (
        lambda folder: tifffile.imwrite(folder / "m.tif", MOVIE, photometric="minisblack"),
        partial(read_movie, "m.tif"),
    ),
    "dax and inf": (write_dax, partial(read_movie, "m.dax")),
    "Zarr": (
        lambda folder: zarr.create_array(folder / "m.zarr", data=MOVIE, chunks=(1, 16, 16)),
        partial(read_movie, "m.zarr"),
    ),
    "npy": (lambda folder: np.save(folder / "m.npy", MOVIE), partial(read_movie, "m.npy")),
    "codebook": (
        lambda folder: write_codebook(mhd4_codebook(["A", "B"], 8), folder / "b.csv"),
        partial(apply, read_codebook, "b.csv"),
    ),
    "data organization": (write_organization, partial(apply, read_data_organization, "d.csv")),
    "positions": (partial(write_text, "p.csv", "1.5,2\n3,-4\n5e2,6\n"), partial(apply, read_positions, "p.csv")),
    "microscope": (
        partial(write_text, "m.json", '{"microns_per_pixel": 0.108, "transpose": true, "image_dimensions": [32, 24]}'),
        partial(apply, read_microscope, "m.json"),
    ),
    "config": (
        partial(write_text, "c.yaml", "method: spots\nsmoothing: 0.7\nflat_fields:\n  a: b.tif\ndark_level: 100\n"),
        partial(apply, read_config, "c.yaml"),
    ),
}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Apply one to three changes: flipped bits, truncation, insertions, extreme numbers, swapped or repeated lines."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        match int(rng.integers(6)):
            case 0 if data:
                changed = bytearray(data)
                # headers are at the beginning: every other change is made there
                changed[int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 300)))] ^= 1 << int(
                    rng.integers(8)
                )
                data = bytes(changed)
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
            case 3:
                number = NUMBERS[int(rng.integers(len(NUMBERS)))]
                data = data[:at] + number + data[at + int(rng.integers(4)) :]
            case _:
                lines = data.split(b"\n")
                i, j = rng.integers(len(lines), size=2)
                lines[i], lines[j] = lines[j], lines[i] if rng.random() < 0.5 else lines[j]
                data = b"\n".join(lines)
    return data


def limit() -> None:
    """Limit the memory of this process, and its time by an alarm."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def try_one(kind: str, seed: int) -> tuple[str, float]:
    """Return ("accepted", "rejected" or the unexpected outcome, seconds) for one mutated input."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    write, read = KINDS[kind]
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        # the metadata of a Zarr store are one of many files
        named = [path for path in files if path.suffix == ".json"] if rng.random() < 0.5 else []
        file = (named or files)[int(rng.integers(len(named or files)))]
        file.write_bytes(mutate(file.read_bytes(), rng))
        started = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            read(folder)
            outcome = "accepted"
        except InputError:
            outcome = "rejected"
        except BaseException:
            outcome = traceback.format_exc(limit=-2).strip()
        finally:
            signal.alarm(0)
        return outcome, time.perf_counter() - started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_whole() -> None:
    """Check that every unchanged input is accepted; mutations of a rejected input would show nothing."""
    for write, read in KINDS.values():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            read(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    check_whole()
    lines = [
        "# Mutated inputs",
        "",
        f"`python benchmarks/fuzz.py --number {options.number}`; limits of each input: {SECONDS} s, {BYTES >> 30} GB.",
        "",
        "| kind | accepted | rejected with InputError | other outcomes | slowest, s |",
        "|---|---|---|---|---|",
    ]
    with ProcessPoolExecutor(options.workers, initializer=limit) as pool:
        for kind in KINDS:
            outcomes = list(pool.map(partial(try_one, kind), range(options.number), chunksize=50))
            count = Counter(outcome if outcome in ("accepted", "rejected") else "else" for outcome, _ in outcomes)
            slowest = max(seconds for _, seconds in outcomes)
            lines.append(f"| {kind} | {count['accepted']} | {count['rejected']} | {count['else']} | {slowest:.2f} |")
            print(lines[-1], flush=True)
            for seed, (outcome, _) in enumerate(outcomes):
                if outcome not in ("accepted", "rejected"):
                    print(f"seed {seed}: {outcome}", flush=True)
    (RESULTS / "fuzz.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
