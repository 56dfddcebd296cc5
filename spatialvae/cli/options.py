"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Table = Annotated[Path, typer.Argument(help="AnnData file with counts.", metavar="TABLE.h5ad")]
Labels = Annotated[str, typer.Option(help="Column of obs with the type or domain of each cell.", metavar="KEY")]
Places = Annotated[str, typer.Option(help="Key of the coordinates in obsm.", metavar="KEY")]
Sections = Annotated[str | None, typer.Option(help="Column of obs with the section of each cell.", metavar="KEY")]
