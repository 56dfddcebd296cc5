"""Exceptions for invalid input."""


class InputError(ValueError):
    """Invalid input: a file, table, option or array that cannot be used as it is.

    The message names the file, row or field, the value received and what was expected. Command lines print only the
    message and exit with code 2.
    """


class CodebookMisfit(InputError):
    """The images do not fit the words of the codebook; command lines exit with code 3."""
