"""Guides: Markdown files that ship with the package, read by ``merfish guide`` and built into a site.

Tests run their code blocks in this order, in one folder.
"""

from __future__ import annotations

from pathlib import Path

from merfish._text import shown
from merfish.errors import InputError

GUIDES = (
    "getting-started",
    "decode",
    "misidentification",
    "segmentation",
    "embedding",
    "sampling",
    "comparing",
    "slurm",
)


def read_guide(name: str) -> str:
    """Read the Markdown of a guide. Raises InputError for a name that is not in `GUIDES`."""
    if name not in GUIDES:
        raise InputError(f"guide {shown(name)}: expected one of {', '.join(GUIDES)}")
    return (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")


def guide_titles() -> dict[str, str]:
    """Return the title of each guide by its name, in reading order."""
    return {name: read_guide(name).split("\n", 1)[0].removeprefix("# ") for name in GUIDES}
