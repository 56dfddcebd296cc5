"""Faults injected into a simulated experiment, kills, damage and a full disk: messages and results of a run.

    python benchmarks/faults.py [--only inputs kills workers damage disk routes hosts slurm] [--kills 100]

Writes benchmarks/results/faults.md. ``disk`` mounts small file systems in memory and needs root on Linux.
Every run is a command line in a separate process; results are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import tifffile
from tables import RESULTS

import merfish
from merfish import results
from merfish.simulate import simulate_experiment

TABLES = (results.TRANSCRIPTS, results.ALL_TRANSCRIPTS, results.CELLS, results.CELL_BY_GENE)
PLACES = 5
# Expected result of a fault: exit code, and words that the output must all contain.
Expected = tuple[int, tuple[str, ...]]


def start(raw: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command line in its own process group."""
    command = [sys.executable, "-m", "merfish.cli", "run", str(raw), "--out", str(out), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code, and all output except progress bars."""
    said, errors = process.communicate(timeout=600)
    return process.returncode, "\n".join(line for line in (said + errors).splitlines() if "━" not in line)


def contents(out: Path) -> dict[str, bytes]:
    """Read the tables of a run."""
    return {name: (out / name).read_bytes() for name in TABLES}


# --- faults of the input ------------------------------------------------------------------------------------------


def image(raw: Path, place: int) -> tuple[Path, int]:
    """Return an image file and its field."""
    fov = place % 3
    return raw / f"merfish_{fov:03d}_{1 + place:02d}.tif", fov


def write(path: Path, images: np.ndarray) -> None:
    tifffile.imwrite(path, images, photometric="minisblack")


def on_image(change: Callable[[Path], None], *words: str) -> Callable[[Path, int], Expected]:
    """A fault of one image file, which must be reported with its field before any work."""

    def fault(raw: Path, place: int) -> Expected:
        path, fov = image(raw, place)
        change(path)
        return 2, (f"field {fov}", path.name, *words)

    return fault


def missing(raw: Path, place: int) -> Expected:
    path, fov = image(raw, place)
    path.unlink()
    return 2, (f"field {fov}", "missing", f"imaging round {1 + place}")


def outside(path: Path) -> None:
    target = path.parent.parent / f"elsewhere_{path.name}"
    path.rename(target)
    path.symlink_to(target)


def twice(path: Path) -> None:
    other = (
        path.with_name(path.name[:-6] + "08.tif")
        if path.name[-6:-4] == "00"
        else path.with_name(path.name[:-6] + "00.tif")
    )
    shutil.copy(other, path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def two_names(raw: Path, place: int) -> Expected:
    path, _ = image(raw, place)
    other = path.with_suffix(".tiff")
    shutil.copy(path, other)
    return 2, (path.name, other.name)


def link_outside(raw: Path, place: int) -> Expected:
    path, _ = image(raw, place)
    outside(path)
    return 2, (path.name, "outside")


def noise_round(raw: Path, place: int) -> Expected:
    path, fov = image(raw, place)
    write(path, np.random.default_rng(place).poisson(100, tifffile.imread(path).shape).astype(np.uint16))
    return 3, (f"field {fov} failed", f"rounds {1 + place}")


def saturated(raw: Path, place: int) -> Expected:
    fov = place % 3
    for path in raw.glob(f"merfish_{fov:03d}_*.tif"):
        images = tifffile.imread(path)
        images[:2][images[:2] > 90 + place] = 4095
        write(path, images)
    return 3, (f"field {fov} failed", "saturated")


def dead_in_one_field(raw: Path, place: int) -> Expected:
    path, fov = image(raw, place)
    images = tifffile.imread(path)
    images[place % 2] = 100
    write(path, images)
    return 0, (f"field {fov}", "no image")


def beyond_positions(raw: Path, place: int) -> Expected:
    path, _ = image(raw, place)
    other = path.with_name(path.name.replace(path.name[8:11], f"{3 + place:03d}"))
    shutil.copy(path, other)
    return 2, (other.name, f"field {3 + place}")


def edit(name: str, change: Callable[[list[str], int], None], *words: str) -> Callable[[Path, int], Expected]:
    """A fault of a table, whose file must be reported; ``{n}`` in words is the line, counted from 1."""

    def fault(raw: Path, place: int) -> Expected:
        lines = (raw / name).read_text().splitlines()
        change(lines, 1 + place)
        (raw / name).write_text("\n".join(lines) + "\n")
        return 2, (name, *(word.format(n=2 + place) for word in words))

    return fault


def set_column(lines: list[str], row: int, column: str, value: str) -> None:
    """Change a value in a table that has no quoted commas before it."""
    where = lines[0].split(",").index(column)
    values = lines[row].split(",")
    values[where] = value
    lines[row] = ",".join(values)


def doubled_word(lines: list[str], row: int) -> None:
    lines[row + 1] = ",".join([*lines[row + 1].split(",")[:2], *lines[row].split(",")[2:]])


def scope(raw: Path, place: int) -> Expected:
    value = ("0", "-1", "1e-300", "NaN", '"small"')[place]
    path = raw / "microscope.json"
    text = path.read_text().splitlines()
    k = next(k for k, line in enumerate(text) if "microns_per_pixel" in line)
    text[k] = f'"microns_per_pixel": {value},' if text[k].rstrip().endswith(",") else f'"microns_per_pixel": {value}'
    path.write_text("\n".join(text))
    return 2, ("microscope.json", "microns_per_pixel")


FAULTS: dict[str, Callable[[Path, int], Expected]] = {
    "image missing": missing,
    "image cut short": on_image(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None),
    "image of another size": on_image(lambda path: write(path, tifffile.imread(path)[:, :-8]), "152"),
    "image of 8 bits": on_image(lambda path: write(path, tifffile.imread(path).astype(np.uint8)), "uint8"),
    "image of real numbers": on_image(lambda path: write(path, tifffile.imread(path).astype(np.float32)), "float32"),
    "frame missing": on_image(lambda path: write(path, tifffile.imread(path)[:-1]), "2 frames"),
    "frame too many": on_image(lambda path: write(path, tifffile.imread(path)[[0, 1, 2, 2]]), "4 frames"),
    "image empty": on_image(lambda path: path.write_bytes(b"") and None),
    "text as image": on_image(lambda path: path.write_text("no image") and None),
    "round given twice": on_image(twice, "same content"),
    "folder as image": on_image(as_folder),
    "pipe as image": on_image(as_fifo, "pipe"),
    "link out of the experiment": link_outside,
    "two files for one round": two_names,
    "field without position": beyond_positions,
    "round that does not match": noise_round,
    "field saturated at 12 bits": saturated,
    "bit dead in one field": dead_in_one_field,
    "codebook: word twice": edit("codebook.csv", doubled_word),
    "codebook: not a bit": edit("codebook.csv", lambda lines, row: set_column(lines, row, "bit3", "x"), "{n}"),
    "data organization: bit missing": edit("data_organization.csv", lambda lines, row: lines.pop(row), "bit"),
    "data organization: frame out of range": edit(
        "data_organization.csv", lambda lines, row: set_column(lines, row, "bitNumber", "abc"), "line {n}", "bitNumber"
    ),
    "positions: not a number": edit("positions.csv", lambda lines, row: lines.insert(row % 3, "here,there"), "here"),
    "microscope: pixel size": scope,
}


def inputs(raw: Path, folder: Path) -> Iterator[str]:
    """Inject 24 kinds of faults in five places each."""
    yield "| fault | exit code, expected words in every place |\n|---|---|"
    good = total = 0
    for name, fault in FAULTS.items():
        wrong = []
        for place in range(PLACES):
            copy, out = (folder / f"{name} {place}" / part for part in ("raw", "out"))
            shutil.copytree(raw, copy)
            code, words = fault(copy, place)
            found, said = finish(start(copy, out))
            flat = " ".join(said.split())
            missing = [word for word in words if word not in flat]
            if found != code or missing or "Traceback" in said:
                wrong.append(
                    f"place {place}: exit {found} instead of {code}, missing in the output: {missing}: {flat[:300]}"
                )
            shutil.rmtree(copy.parent)
        good += PLACES - len(wrong)
        total += PLACES
        yield f"| {name} | {PLACES - len(wrong)} of {PLACES} {'; '.join(wrong)} |"
    yield f"\n{good} of {total} as expected."


# --- kills, damage, a full disk, routes ---------------------------------------------------------------------------


def kills(raw: Path, folder: Path, n: int) -> Iterator[str]:
    """Send SIGKILL to the whole process group at random times, then run the same command again."""
    fresh, seconds = uninterrupted(raw, folder, "--workers", "2")
    rng, same, hit = np.random.default_rng(0), 0, 0
    for k in range(n):
        out = folder / f"kill {k}"
        options = ("--workers", "2") if k % 2 else ()
        process = start(raw, out, *options)
        time.sleep(rng.uniform(0.1, seconds))
        if process.poll() is None:
            hit += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        code, said = finish(start(raw, out, *options))
        litter = [path.name for path in out.rglob(".*") if path.name != ".lock"]
        same += code == 0 and contents(out) == fresh and not litter
        if code or litter:
            yield f"kill {k}: exit {code}, left {litter}: {said[-300:]}"
        shutil.rmtree(out)
    yield f"SIGKILL of the whole run at {n} random moments, {hit} before its end: "
    yield f"{same} of {n} equal an uninterrupted run."


def uninterrupted(raw: Path, folder: Path, *options: str) -> tuple[dict[str, bytes], float]:
    started = time.perf_counter()
    code, said = finish(start(raw, folder / "fresh", *options))
    assert code == 0, said
    return contents(folder / "fresh"), time.perf_counter() - started


def workers(raw: Path, folder: Path, n: int) -> Iterator[str]:
    """Send SIGKILL to single workers at random times of runs with two workers."""
    fresh, _ = uninterrupted(raw, folder)
    rng, same, killed, runs = np.random.default_rng(1), 0, 0, 0
    while killed < n:
        out = folder / f"workers {runs}"
        process = start(raw, out, "--workers", "2")
        while process.poll() is None:
            time.sleep(rng.uniform(0.5, 2.0))
            try:
                children = psutil.Process(process.pid).children()
                found = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            except psutil.NoSuchProcess:  # it has just ended
                continue
            # two kills per run: a field is given up after three deaths
            if found and killed < 2 * (runs + 1):
                found[int(rng.integers(len(found)))].kill()
                killed += 1
        code, said = finish(process)
        runs += 1
        same += code == 0 and contents(out) == fresh
        if code:
            yield f"run {runs}: exit {code}: {said[-300:]}"
        shutil.rmtree(out)
    yield f"SIGKILL of {killed} workers in {runs} runs: {same} of {runs} equal an undisturbed run."


def damage(raw: Path, folder: Path, n: int) -> Iterator[str]:
    """Flip one bit at a random position in each kind of intermediate file."""
    fresh, _ = uninterrupted(raw, folder)
    rng = np.random.default_rng(2)
    kinds = sorted(
        {path.name for path in (folder / "fresh" / results.FIELDS).rglob("*") if path.is_file()} - {"progress.json"}
    )
    yield "| file | flipped bits after which results were the same |\n|---|---|"
    for kind in kinds:
        same = 0
        for _ in range(n):
            out = shutil.copytree(folder / "fresh", folder / "damaged")
            (out / results.RUN).unlink()
            paths = sorted(path for path in (out / results.FIELDS).rglob(kind))
            path = paths[rng.integers(len(paths))]
            data = bytearray(path.read_bytes())
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            merfish.run(raw, out=out)
            same += contents(out) == fresh
            shutil.rmtree(out)
        yield f"| {kind} | {same} of {n} |"


def disk(raw: Path, folder: Path, n: int) -> Iterator[str]:
    """Run on a file system that is full at n times, and then has space again."""
    fresh, _ = uninterrupted(raw, folder)
    needed = sum(path.stat().st_size for path in (folder / "fresh").rglob("*") if path.is_file())
    said_once = same = full = 0
    for k in range(n):
        mount = folder / f"disk {k}"
        mount.mkdir()
        size = int(needed * (k + 0.5) / n) // 4096 * 4096 + 65536
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
        try:
            code, said = finish(start(raw, mount / "out", *(("--workers", "2") if k % 2 else ())))
            full += code != 0
            said_once += code == 0 or (code == 2 and "disk is full" in said and len(said.splitlines()) == 1)
            if code and not (code == 2 and len(said.splitlines()) == 1 and "disk is full" in said):
                yield f"{size} bytes: exit {code}: {said[-400:]}"
            subprocess.run(["mount", "-o", f"remount,size={3 * needed}", str(mount)], check=True)
            code, said = finish(start(raw, mount / "out"))
            same += code == 0 and contents(mount / "out") == fresh
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    yield f"Disk full at {full} of {n} sizes: one error message, or no error, in {said_once}; "
    yield f"the same bytes after space was freed in {same} of {n}."


def routes(raw: Path, folder: Path) -> Iterator[str]:
    """Check that results do not depend on how they are computed."""
    fresh, _ = uninterrupted(raw, folder)
    ways: dict[str, list[tuple[str, ...]]] = {
        "field 0, then all": [("--fov", "0"), ()],
        "fields 1-2, then field 0, then all": [("--fov", "1-2"), ("--fov", "0"), ()],
        "all, then field 0": [(), ("--fov", "0")],
        "one worker, then two for another half": [("--fov", "0-1", "--workers", "1"), ("--workers", "2")],
        "two workers": [("--workers", "2")],
    }
    yield "| route | same bytes as one run of all fields |\n|---|---|"
    for name, steps in ways.items():
        out = folder / name
        codes = [finish(start(raw, out, *options))[0] for options in steps]
        yield f"| {name} | {'yes' if not any(codes) and contents(out) == fresh else f'NO, exit codes {codes}'} |"


def hosts(raw: Path, folder: Path) -> Iterator[str]:
    """Run on a Dask scheduler with two workers in separate process groups, one of which is killed during the run."""
    fresh, _ = uninterrupted(raw, folder)
    host = "127.0.0.1"
    with socket.socket() as free:
        free.bind((host, 0))
        address = f"tcp://{host}:{free.getsockname()[1]}"

    def dask(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)

    scheduler = dask("dask_scheduler", "--host", host, "--port", address.rsplit(":")[-1], "--no-dashboard")
    group = [dask("dask_worker", address, "--nthreads", "1", "--no-dashboard", "--name", str(k)) for k in (0, 1)]
    try:
        time.sleep(5)
        out = folder / "two"
        process = start(raw, out, "--scheduler", address)
        while not list(out.glob(f"{results.FIELDS}/fov_*")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(group[0].pid, signal.SIGKILL)
        code, said = finish(process)
        same = code == 0 and contents(out) == fresh
        yield f"One of two workers killed during the run: {'same bytes' if same else f'exit {code}: {said[-500:]}'}."
    finally:
        for process in (*group[1:], scheduler):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


SLURM = """jobqueue:
  slurm:
    cores: 1
    processes: 1
    memory: 4GB
    walltime: '01:00:00'
    interface: lo
    log-directory: {folder}
"""


def slurm(raw: Path, folder: Path) -> Iterator[str]:
    """Run two SLURM jobs, one of which is cancelled. Needs running slurmctld and slurmd, and dask-jobqueue."""
    fresh, _ = uninterrupted(raw, folder)
    (folder / "jobqueue.yaml").write_text(SLURM.format(folder=folder))
    os.environ["DASK_CONFIG"] = str(folder)
    out = folder / "slurm"
    process = start(raw, out, "--slurm", "2")
    while not list(out.glob(f"{results.FIELDS}/fov_*")) and process.poll() is None:
        time.sleep(0.05)
    jobs = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["scancel", *jobs[:1]], check=True)
    code, said = finish(process)
    same = code == 0 and contents(out) == fresh
    yield f"One of {len(jobs)} SLURM jobs cancelled: {'same bytes' if same else f'exit {code}: {said[-500:]}'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["inputs", "kills", "workers", "damage", "disk", "routes", "hosts"]
    )
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    parts: dict[str, Callable[[Path, Path], Iterator[str]]] = {
        "inputs": inputs,
        "kills": lambda raw, folder: kills(raw, folder, options.kills),
        "workers": lambda raw, folder: workers(raw, folder, options.kills // 2),
        "damage": lambda raw, folder: damage(raw, folder, max(options.kills // 10, 1)),
        "disk": lambda raw, folder: disk(raw, folder, max(options.kills // 5, 1)),
        "routes": routes,
        "hosts": hosts,
        "slurm": slurm,
    }
    page = RESULTS / "faults.md"
    known = dict(part.split("\n\n", 1) for part in page.read_text().split("## ")[1:]) if page.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        raw = simulate_experiment(Path(scratch) / "raw", fields=(1, 3), shape=(160, 160), drift=2.0, seed=5)
        for name in options.only:
            folder = Path(scratch) / name
            folder.mkdir()
            lines = []
            for line in parts[name](raw, folder):
                print(line, flush=True)
                lines.append(line)
            known[name] = f"{parts[name].__doc__ or ''}\n\n".lstrip() + "\n".join(lines) + "\n\n"
    text = "".join(f"## {name}\n\n{known[name].strip()}\n\n" for name in parts if name in known)
    page.write_text(f"Made by `python benchmarks/faults.py --kills {options.kills}`.\n\n{text.strip()}\n")


if __name__ == "__main__":
    main()
