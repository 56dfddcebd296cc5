"""Exceptions for errors in the input, which users can correct."""


class InputError(ValueError):
    """Bad input: a file, table, option or array that cannot be used as it is.

    The message names the file, row or field, the value received and what was expected. Command lines print it
    alone and exit with 2.
    """


class CodebookMisfit(InputError):
    """The images do not fit the words of the codebook; command lines exit with 3."""
