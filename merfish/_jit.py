"""Numba options of this package.

``fastmath`` is off where NaN or the order of sums matters: the kernels are memory-bound, and results must be the same
in every run. On-disk caching is safe because no kernel is compiled inside a worker's fork (numba#4807).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numba
from numba.core import event

PARTS = 4  # for each thread, so that no thread waits long for the last one

kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")
# for sums of products of images: fused multiply-add is faster and more accurate
fused_kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
jitable: Callable[..., Any] = numba.extending.register_jitable  # for functions that Python and kernels call


class _Once(event.Listener):
    """Report the first compilation by Numba."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say: Callable[[str], None] | None = say

    def on_start(self, event: Any) -> None:
        if self.say is not None:
            say, self.say = self.say, None
            say("compiling for this machine; this is done once and takes about half a minute")

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def compilation_said(say: Callable[[str], None]) -> Iterator[None]:
    """Call ``say`` when this process first compiles a kernel that is not in Numba's cache."""
    with event.install_listener("numba:compile", _Once(say)):
        yield


def map_bits(work: Callable[[Any], Any], stack: Any) -> list[Any]:
    """Call ``work`` for each bit of a stack, or item of a sequence, on as many threads as Numba.

    ``work`` must not start threads itself.
    """
    threads = min(numba.get_num_threads(), len(stack))
    if threads <= 1:
        return [work(stack[bit]) for bit in range(len(stack))]
    with ThreadPoolExecutor(threads) as pool:  # a forked process would lack the threads of a permanent pool
        return list(pool.map(lambda bit: work(stack[bit]), range(len(stack))))


def in_parts(work: Callable[[int, int], Any], n: int) -> None:
    """Call ``work(first, last)`` for ranges that together are range(n), on as many threads as Numba.

    ``work`` calls a kernel; kernels release the GIL. Numba's own parallel loops take seconds longer to compile.
    """
    threads = numba.get_num_threads()
    parts = 1 if threads == 1 else max(min(n, PARTS * threads), 1)
    ends = [k * n // parts for k in range(parts + 1)]
    map_bits(lambda part: work(*part), list(pairwise(ends)))
