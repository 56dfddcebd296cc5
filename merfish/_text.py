"""Text from untrusted files: read within limits and escaped before printing."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from merfish.errors import InputError

MAX_TABLE = 1 << 24  # bytes; the largest tables in use have about 100 kB
_MOST_LISTED = 5
_SHOWN = 80  # maximum number of characters of a value in a message
# Characters that a terminal interprets instead of printing: C0 and C1 controls and marks of writing direction; and
# lone surrogates, which come from file names that are not UTF-8 and cannot be encoded.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_ENDS = "\t\n\r"


def read_text(path: str | os.PathLike[str], what: str, limit: int = MAX_TABLE) -> str:
    """Read the text of a table; ``what`` names it in messages.

    Raises InputError if ``path`` is not a path, and if the file is not regular, exceeds ``limit`` bytes, is not UTF-8,
    or has control characters.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected the path of the {what}, got {type(path).__name__}")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: expected the {what}, a regular file; got {kind_of(status)}")
        if status.st_size > limit:
            raise InputError(f"{path}: {status.st_size} bytes, the {what} has at most {limit}")
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"{path}: the {what} is not UTF-8 text: {error}") from error
        raise InputError(f"{path}: cannot read the {what}: {getattr(error, 'strerror', None) or error}") from error
    for found in _UNSHOWN.finditer(text):
        if found[0] not in _LINE_ENDS:
            line = text.count("\n", 0, found.start()) + 1
            raise InputError(f"{path}: line {line}: found the control character {found[0]!r}, expected plain text")
    return text


def kind_of(status: os.stat_result) -> str:
    """Name the type of a file, for messages."""
    kinds = {
        "a folder": stat.S_ISDIR,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
        "a file": stat.S_ISREG,
    }
    return next((name for name, holds in kinds.items() if holds(status.st_mode)), "something else")


def has_control(text: str) -> bool:
    """Whether a name has control characters, or characters that cannot be encoded."""
    return _UNSHOWN.search(text) is not None


def printable(text: str) -> str:
    """Escape the control characters of a text, except line ends.

    >>> printable("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return _UNSHOWN.sub(lambda found: found[0] if found[0] in "\t\n" else ascii(found[0])[1:-1], text)


def shown(value: object) -> str:
    """Format a value for a message: its repr, truncated."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers with more digits than Python converts
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def counted(n: int, noun: str) -> str:
    """Format a number with a noun that has a regular plural.

    >>> counted(1, "blank"), counted(1200, "cell")
    ('1 blank', '1,200 cells')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """Join the first few items in one line, and count the others."""
    more = len(items) - _MOST_LISTED
    return separator.join(items[:_MOST_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")
