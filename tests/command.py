"""Run the command lines in the process of the tests."""

from __future__ import annotations

import sys

import merfish.cli


def call(monkeypatch, *arguments):
    """Return the exit code of ``merfish arguments``."""
    return exit_code(monkeypatch, merfish.cli.main, "merfish", arguments)


def call_spatialvae(monkeypatch, *arguments):
    """Return the exit code of ``spatialvae arguments``."""
    import spatialvae.cli

    return exit_code(monkeypatch, spatialvae.cli.main, "spatialvae", arguments)


def exit_code(monkeypatch, main, name, arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0
