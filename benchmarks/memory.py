"""The memory of a process, as Linux counts it."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Most memory of this process since it began or `forget_peak`; `resource.getrusage` adds its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> int:
    """Let `peak_bytes` begin at the present memory of this process, which is returned, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
