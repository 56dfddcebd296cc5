"""Progress of long work on the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialvae.training import Report, Row


@contextmanager
def training_bar(steps: int, visible: bool) -> Iterator[Report]:
    """A bar for at most ``steps`` of training; yields the function that updates it from a row of the log."""
    from rich.progress import Progress

    with Progress(disable=not (visible and _is_watched()), transient=True) as progress:
        task = progress.add_task("training", total=steps)

        def report(row: Row) -> None:
            bound = row.get("evidence_validation", row["elbo_train"])
            progress.update(task, completed=row["step"], description=f"training, {bound:.2f} nats per cell")

        yield report


@contextmanager
def waiting(what: str, visible: bool) -> Iterator[None]:
    """A moving bar and the time since the start, for work of unknown length."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not (visible and _is_watched()), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _is_watched() -> bool:
    """Whether the output is a terminal or a notebook; to a file, bars would write empty lines."""
    from rich import get_console

    console = get_console()
    return console.is_terminal or console.is_jupyter
