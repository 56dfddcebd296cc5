"""``spatialvae``: train on a table, embed a table, evaluate a model."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialvae.model import SpatialVAE

app = typer.Typer(
    help="Embeddings of cells and of their neighbourhoods.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" takes units such as [px] for styles and drops them
)

Table = Annotated[Path, typer.Argument(help="AnnData file with counts", metavar="TABLE.h5ad")]


def show_versions(asked: bool) -> None:
    """Print the versions that results depend on, without importing anything heavy, and exit."""
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
    """Embeddings of cells and of their neighbourhoods."""


@app.command()
def train(
    table: Table,
    out: Annotated[Path, typer.Option(help="folder for the model, the table and the plots")],
    layer: Annotated[str | None, typer.Option(help="layer with counts; X if not given")] = None,
    spatial_key: Annotated[str, typer.Option(help="obsm with coordinates; '' for none")] = "spatial",
    sample_key: Annotated[str | None, typer.Option(help="obs naming the section of each cell")] = None,
    batch_key: Annotated[str | None, typer.Option(help="obs naming batches to correct for")] = None,
    domains: Annotated[int | None, typer.Option(min=1, help="spatial domains to find")] = None,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="passes over the table at most")] = None,
    seed: Annotated[int, typer.Option(help="of weights, held-out cells and noise")] = 0,
) -> None:
    """Train a model on TABLE; write OUT/model, OUT/table.h5ad, history, plots and run.json.

    Several processes train it together under "torchrun --nproc-per-node N --no-python spatialvae train ...".
    """
    started = time.time()
    adata = _read(table)
    from spatialvae.distributed import is_first
    from spatialvae.model import SpatialVAE

    SpatialVAE.setup_anndata(adata, layer, spatial_key or None, sample_key, batch_key)
    with _status("reading counts, finding neighbours, fitting the spatial field"):
        model = SpatialVAE(adata, seed=seed)
    model.train(max_epochs, seed=seed, progress=is_first())
    if not is_first():
        return
    with _status("embedding, writing"):
        _embed(model, adata)
        if domains is not None:
            model.domains(domains, seed=seed)
        elbo = model.get_elbo()
        _write_run(model, table, out, {"domains": domains, "seed": seed}, elbo, started)
    shape, steps = model.module.shape, model.history["step"].iloc[-1]
    typer.echo(
        f"{adata.n_obs} cells, {shape.n_genes} genes: {steps} steps, {shape.n_niche} niche and "
        f"{shape.n_cell} cell dimensions, ELBO {elbo:.2f} nats a cell. Written to {out}"
    )


@app.command()
def embed(
    table: Table,
    model: Annotated[Path, typer.Option(help="folder that `spatialvae train` wrote", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="where to write the table with its embedding", metavar="TABLE2.h5ad")],
) -> None:
    """Embed TABLE, which the model may never have seen, without training."""
    adata = _read(table)
    from spatialvae.model import SpatialVAE

    with _status("reading counts, finding neighbours, embedding"):
        loaded = SpatialVAE.load(_model_folder(model), adata)
        _embed(loaded, adata)
        _write_table(adata, table, out)
    typer.echo(f"{adata.n_obs} cells embedded. Written to {out}")


@app.command()
def evaluate(
    table: Table,
    model: Annotated[Path, typer.Option(help="folder that `spatialvae train` wrote", metavar="DIR")],
    labels: Annotated[str | None, typer.Option(help="obs with known domains to compare with")] = None,
    samples: Annotated[int, typer.Option(min=1, help="importance samples of log p(x)")] = 100,
    seed: Annotated[int, typer.Option(help="of draws and mixtures")] = 0,
) -> None:
    """Print, as JSON, how well a model explains TABLE, in nats a cell, and how its domains agree with labels."""
    adata = _read(table)
    from spatialvae.model import SpatialVAE

    if labels is not None and labels not in adata.obs:
        raise InputError(f"obs has no {labels!r}; it has {sorted(adata.obs)}")
    with _status("reading counts, finding neighbours"):
        loaded = SpatialVAE.load(_model_folder(model), adata)
    figures: dict[str, float] = {
        "elbo": loaded.get_elbo(seed=seed),
        "reconstruction_error": loaded.get_reconstruction_error(seed=seed),
        "marginal_log_likelihood_without_neighbours": loaded.get_marginal_ll(n_mc_samples=samples, seed=seed),
    }
    if labels is not None:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        truth = adata.obs[labels].astype(str).to_numpy()
        found = loaded.domains(len(set(truth)), seed=seed)
        figures["ari"] = float(adjusted_rand_score(truth, found))
        figures["nmi"] = float(normalized_mutual_info_score(truth, found))
    typer.echo(json.dumps(figures, indent=1))


def main() -> None:
    """Run the command line; exit with 2 and one message on bad input. Warnings are said in a line each."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"spatialvae: {message}", err=True)
    try:
        app()
    except InputError as error:
        typer.echo(f"spatialvae: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"spatialvae: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(2)


def _read(path: Path) -> AnnData:
    """The table with its counts, layers and arrays over cells left in the file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    import anndata
    import h5py
    from anndata.io import read_elem, sparse_dataset

    def lazy(item: Any) -> Any:
        return sparse_dataset(item) if isinstance(item, h5py.Group) else item

    try:
        file = h5py.File(path)
        if "encoding-type" not in file.attrs:  # before AnnData 0.8
            return anndata.read_h5ad(path)
        layers, obsm = (file.get(name, {}) for name in ("layers", "obsm"))
        return anndata.AnnData(
            lazy(file["X"]) if "X" in file else None,
            read_elem(file["obs"]),
            read_elem(file["var"]),
            obsm={name: item for name, item in obsm.items() if isinstance(item, h5py.Dataset)},
            layers={name: lazy(item) for name, item in layers.items()},
        )
    except Exception as error:  # h5py and anndata raise many kinds for what is not a table
        raise InputError(f"{path} cannot be read as an AnnData file: {error}") from error


def _model_folder(path: Path) -> Path:
    return path / "model" if (path / "model").is_dir() else path


def _embed(model: SpatialVAE, adata: AnnData) -> None:
    from spatialvae import _keys

    adata.obsm[_keys.LATENT] = model.get_latent_representation()
    adata.uns[_keys.LATENT_NAMES] = model.latent_names


def _write_table(adata: AnnData, table: Path, path: Path) -> None:
    """A copy of the file ``table`` with what was found, which ``adata`` holds."""
    import h5py
    from anndata.io import write_elem

    from spatialvae import _keys
    from spatialvae._files import whole

    with whole(path) as part:
        shutil.copyfile(table, part)
        with h5py.File(part, "r+") as file:
            for kind, names in _keys.WRITTEN.items():
                group, found = file.require_group(kind), getattr(adata, kind)
                for name in names:
                    if name in found:
                        write_elem(group, name, found[name], dataset_kwargs={"compression": "gzip"})
            if _keys.DOMAIN in adata.obs:
                write_elem(file, "obs", adata.obs)


def _write_run(
    model: SpatialVAE, table: Path, out: Path, parameters: dict[str, Any], elbo: float, started: float
) -> None:
    import numpy as np

    from spatialvae import _keys, plots
    from spatialvae._files import whole

    adata, shape = model.adata, model.module.shape
    model.save(out / "model", overwrite=True)
    _write_table(adata, table, out / "table.h5ad")
    with whole(out / "history.csv") as part:
        model.history.to_csv(part, index=False)
    labels = adata.obs[_keys.DOMAIN].to_numpy() if parameters["domains"] is not None else None
    latent = adata.obsm[_keys.LATENT][:, : shape.n_niche or shape.n_cell]
    figures = {"training": plots.training_curve(model.history), "latent": plots.latent_map(latent, labels)}
    if labels is not None and model.setup.spatial_key is not None:
        figures["domains"] = plots.domains_in_space(np.asarray(adata.obsm[model.setup.spatial_key]), labels)
    for name, figure in figures.items():
        with whole(out / f"{name}.png") as part:
            figure.savefig(part)
    with whole(out / "run.json") as part:
        part.write_text(json.dumps(_about(model, table, parameters, elbo, started), indent=1))


def _status(text: str) -> AbstractContextManager[object]:
    """``text`` beside something that moves, on a terminal and while the block lasts."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def _about(model: SpatialVAE, table: Path, parameters: dict[str, Any], elbo: float, started: float) -> dict[str, Any]:
    from dataclasses import asdict
    from importlib.metadata import version

    with table.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {
        "versions": {name: version(name) for name in ("merfish", "numpy", "torch", "anndata")},
        "input": {"path": str(table), "bytes": table.stat().st_size, "sha256": digest},
        "parameters": asdict(model.setup) | asdict(model.module.shape) | parameters,
        "figures": {"steps": int(model.history["step"].iloc[-1]), "elbo": elbo},
        "seconds": round(time.time() - started, 2),
    }


if __name__ == "__main__":
    main()
