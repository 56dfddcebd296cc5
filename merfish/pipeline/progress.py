"""Progress display and log of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merfish import results
from merfish._text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
log = logging.getLogger("merfish.run")


class Display:
    """One progress display with a line per step; silent if ``progress`` is None."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the time of a step, for the record."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def timings(self) -> dict[str, float]:
        """Return the seconds of each step so far, and their sum."""
        return {**self.seconds, "total": time.perf_counter() - self.started}

    def track(self, items: Iterable[T], total: int, name: str) -> Iterator[T]:
        """Yield items while a line shows the number done, the rate, and the remaining time."""
        if self.progress is None or not total:
            yield from items
            return
        task = self.progress.add_task(name, total=total, note="")
        for item in items:
            self.progress.advance(task)
            yield item

    def note(self, text: str) -> None:
        """Show ``text``, such as the number of molecules found so far, on the line of the current step."""
        if self.progress is not None and self.progress.tasks:
            self.progress.update(self.progress.tasks[-1].id, note=text)

    def say(self, text: str) -> None:
        """Print a line permanently, and log it."""
        log.info(text, extra={_PRINTED: True})
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False)


_PRINTED = "printed"  # marks log records that `Display.say` prints itself


class _Log(logging.FileHandler):
    """A log file. If it cannot be written, because the disk is full for example, the run continues silently."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Echo(logging.Handler):
    """Prints log records above the progress display."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _PRINTED):
            self.progress.console.print(printable(record.getMessage()), markup=False, highlight=False)


@contextmanager
def display(out: Path, show: bool, verbose: bool = False) -> Iterator[Display]:
    """Yield a `Display`, shown if ``show``, with a log in ``out``; ``verbose`` prints the log as well."""
    handler = _Log(out / results.LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    echo: _Echo | None = None
    before, log.propagate = log.propagate, False
    level = log.level
    log.setLevel(logging.INFO)
    try:
        if not show:
            yield Display(None)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            if verbose:
                echo = _Echo(progress)
                log.addHandler(echo)
            yield Display(progress)
    finally:
        log.removeHandler(handler)
        handler.close()
        if echo is not None:
            log.removeHandler(echo)
        log.propagate = before
        log.setLevel(level)
