"""The ``merfish`` command: parses options, calls the library, prints results.

Modules that take long to import are imported in the functions that use them, so that ``--help`` is fast.
"""

from __future__ import annotations

import re
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from merfish import cli_exchange
from merfish._text import counted, listed, printable
from merfish.errors import CodebookMisfit, InputError

# Exit codes
BAD_INPUT = 2
FAILED_FIELDS = 3  # some fields could not be decoded, or the images do not fit the codebook
INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
MOST_FIELDS = 1_000_000  # larger field numbers are regarded as typing errors
MOST_PIXELS = 100_000  # larger numbers of rows or columns are regarded as typing errors

app = typer.Typer(
    help="Decode MERFISH image stacks into molecules, cells and counts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" takes units such as [px] for styles and drops them
)
codebook_app = typer.Typer(help="Build, check and show codebooks.", no_args_is_help=True)
app.add_typer(codebook_app, name="codebook")
app.add_typer(cli_exchange.table_app, name="table")

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="DIR")]
BookFile = Annotated[
    Path, typer.Argument(help="Codebook file (CSV, or the text format of merfishtools).", metavar="BOOK")
]


class Method(StrEnum):
    """Decoders."""

    spots = "spots"
    pixels = "pixels"
    hamming = "hamming"


def show_versions(asked: bool) -> None:
    """Print the versions on which results depend, without importing the packages, and exit."""
    if not asked:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    print(f"merfish {version('merfish')}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "numba", "torch"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed")
    raise typer.Exit


@app.callback()
def merfish(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_versions, help="Show versions and exit.")
    ] = False,
) -> None:
    """Decode MERFISH image stacks into molecules, cells and counts."""


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except CodebookMisfit as error:
        stop(str(error), FAILED_FIELDS)
    except InputError as error:
        stop(str(error), BAD_INPUT)
    except OSError as error:
        stop(system_error(error), BAD_INPUT)
    except Interrupted:
        stop("interrupted", INTERRUPTED)


class Interrupted(BaseException):
    """Raised on Ctrl-C; Click would replace KeyboardInterrupt by "Aborted", which does not say how to resume."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def stop(message: str, code: int) -> None:
    """Print one message and exit with ``code``."""
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def system_error(error: OSError) -> str:
    """Message for a failed system call."""
    from merfish.pipeline.cluster import is_disk_full

    where = f"{error.filename}: " if error.filename else ""
    if is_disk_full(error):
        return f"{where}the disk is full ({error.strerror or error}). Free some space and run the same command again"
    return f"{where}{error.strerror or error}"


class OutCommand(TyperCommand):
    """A command whose argument OUT may be given as --out OUT, as in all other commands."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Remove the name of the option, so that its value becomes the argument."""
        return super().parse_args(ctx, [arg.removeprefix("--out=") for arg in args if arg != "--out"])


@app.command(cls=OutCommand)
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the results.", metavar="OUT")] = Path("demo_output"),
) -> None:
    """Run all steps on small data: real fields, a simulated tissue and its embedding; write OUT/report.html."""
    from merfish.demo import run_demo

    run_demo(out)


