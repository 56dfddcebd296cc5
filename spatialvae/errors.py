"""The exception for errors in the input, which users can correct."""


class InputError(ValueError):
    """Bad input: a table, key, option or model folder that cannot be used as it is.

    The message names the key, row or file, the value received and what was expected. The command line prints it
    alone and exits with 2.
    """
