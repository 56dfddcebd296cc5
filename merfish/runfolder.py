"""The folder of a run: one owner at a time, one set of parameters, fields whole or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merfish._files import whole_file
from merfish.errors import InputError

TRANSCRIPTS = "transcripts.parquet"
ALL_TRANSCRIPTS = "transcripts_all.parquet"
CELLS = "cells.parquet"
CELL_BY_GENE = "cell_by_gene.h5ad"
RUN = "run.json"
REPORT = "report.html"
CALIBRATION = "calibration.json"
_FIELDS = "fovs"
_PLAN = "plan.json"
_LOCK = ".lock"


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Make ``out`` and hold its lock. Raises InputError naming the holder if another run has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / _LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(
                f"{out}: another run is writing here: {lock.read().strip() or 'unknown process'}"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Remember what is computed here. Raises InputError if the folder holds fields computed with something else."""
    path = out / _FIELDS / _PLAN
    if path.is_file():
        before = json.loads(path.read_text())
        changed = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
        if changed:
            told = "; ".join(f"{key} was {before.get(key)!r}, is {plan.get(key)!r}" for key in changed)
            raise InputError(f"{out} holds fields of another run ({told}); choose another folder or remove this one")
    else:
        write_json(path, plan)


def field_folder(out: Path, fov: int) -> Path:
    """Where a field's results stand, whole or absent."""
    return out / _FIELDS / f"fov_{fov:04d}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1, default=float) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
