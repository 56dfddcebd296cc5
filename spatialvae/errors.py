"""The exception for errors in the input, which users can correct."""

from __future__ import annotations

from numbers import Integral


class InputError(ValueError):
    """Bad input: a table, key, option or model folder that cannot be used as it is.

    The message names the key, row or file, the value received and what was expected. The command line prints it
    alone and exits with 2.
    """


def check_count(name: str, value: object, advice: str = "") -> None:
    """Raise InputError unless ``value``, the argument ``name``, is a whole number of at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least 1{advice}")