@app.command()
def decode(
    stack: Annotated[
        Path,
        typer.Argument(
            help="Registered stack: .npy, .tif, OME-TIFF or .zarr; axes bit,y,x or bit,z,y,x.", metavar="STACK"
        ),
    ],
    codebook: Annotated[Path, typer.Option(help="Codebook file.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    method: Annotated[Method, typer.Option(help="Decoder.")] = Method.spots,
    preprocess: Annotated[
        bool, typer.Option(help="Filter and normalise the stack; --no-preprocess if it is filtered already.")
    ] = True,
    misidentification_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Expected share of wrong molecules among those that are kept.")
    ] = 0.05,
) -> None:
    """Decode one registered stack into OUT/transcripts.parquet."""
    from merfish.pipeline.record import molecule_lines
    from merfish.pipeline.single import decode_file
    from merfish.report.notices import efficiency_line, leak_lines

    record = decode_file(
        stack,
        codebook,
        out,
        method=method.value,
        preprocess=preprocess,
        misidentification_rate=misidentification_rate,
    )
    lines = [*molecule_lines(record["figures"]), *efficiency_line(record), *leak_lines(record), f"results in {out}"]
    print(*lines, sep="\n")


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="Folder with the images and their tables.", metavar="EXPERIMENT")],
    out: Annotated[
        Path, typer.Option(help="Folder for the results; if it holds an interrupted run, the run is resumed.")
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with parameters; see 'merfish config'.")] = None,
    method: Annotated[Method | None, typer.Option(help="Decoder; overrides the configuration.")] = None,
    fov: Annotated[str | None, typer.Option(help="Fields to run, e.g. 0,3-5. [default: all]")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes, at most one per core. [default: one, which uses all cores]"),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running Dask scheduler, e.g. tcp://10.0.0.1:8786.")
    ] = None,
    slurm: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of SLURM jobs at a time; see 'merfish guide slurm'.")
    ] = None,
    data_organization: Annotated[
        Path | None, typer.Option(help="Table of channels. [default: EXPERIMENT/data_organization.csv]")
    ] = None,
    codebook: Annotated[Path | None, typer.Option(help="Codebook. [default: EXPERIMENT/codebook.csv]")] = None,
    positions: Annotated[Path | None, typer.Option(help="Stage positions. [default: EXPERIMENT/positions.csv]")] = None,
    microscope: Annotated[
        Path | None, typer.Option(help="Pixel size and orientation. [default: EXPERIMENT/microscope.json]")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out fields with faulty files instead of stopping.")
    ] = False,
    segmentation: Annotated[
        Path | None, typer.Option(help="Cells from another segmentation; see 'merfish assign'.")
    ] = None,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Save registered, filtered images as OME-Zarr in OUT/images.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check every file and estimate time, memory and disk space, without running."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the log, OUT/merfish.log.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and failed fields.")] = False,
    embed: Annotated[
        bool, typer.Option("--embed", help="Train SpatialVAE on the cells; add embedding and domains to the table.")
    ] = False,
    domains: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of spatial domains that --embed finds. [default: the most reproducible number]"
        ),
    ] = None,
) -> None:
    """Decode a whole raw experiment into molecules, cells and counts; write OUT/report.html.

    Repeat the command to resume an interrupted run.
    """
    from merfish.config import read_config
    from merfish.embedding import embed_run, need_embedding
    from merfish.pipeline import process
    from merfish.pipeline.record import run_summary
    from merfish.pipeline.status import decoded_fields

    if sum(choice is not None for choice in (workers, scheduler, slurm)) > 1:
        raise InputError("--workers, --scheduler and --slurm cannot be combined; give only one of them")
    if embed:
        need_embedding("--embed")  # before any work
    elif domains is not None:
        raise InputError("--domains needs --embed, which finds the domains")
    settings = read_config(config, **({} if method is None else {"method": method.value}))
    fovs = None if fov is None else parse_fovs(fov)
    tables = {
        "data_organization": data_organization,
        "codebook": codebook,
        "positions": positions,
        "microscope": microscope,
    }
    if dry_run:
        from merfish.pipeline.plan import plan_lines

        print(*plan_lines(experiment, out, settings, fovs, workers, tables, keep_going), sep="\n")
        return
    try:
        process(
            experiment,
            out=out,
            config=settings,
            fovs=fovs,
            workers=workers,
            scheduler=scheduler,
            slurm_jobs=slurm,
            tables=tables,
            keep_going=keep_going,
            segmentation=segmentation,
            save_images=save_images,
            progress=not quiet,
            verbose=verbose,
        )
    except Interrupted:
        n = len(decoded_fields(out))
        stop(f"interrupted; {n} decoded fields are kept in {out}; run the same command again to continue", INTERRUPTED)
    summary = run_summary(out)
    if quiet:
        for fov_number, reason in summary["failed"].items():
            print(f"field {fov_number} failed: {printable(reason)}", file=sys.stderr)
        if summary["notice"]:
            print(f"warning: {printable(summary['notice'])}", file=sys.stderr)
    else:
        print(*summary["lines"], sep="\n")
    if embed:
        lines = embed_run(out, domains, progress=not quiet)
        if not quiet:
            print(*lines, sep="\n")
    if summary["failed"] or summary["notice"]:
        sys.exit(FAILED_FIELDS)


