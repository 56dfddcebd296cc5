"""Every Numba option of this package, once.

``fastmath`` stays off where NaN or the order of sums matters: the kernels are memory-bound, and results must be
the same on every run. On-disk caching is safe here because no kernel is compiled inside a worker's fork (numba#4807).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba

kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")
parallel_kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)
# sums of products, of images: fused multiply-add is faster and rounds less
fused_kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
prange = numba.prange


def map_bits(work: Callable[[Any], Any], stack: Any) -> list[Any]:
    """``work`` on each bit of a stack, on all of Numba's threads; it must not call parallel kernels."""
    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        return list(pool.map(lambda bit: work(stack[bit]), range(len(stack))))
