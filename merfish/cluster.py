"""Where fields run: in this process, in workers on this machine, or on a Dask cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def map_fields(
    work: Callable[[int], Any], fovs: Sequence[int], *, workers: int | None = None, scheduler: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (fov, result) as fields end; a field that raised yields its exception as the result.

    workers: processes on this machine, None = this process, where kernels use all cores. scheduler: address of a
    running Dask scheduler instead. A field whose worker dies is tried again elsewhere, three times in all.
    """
    if workers is None and scheduler is None:
        for fov in fovs:
            try:
                yield fov, work(fov)
            except Exception as error:
                yield fov, error
        return
    from distributed import Client, LocalCluster, as_completed

    if scheduler is not None:
        client, cluster = Client(scheduler), None
    else:
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        client = Client(cluster)
    try:
        task = _ShareCores(work, workers or 1) if scheduler is None else work
        futures = {client.submit(task, fov, pure=False, retries=0): fov for fov in fovs}
        for future in as_completed(futures):
            fault = future.exception()
            yield futures[future], future.result() if fault is None else fault
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


class _ShareCores:
    """Calls ``work`` with its share of the cores, so that workers on one machine do not get in each other's way."""

    def __init__(self, work: Callable[[int], Any], workers: int) -> None:
        self.work = work
        self.workers = workers

    def __call__(self, fov: int) -> Any:
        from numba import get_num_threads, set_num_threads

        set_num_threads(max(1, min(get_num_threads(), (os.cpu_count() or 1) // self.workers)))
        return self.work(fov)
