"""Run a map over fields: in this process, in processes of this machine, on a Dask cluster, or in SLURM jobs.

All of these call the same function on the same fields, so that results do not depend on the choice. If a field raises
an exception or its worker dies, its result is a `Failure`; the others continue.
"""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import signal
import tempfile
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from merfish.errors import InputError

MOST_DEATHS = 3  # a field is given up after this many deaths of its worker
CONNECT_SECONDS = 30.0  # to wait for a scheduler
PART_SECONDS = 5.0  # to wait for an idle process to end

Work = Callable[[int], Any]
RunMap = Callable[[Work, Sequence[int]], Iterator[tuple[int, Any]]]


@dataclass(frozen=True)
class Failure:
    """The reason why a field gave no result; ``traceback`` is empty if its data are at fault."""

    reason: str
    traceback: str = ""
    disk_full: bool = False


def cores() -> int:
    """Return the number of cores available to this process; more processes than that only use more memory."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StepError(RuntimeError):
    """A step failed on a field whose images were decoded."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure


@contextmanager
def run_map_on(
    workers: int | None = None,
    scheduler: str | None = None,
    slurm_jobs: int | None = None,
    shared: Path | None = None,
) -> Iterator[RunMap]:
    """Yield a function (work, fields) -> iterator of (field, result or `Failure`), in order of completion.

    workers: number of processes on this machine, at most one per core; None: this process, whose kernels use all cores.
    scheduler: address of a running Dask scheduler. slurm_jobs: number of SLURM jobs, each as configured for
    dask-jobqueue; shared: a folder that all of them can access.
    """
    if scheduler is not None or slurm_jobs is not None:
        with _dask_client(scheduler, slurm_jobs, shared) as client:
            yield lambda work, items: _map_on_dask(client, work, items)
    elif workers is not None:
        pool = _Processes(workers)
        try:
            yield pool.map
        finally:
            pool.close()
    else:
        yield lambda work, items: ((item, attempt(work, item)) for item in items)


