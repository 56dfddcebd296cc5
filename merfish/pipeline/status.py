"""Progress of a run, read from its folder during the run or after it."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from merfish import results
from merfish._files import read_json
from merfish._text import counted
from merfish.errors import InputError
from merfish.pipeline import folder


def status_lines(out: Path) -> list[str]:
    """Describe the state of a run in a few lines. Raises InputError if ``out`` is not the folder of a run."""
    if not (out / results.FIELDS).is_dir():
        raise InputError(f"{out}: {'not' if out.is_dir() else 'no such folder; expected'} the folder of a run")
    holder = folder.is_held(out)
    lines = [f"running: {holder}" if holder else "no run is in progress"]
    try:
        progress = read_json(out / results.FIELDS / folder.PROGRESS)
    except InputError:
        progress = None
    if progress:
        lines.append(_decoded(progress, bool(holder)))
        lines += [f"field {fov} failed: {reason}" for fov, reason in progress["failed"].items()]
    return [*lines, *_results(out)]


def decoded_fields(out: Path) -> list[int]:
    """Return the fields whose results are in the folder of a run, even if it was interrupted."""
    folders = (out / results.FIELDS).glob("fov_*")
    return sorted(int(path.name.removeprefix("fov_")) for path in folders if path.name[4:].isdecimal())


def _decoded(progress: dict[str, float], running: bool) -> str:
    done, total = int(progress["done"]), int(progress["total"])
    line = f"{done} of {counted(total, 'field')} decoded"
    if not running or not 0 < done < total:
        return line
    left = (progress["time"] - progress["started"]) / done * (total - done) - (time.time() - progress["time"])
    return f"{line}, {datetime.timedelta(seconds=round(max(left, 0)))} left"


def _results(out: Path) -> list[str]:
    try:
        figures = results.read_run(out)["figures"]
    except InputError:
        return ["no results yet"]
    return [
        f"results: {counted(figures['n_fields'], 'field')}, {counted(figures['n_kept'], 'molecule')}, "
        f"{counted(figures['n_cells'], 'cell')}"
    ]
