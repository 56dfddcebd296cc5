"""The memory of a process, as reported by Linux."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Return this process's peak memory since its start or `forget_peak`; `resource.getrusage` adds its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> int:
    """Reset `peak_bytes` to the present memory of this process, which is returned, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
