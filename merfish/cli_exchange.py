"""Commands that import the formats of other tools and export to them."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from merfish._text import counted
from merfish.errors import InputError

table_app = typer.Typer(help="Import tables of counts from other instruments.", no_args_is_help=True)


class Kind(StrEnum):
    """Instruments and formats that can be imported."""

    merscope = "merscope"
    xenium = "xenium"
    visium = "visium"
    slideseq = "slideseq"
    cosmx = "cosmx"
    csv = "csv"


def exchange_function(verb: str, name: str) -> Callable[..., Any]:
    """Function ``read_NAME`` or ``write_NAME`` of a format in `merfish.exchange`."""
    module = import_module(f"merfish.exchange.{'plain' if name == 'csv' else name}")
    function: Callable[..., Any] = getattr(module, f"{verb}_{name}")
    return function


@table_app.command("import")
def table_import(
    kind: Annotated[Kind, typer.Argument(help="Instrument or format.")],
    path: Annotated[Path, typer.Argument(help="Output folder of the instrument.", metavar="PATH")],
    out: Annotated[Path, typer.Option(help="AnnData file to write, with counts and coordinates [µm].")],
    microns_per_pixel: Annotated[
        float | None,
        typer.Option(help="Pixel size [µm]; only for slideseq (default 0.65), cosmx (0.12028) and csv (1).", min=1e-6),
    ] = None,
) -> None:
    """Read the output folder of an instrument into an AnnData file, the input of 'spatialvae train'."""
    from merfish._files import whole_file

    read = exchange_function("read", kind)
    scaled = kind in (Kind.slideseq, Kind.cosmx, Kind.csv)
    if microns_per_pixel is not None and not scaled:
        raise InputError(f"--microns-per-pixel: {kind.value} files contain their own scale; omit the option")
    adata = read(path) if microns_per_pixel is None else read(path, microns_per_pixel)
    with whole_file(out) as part:
        adata.write_h5ad(part, compression="gzip")
    blanks = int(adata.var["is_blank"].sum())
    found = (adata.n_obs, "cell"), (adata.n_vars - blanks, "gene"), (blanks, "control feature")
    print(f"{', '.join(counted(n, noun) for n, noun in found)} in {out}")


def assign(
    out: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="DIR")],
    segmentation: Annotated[
        Path,
        typer.Option(
            help="Polygons (.geojson, .parquet, Baysor's, proseg's) in micrometres, or a folder with a label image "
            "(.tif, .npy, .zarr, Cellpose's _seg.npy) or polygons in pixels for each field."
        ),
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes. [default: this process alone]")
    ] = None,
) -> None:
    """Assign the molecules of a finished run to cells from another segmentation; nothing is decoded again."""
    from merfish.pipeline.assign import assign

    figures = assign(out, segmentation, workers=workers, progress=True)
    cells = counted(figures["n_cells"], "cell")
    print(f"{cells} from {segmentation}, with {figures['share_in_cells']:.1%} of the molecules")


class Format(StrEnum):
    """Formats that can be exported."""

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
            help="merscope, csv: a folder; spatialdata: a Zarr store; baysor: a CSV file; geojson: outlines of cells."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File or folder to write; must not exist.")],
) -> None:
    """Write the results of a run in the format of another tool."""
    from merfish import results
    from merfish._files import whole_file

    results.read_run(run)
    if out.exists():
        raise InputError(f"{out}: already exists; give a new path, or remove it")
    more = {}
    if format is Format.spatialdata:
        from merfish.mosaic import section_images

        more["images"] = section_images(run)
    with whole_file(out) as part:
        exchange_function("write", format)(run, part, **more)
    print(f"{run} as {format.value} in {out}")