@app.command("config")
def config_command(
    out: Annotated[Path | None, typer.Option(help="File to write. [default: print]", metavar="YAML")] = None,
) -> None:
    """Write every parameter with its default, unit and source as YAML, for 'merfish run --config'."""
    from merfish.config import config_yaml, write_config

    if out is None:
        print(config_yaml(), end="")
    else:
        write_config(out)
        print(f"parameters written to {out}")


@app.command()
def guide(
    name: Annotated[str | None, typer.Argument(help="Guide to show. [default: list the guides]")] = None,
) -> None:
    """Show a guide, or list all guides."""
    from rich.console import Console
    from rich.markdown import Markdown

    from merfish.guides import guide_titles, read_guide

    if name is not None:
        Console().print(Markdown(read_guide(name)))
        return
    titles = guide_titles()
    width = max(map(len, titles))
    print(*(f"{known:<{width}}  {title}" for known, title in titles.items()), sep="\n")
    print("\nRun 'merfish guide NAME' to show one of them.")


@app.command()
def status(out: RunFolder) -> None:
    """Show which fields are done, which failed and why, and the time left."""
    from merfish.pipeline.status import status_lines

    print(*status_lines(out), sep="\n")


@app.command()
def report(
    out: RunFolder,
    bulk: Annotated[
        Path | None, typer.Option(help="CSV file of bulk RNA-seq to compare with; columns gene, value.")
    ] = None,
    replicate: Annotated[
        Path | None, typer.Option(help="Folder of another run of the same genes to compare with.")
    ] = None,
) -> None:
    """Rewrite DIR/report.html from the results of a run; figures and numbers go to DIR/report."""
    from merfish.report import write_run_report

    print(write_run_report(out, bulk=bulk, replicate=replicate))


@app.command()
def mosaic(
    out: RunFolder,
    path: Annotated[Path, typer.Option("--out", help="File to write: .zarr (OME-Zarr) or .tif (OME-TIFF).")],
    channel: Annotated[
        str,
        typer.Option(help="Stain or bit of a run with --save-images, or 'overview', the brightest bit of each pixel."),
    ] = "overview",
) -> None:
    """Stitch one channel of all fields of a run at their corrected positions."""
    from merfish.mosaic import write_mosaic

    print(write_mosaic(out, path, channel))


@app.command()
def view(
    out: RunFolder,
    fov: Annotated[int | None, typer.Option(min=0, help="Field to show. [default: the whole section]")] = None,
) -> None:
    """Open napari with the images, outlines and molecules of a run."""
    from merfish.viewer import view as open_viewer

    open_viewer(out, fov)


@app.command(cls=OutCommand)
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the experiment, new or empty.", metavar="OUT")],
    fields: Annotated[str, typer.Option(help="Rows x columns of overlapping fields.")] = "4x4",
    shape: Annotated[str, typer.Option(help="Rows x columns of pixels in a field.")] = "512x512",
    planes: Annotated[int, typer.Option(min=1, help="Number of z planes.")] = 1,
    density: Annotated[float, typer.Option(min=0.0, help="Molecules per pixel of cell and plane [1/px].")] = 0.012,
    drift: Annotated[float, typer.Option(min=0.0, help="Largest drift of a round [px].")] = 5.0,
    genes: Annotated[int, typer.Option(min=1, help="Number of genes in the generated MHD4 codebook.")] = 60,
    codebook: Annotated[Path | None, typer.Option(help="Codebook file to use instead of a generated one.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same bytes.")] = 0,
) -> None:
    """Write a raw experiment of a simulated tissue, with truth tables in OUT/truth."""
    from merfish.codebook import read_codebook
    from merfish.simulate import simulate_experiment

    simulate_experiment(
        out,
        codebook=None if codebook is None else read_codebook(codebook),
        genes=genes,
        fields=parse_pair("--fields", fields),
        shape=parse_pair("--shape", shape),
        density=density,
        planes=planes,
        drift=drift,
        seed=seed,
        progress=True,
    )
    print(f"raw experiment in {out}, truth in {out / 'truth'}")


