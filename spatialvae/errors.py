"""The exception for invalid input, and a check of counts."""

from __future__ import annotations

from numbers import Integral


class InputError(ValueError):
    """Invalid input: a table, key, option or model folder that cannot be used.

    The message names the key, row or file, the value received and the value expected. The command line prints only the
    message and exits with code 2.
    """


def check_count(name: str, value: object, advice: str = "") -> None:
    """Raise InputError unless ``value``, the argument ``name``, is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least 1{advice}")
