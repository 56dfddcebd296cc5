"""Others' files in and out, one module a format; plain functions ``read_*`` and ``write_*``."""