def attempt(work: Work, item: int) -> Any:
    """Return the result of ``work`` for an item, or a `Failure` if it raises."""
    try:
        return work(item)
    except InputError as error:
        return Failure(str(error).removeprefix(f"field {item}: "))
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc(), is_disk_full(error))


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk is full; HDF5, Arrow and NumPy only say so in the message."""
    words = ("No space left", "errno = 28", "requested and")
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words)


# --- processes of this machine, over pipes, so that no port is opened -------------------------------------------


@dataclass(eq=False)
class _Worker:
    """A process, this end of its pipe, and the number of the last work sent to it."""

    process: Any
    connection: Connection
    knows: int = 0


class _Processes:
    """Processes that are started when needed, and restarted when they die."""

    def __init__(self, number: int) -> None:
        self.number = min(number, cores())
        self.idle: list[_Worker] = []
        self.busy: dict[_Worker, int] = {}
        self.works = 0

    def map(self, work: Work, items: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Implement `run_map_on`. An item whose worker dies is tried again, three times in all."""
        self.works += 1
        waiting, deaths = deque(items), Counter[int]()
        while waiting or self.busy:
            while waiting and len(self.busy) < self.number:
                self._hand_out(work, waiting.popleft())
            for worker in self._reported():
                item = self.busy.pop(worker)
                try:
                    outcome = worker.connection.recv()
                except (EOFError, OSError):
                    self._end(worker)
                    deaths[item] += 1
                    if deaths[item] < MOST_DEATHS:
                        waiting.append(item)
                        continue
                    outcome = Failure(f"its worker died {MOST_DEATHS} times (killed, or out of memory)")
                else:
                    self.idle.append(worker)
                yield item, outcome

    def _hand_out(self, work: Work, item: int) -> None:
        worker = self.idle.pop() if self.idle else self._start()
        self.busy[worker] = item
        try:
            if worker.knows != self.works:
                worker.connection.send(work)
                worker.knows = self.works
            worker.connection.send(item)
        except OSError:
            pass  # the worker died; `map` notices it when it reads the result

    def _reported(self) -> list[_Worker]:
        by_connection = {worker.connection: worker for worker in self.busy}
        return [by_connection[connection] for connection in wait(list(by_connection))]  # type: ignore[index]

    def _start(self) -> _Worker:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        threads = max(1, cores() // self.number)
        process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()

    def close(self) -> None:
        """End all processes, including busy ones."""
        for worker in self.idle:
            worker.connection.close()
        for worker in self.idle:
            worker.process.join(PART_SECONDS)  # lets its libraries release their resources
        for worker in [*self.idle, *self.busy]:
            self._end(worker)


def _serve(connection: Connection, threads: int) -> None:
    """Run a worker: it receives functions, and items to apply the last function to. It ends with its parent."""
    import numba
    import pyarrow as pa

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    pa.set_cpu_count(threads)
    work: Work | None = None
    while True:
        try:
            message = connection.recv()
            if callable(message):
                work = message
            elif work is not None:
                connection.send(attempt(work, message))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# --- Dask ---------------------------------------------------------------------------------------------------------


@contextmanager
def _dask_client(scheduler: str | None, slurm_jobs: int | None, shared: Path | None) -> Iterator[Any]:
    from distributed import Client

    if slurm_jobs is not None:
        with _slurm_cluster(slurm_jobs, shared) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(
            f"--scheduler {scheduler!r}: no Dask scheduler answers there ({error or type(error).__name__}); expected "
            "an address such as tcp://10.0.0.1:8786"
        ) from error
    with client:
        yield client


@contextmanager
def _slurm_cluster(jobs: int, shared: Path | None) -> Iterator[Any]:
    try:
        import cryptography  # noqa: F401 -- for the certificates below
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise InputError("--slurm needs dask-jobqueue and cryptography: pip install 'merfish[cluster]'") from None
    # certificates for this run only, so that nobody else on the network can control its workers
    with tempfile.TemporaryDirectory(prefix=".tls.", dir=shared) as secrets:
        try:
            cluster = SLURMCluster(
                protocol="tls://",
                security=True,
                shared_temp_directory=secrets,
                scheduler_options={"dashboard_address": None},
            )
        except (ValueError, TypeError) as error:
            raise InputError(
                f"--slurm: dask-jobqueue cannot set up a job ({error}); set at least cores and memory under "
                "jobqueue: slurm: in ~/.config/dask/jobqueue.yaml"
            ) from error
        with cluster:
            cluster.adapt(minimum_jobs=1, maximum_jobs=jobs)
            yield cluster


def _map_on_dask(client: Any, work: Work, items: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Send the work once; the scheduler holds only a few items per thread at any time."""
    from distributed import as_completed

    client.wait_for_workers(1)
    # a task, not scattered data: if the worker that holds it dies, the scheduler can recompute it on another
    shared = client.submit(_same, work, pure=False)
    waiting, suspects = deque(items), Counter[int]()

    def submit(item: int) -> Any:
        future = client.submit(_attempt_on_dask, shared, item, pure=False, key=f"field-{item}-{os.urandom(6).hex()}")
        of[future.key] = item
        return future

    of: dict[str, int] = {}
    ahead = 2 * max(1, sum(worker["nthreads"] for worker in client.scheduler_info()["workers"].values()))
    first = [submit(waiting.popleft()) for _ in range(min(ahead, len(waiting)))]
    running = as_completed(first, loop=client.loop)
    for future in running:
        item = of.pop(future.key)
        fault = future.exception() if future.status != "cancelled" else OSError("lost the connection to the scheduler")
        if fault is None:
            yield item, future.result()
        elif type(fault).__name__ == "KilledWorker" and not suspects[item]:
            # Dask blames all items queued on a worker for its death: retry each of them once
            suspects[item] += 1
            waiting.append(item)
        elif type(fault).__name__ == "KilledWorker":
            yield item, Failure("its workers died repeatedly (killed, or out of memory)")
        else:
            yield item, Failure(f"{type(fault).__name__}: {fault}")
        del future
        while waiting and len(of) < ahead:
            running.add(submit(waiting.popleft()))


def _same(work: Work) -> Work:
    return work


def _attempt_on_dask(work: Work, item: int) -> Any:
    import numba
    from distributed import get_worker

    if get_worker().state.nthreads > 1:
        numba.set_num_threads(1)
    return attempt(work, item)
