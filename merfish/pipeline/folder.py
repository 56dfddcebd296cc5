"""The files of a run: one process writes at a time, records are checked for damage, results are published together.

A record is a folder with files and ``record.json``, which contains digests of what they depend on and their checksums;
it is used only if both match. Results are staged beside the fields. If a run is killed after the stage is marked as
complete, the next command on the folder publishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from merfish import results
from merfish._files import file_record, flush, plain, read_json, sweep, whole_file, write_json
from merfish.errors import InputError

CALIBRATION = "calibration.json"
PROGRESS = "progress.json"
RECORD = "record.json"
_LOCK = ".lock"
_HOLDER = ".lock.holder"
_STAGED = ".staged"
_COMPLETE = "complete.json"
_WORK = ".work"


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Create ``out`` and hold its lock; publish or remove what a killed run left there.

    Raises InputError if another run holds the lock, naming its process, or if ``out`` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{out}: is a file; expected a folder or a new path") from None
    holder = out / _HOLDER
    lock = FileLock(out / _LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        told = holder.read_text(encoding="utf-8").strip() if holder.is_file() else ""
        raise InputError(
            f"{out}: another run is writing to this folder ({told or 'unknown process'}); wait until it ends, or "
            "choose another folder"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        finish_publication(out)
        remove_work(out)
        for folder in (out, out / results.FIELDS, out / results.IMAGES):
            sweep(folder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_held(out: Path) -> str:
    """Return the process that is writing to ``out``, empty if there is none."""
    if not (out / _LOCK).is_file():
        return ""
    lock = FileLock(out / _LOCK, blocking=False)
    try:
        with lock:
            return ""
    except Timeout:
        return (out / _HOLDER).read_text(encoding="utf-8").strip() if (out / _HOLDER).is_file() else "unknown process"


# --- records ------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value; equal values have equal digests."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


@contextmanager
def new_record(folder: Path, parts: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write a record atomically: yields the folder for its files, and a dictionary for its other contents.

    parts: digests of what the record depends on, by name.
    """
    with whole_file(folder) as part:
        part.mkdir()
        says: dict[str, Any] = {}
        yield part, says
        files = {path.name: file_record(path)["sha256"] for path in sorted(part.iterdir()) if path.is_file()}
        content = plain({"parts": dict(parts), "files": files, **says})
        (part / RECORD).write_text(json.dumps({"sha256": digest(content), "content": content}), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the contents of a record, with its parts and files; None if it is missing or damaged."""
    says = read_checked(folder / RECORD)
    if says is None:
        return None
    try:
        whole = all(file_record(folder / name)["sha256"] == found for name, found in says["files"].items())
    except OSError:
        return None
    return says if whole else None


def said(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a record, without its parts and files."""
    return {name: value for name, value in record.items() if name not in ("parts", "files")}


def write_checked(path: Path, content: Any) -> None:
    """Write JSON with its checksum."""
    content = plain(content)
    write_json(path, {"sha256": digest(content), "content": content})


def read_checked(path: Path) -> Any:
    """Read what `write_checked` wrote; None if it is missing or damaged."""
    try:
        found = read_json(path)
        return found["content"] if found["sha256"] == digest(found["content"]) else None
    except (InputError, KeyError, TypeError, RecursionError):
        return None


# --- temporary files of the steps after decoding ---------------------------------------------------------------


def new_work(out: Path) -> Path:
    """Return an empty folder for temporary files."""
    remove_work(out)
    work = out / results.FIELDS / _WORK
    work.mkdir(parents=True)
    return work


def remove_work(out: Path) -> None:
    """Remove the temporary files of a step or a killed run."""
    shutil.rmtree(out / results.FIELDS / _WORK, ignore_errors=True)


# --- results ------------------------------------------------------------------------------------------------------


def new_stage(out: Path) -> Path:
    """Return an empty folder, in which results are written before they are published."""
    stage = out / _STAGED
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def publish(out: Path) -> None:
    """Replace the results of an earlier run by all staged results. The run may be killed at any moment."""
    stage = out / _STAGED
    names = sorted(path.name for path in stage.iterdir())
    for name in names:
        flush(stage / name)
    write_json(stage / _COMPLETE, names)
    finish_publication(out)


def finish_publication(out: Path) -> None:
    """Publish a complete stage; remove an incomplete one. The record is moved last, so it implies all other files."""
    stage = out / _STAGED
    if (stage / _COMPLETE).is_file():
        names = read_json(stage / _COMPLETE)
        if (stage / results.RUN).exists():
            (out / results.RUN).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == results.RUN):
            if (stage / name).exists():
                if (out / name).is_dir():  # a folder cannot replace another
                    shutil.rmtree(out / name)
                (stage / name).replace(out / name)
    shutil.rmtree(stage, ignore_errors=True)


# --- progress -----------------------------------------------------------------------------------------------------


def write_progress(out: Path, started: float, done: int, total: int, failed: Mapping[int, str]) -> None:
    """Record the progress of the fields for ``merfish status``; no later step reads it."""
    path = out / results.FIELDS / PROGRESS
    part = path.with_suffix(".part")
    path.parent.mkdir(exist_ok=True)
    said = {"started": started, "time": time.time(), "done": done, "total": total, "failed": failed}
    part.write_text(json.dumps(plain(said)))
    part.replace(path)
