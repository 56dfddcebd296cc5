"""MERFISH image stacks to molecules, cells and counts.

>>> import merfish
>>> book = merfish.mhd4_codebook(["ACTB", "GAPDH", "MALAT1"])
>>> book.n_words, book.n_bits
(140, 16)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merfish.codebook import Codebook, check_codebook, mhd4_codebook, read_codebook, write_codebook
    from merfish.config import RunConfig
    from merfish.errors import InputError
    from merfish.pipeline import run
    from merfish.simulate import simulate_experiment, simulate_stack
    from merfish.stack import decode

__version__ = version("merfish")

# Imported on first use, so that the command line starts without importing Numba and AnnData.
_HOME = {
    "Codebook": "merfish.codebook",
    "check_codebook": "merfish.codebook",
    "mhd4_codebook": "merfish.codebook",
    "read_codebook": "merfish.codebook",
    "write_codebook": "merfish.codebook",
    "RunConfig": "merfish.config",
    "InputError": "merfish.errors",
    "decode": "merfish.stack",
    "run": "merfish.pipeline",
    "simulate_experiment": "merfish.simulate",
    "simulate_stack": "merfish.simulate",
}

__all__ = [
    "Codebook",
    "InputError",
    "RunConfig",
    "check_codebook",
    "decode",
    "mhd4_codebook",
    "read_codebook",
    "run",
    "simulate_experiment",
    "simulate_stack",
    "write_codebook",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'merfish' has no attribute {name!r}")
