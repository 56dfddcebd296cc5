"""Commands that bring others' files in and take results out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from merfish.errors import InputError

table_app = typer.Typer(help="Tables of counts from others' folders.", no_args_is_help=True)


class Kind(StrEnum):
    """Whose folder it is."""

    merscope = "merscope"
    xenium = "xenium"
    visium = "visium"
    slideseq = "slideseq"
    cosmx = "cosmx"
    csv = "csv"


@table_app.command("import")
def table_import(
    kind: Annotated[Kind, typer.Argument(help="Whose folder it is.")],
    path: Annotated[Path, typer.Argument(help="The folder.")],
    out: Annotated[Path, typer.Option(help="AnnData file to write: counts, and places in micrometre.")],
    microns_per_pixel: Annotated[
        float | None,
        typer.Option(help="Of slideseq (0.65 when not given), cosmx (0.12028) and csv (1) only.", min=1e-6),
    ] = None,
) -> None:
    """Read a vendor's folder into TABLE.h5ad, which `spatialvae train` takes."""
    from importlib import import_module

    from merfish._files import whole_file

    module = import_module(f"merfish.exchange.{'plain' if kind is Kind.csv else kind.value}")
    read = getattr(module, f"read_{kind.value}")
    scaled = kind in (Kind.slideseq, Kind.cosmx, Kind.csv)
    if microns_per_pixel is not None and not scaled:
        raise InputError(f"--microns-per-pixel: {kind.value} states its own scale; leave the option out")
    adata = read(path) if microns_per_pixel is None else read(path, microns_per_pixel)
    with whole_file(out) as part:
        adata.write_h5ad(part, compression="gzip")
    blanks = int(adata.var["is_blank"].sum())
    print(f"{adata.n_obs:,} cells, {adata.n_vars - blanks:,} genes and {blanks:,} control features in {out}")


def assign(
    out: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="DIR")],
    segmentation: Annotated[
        Path,
        typer.Option(
            help="Polygons (.geojson, .parquet, Baysor's, proseg's) in micrometre; or a folder with a label image "
            "(.tif, .npy, .zarr, Cellpose's _seg.npy) or polygons in pixels for each field."
        ),
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; this one when not given.")] = None,
) -> None:
    """Put the molecules of a finished run into others' cells; nothing is decoded again."""
    from merfish.pipeline.assign import assign

    figures = assign(out, segmentation, workers=workers, progress=True)
    print(
        f"{figures['n_cells']:,} cells of {segmentation}, {figures['share_in_cells']:.1%} of the molecules lie in them"
    )


class Format(StrEnum):
    """What results are written as."""

    merscope = "merscope"
    spatialdata = "spatialdata"
    csv = "csv"
    baysor = "baysor"
    geojson = "geojson"


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="DIR")],
    format: Annotated[
        Format,
        typer.Option(
            help="merscope, csv: a folder; spatialdata: a Zarr store; baysor: a CSV; geojson: outlines of cells."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File or folder to write; must not exist.")],
) -> None:
    """Write the results of a run in the format of other tools, whole or not at all."""
    from importlib import import_module

    from merfish import results
    from merfish._files import whole_file

    results.read_run(run)
    if out.exists():
        raise InputError(f"{out}: exists already; name a new path, or remove it")
    module = import_module(f"merfish.exchange.{'plain' if format is Format.csv else format.value}")
    more = {}
    if format is Format.spatialdata:
        from merfish.mosaic import section_images

        more["images"] = section_images(run)
    with whole_file(out) as part:
        getattr(module, f"write_{format.value}")(run, part, **more)
    print(f"{run} as {format.value} in {out}")
