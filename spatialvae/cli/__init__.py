"""The ``spatialvae`` command: train models on tables, and use trained models."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from spatialvae.cli.distribution import evaluate, sample
from spatialvae.cli.tissue import dependence, latent, neighbours
from spatialvae.cli.training import embed, report, train
from spatialvae.errors import InputError

app = typer.Typer(
    help="Embed cells and their neighbourhoods.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" parses units such as [px] as styles and drops them
)
for command in (train, embed, neighbours, dependence, report, evaluate, sample):
    app.command()(command)
plot = typer.Typer(help="Draw figures of an embedded table.", no_args_is_help=True)
plot.command()(latent)
app.add_typer(plot, name="plot")


def show_versions(asked: bool) -> None:
    """Print the versions that results depend on, without importing large packages, and exit."""
    if not asked:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    typer.echo(f"spatialvae {version('merfish')} (of the package merfish)")
    typer.echo(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "numba", "torch", "torch-geometric"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    raise typer.Exit


@app.callback()
def spatialvae(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_versions, help="Show versions and exit.")
    ] = False,
) -> None:
    """Embed cells and their neighbourhoods."""


def main() -> None:
    """Run the command line. Invalid input ends with one message and exit code 2; a warning is printed on one line."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(2)