@codebook_app.command("make")
def codebook_make(
    genes: Annotated[
        Path,
        typer.Argument(
            help="Text file with one gene per line, or CSV file with the columns gene, expression.", metavar="GENES"
        ),
    ],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    bits: Annotated[int, typer.Option(min=4, max=64, help="Number of bits.")] = 16,
) -> None:
    """Build a codebook of weight 4 and distance 4; abundant genes are spread evenly over the bits."""
    from merfish.codebook import mhd4_codebook, read_gene_list, write_codebook

    names, expression = read_gene_list(genes)
    codebook = mhd4_codebook(names, bits, expression=expression)
    write_codebook(codebook, out)
    blanks = counted(int(codebook.is_blank.sum()), "blank")
    print(f"{counted(len(names), 'gene')} and {blanks} of {bits} bits in {out}")


@codebook_app.command("check")
def codebook_check(book: BookFile) -> None:
    """Report words, weights, distances, bit usage and blanks; exit code 2 if the codebook cannot be decoded."""
    from merfish.codebook import check_codebook, parse_codebook

    found = check_codebook(parse_codebook(book))
    weights = ", ".join(f"{count} of weight {weight}" for weight, count in found.weights.items())
    print(f"words             {found.n_words} ({counted(found.n_blanks, 'blank')})")
    print(f"bits              {found.n_bits}")
    print(f"weights           {weights}")
    print(f"minimum distance  {found.min_distance}: corrects {found.corrects}, detects {found.detects}")
    print(f"words per bit     {' '.join(map(str, found.bit_usage))}")
    for warning in found.warnings:
        print(f"warning: {printable(warning)}")
    if found.problems:
        raise InputError(f"{book}: {listed(found.problems)}")


@codebook_app.command("show")
def codebook_show(book: BookFile) -> None:
    """Print one word per line."""
    from merfish.codebook import read_codebook

    codebook = read_codebook(book)
    width = max(map(len, codebook.names))
    for name, word in zip(codebook.names, codebook.words, strict=True):
        print(f"{printable(name):<{width}}  {''.join('1' if bit else '.' for bit in word)}")


app.command()(cli_exchange.assign)
app.command()(cli_exchange.export)


def parse_fovs(text: str) -> list[int]:
    """Parse a list of field numbers and ranges.

    >>> parse_fovs("0,3-5")
    [0, 3, 4, 5]
    """
    fovs: set[int] = set()
    for part in text.split(","):
        # not str.isdigit, which is true for superscripts
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if found is None:
            raise InputError(f"--fov {text!r}: expected numbers and ranges such as 0,3-5, got {part!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last >= MOST_FIELDS:
            raise InputError(
                f"--fov {text!r}: expected ranges from the lower to the higher field below {MOST_FIELDS}, got {part!r}"
            )
        fovs.update(range(first, last + 1))
    return sorted(fovs)


def parse_pair(option: str, text: str) -> tuple[int, int]:
    """Parse two numbers separated by x.

    >>> parse_pair("--shape", "512x256")
    (512, 256)
    """
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX]\s*([0-9]{1,9})\s*", text)
    if found is None or max(int(found[1]), int(found[2])) > MOST_PIXELS:
        raise InputError(f"{option} {text!r}: expected two numbers such as 4x4, each at most {MOST_PIXELS}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
