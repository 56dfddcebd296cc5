"""Commands that train a model, embed a table with it and write its report."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spatialvae._defaults import LIKELIHOODS
from spatialvae.cli.files import model_folder, read_table, status, write_table
from spatialvae.cli.options import Table
from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialvae.model import SpatialVAE


def train(
    table: Table,
    out: Annotated[Path, typer.Option(help="Folder for the model, the table and the figures.")],
    layer: Annotated[str | None, typer.Option(help="Layer with counts. [default: X]")] = None,
    spatial_key: Annotated[str, typer.Option(help="Key of the coordinates in obsm; '' for none.")] = "spatial",
    sample_key: Annotated[str | None, typer.Option(help="Column of obs with the section of each cell.")] = None,
    batch_key: Annotated[str | None, typer.Option(help="Column of obs with batches to correct for.")] = None,
    domains: Annotated[
        int | None, typer.Option(min=1, help="Number of spatial domains to find. [default: find none]")
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(min=1, help="Largest number of passes over the table. [default: stop automatically]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, held-out cells and noise.")] = 0,
    likelihood: Annotated[
        str, typer.Option(help="Likelihood of counts: zinb, nb or poisson; 'spatialvae evaluate' compares them.")
    ] = LIKELIHOODS[0],
    measurement: Annotated[
        bool,
        typer.Option(
            "--measurement", help="Model detection efficiencies and wrong calls, as estimated by 'merfish run'."
        ),
    ] = False,
    linear_decoder: Annotated[
        bool, typer.Option("--linear-decoder", help="Make log shares linear in the latents, and write loadings.csv.")
    ] = False,
) -> None:
    """Train a model on TABLE; write OUT/model, OUT/table.h5ad, history.csv, figures and run.json.

    To train with several processes, use "torchrun --nproc-per-node N --no-python spatialvae train ...".
    """
    started = time.time()
    adata = read_table(table)
    from spatialvae.distributed import is_first
    from spatialvae.model import SpatialVAE

    SpatialVAE.setup_anndata(adata, layer, spatial_key or None, sample_key, batch_key)
    with status("reading counts, finding neighbours and fitting the spatial field"):
        model = SpatialVAE(
            adata, gene_likelihood=likelihood, seed=seed, measurement=measurement, linear_decoder=linear_decoder
        )
    if domains is not None and domains > adata.n_obs:
        raise InputError(f"--domains is {domains}; expected at most {adata.n_obs}, the number of cells")
    out.mkdir(parents=True, exist_ok=True)  # an error after training would lose the model
    model.train(max_epochs, seed=seed, progress=is_first())
    if not is_first():
        return
    with status("embedding cells and writing results"):
        _embed(model, adata)
        if domains is not None:
            model.domains(domains, seed=seed)
        elbo = model.get_elbo()
        _write_run(model, table, out, {"domains": domains, "seed": seed}, elbo, started)
    shape, steps = model.module.shape, model.training_log["step"].iloc[-1]
    typer.echo(
        f"{adata.n_obs} cells, {shape.n_genes} genes: {steps} steps, {shape.n_niche} niche and "
        f"{shape.n_cell} cell dimensions, ELBO {elbo:.2f} nats per cell. Written to {out}"
    )


def embed(
    table: Table,
    model: Annotated[Path, typer.Option(help="Output folder of 'spatialvae train'.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="File for the table with its embedding.", metavar="TABLE2.h5ad")],
) -> None:
    """Embed TABLE, which may contain new cells, with a trained model."""
    adata = read_table(table)
    from spatialvae.model import SpatialVAE

    with status("reading counts, finding neighbours and embedding cells"):
        loaded = SpatialVAE.load(model_folder(model), adata)
        _embed(loaded, adata)
        write_table(adata, table, out)
    typer.echo(f"{adata.n_obs} cells embedded. Written to {out}")


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of 'spatialvae train'.", metavar="DIR")],
    labels: Annotated[str | None, typer.Option(help="Column of obs to compare domains with.", metavar="KEY")] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(help="GMT file with gene sets, to annotate programs.", metavar="FILE")
    ] = None,
) -> None:
    """Write DIR/report.html: training, latent space, domains, niches, programs and figures of other commands."""
    import numpy as np

    adata = read_table(folder / "table.h5ad")
    from spatialvae.model import SpatialVAE
    from spatialvae.report import write_report

    with status("reading counts, finding neighbours and drawing figures"):
        loaded = SpatialVAE.load(model_folder(folder), adata)
        adata.obsm = {name: np.asarray(value) for name, value in adata.obsm.items()}
        path = write_report(folder, loaded, labels, gene_sets)
    typer.echo(f"Written to {path}")


def _embed(model: SpatialVAE, adata: AnnData) -> None:
    from spatialvae import _keys

    adata.obsm[_keys.LATENT] = model.get_latent_representation()
    adata.uns[_keys.LATENT_NAMES] = model.latent_names


def _write_run(
    model: SpatialVAE, table: Path, out: Path, parameters: dict[str, Any], elbo: float, started: float
) -> None:
    import numpy as np

    from spatialvae import _keys, plots
    from spatialvae._files import whole

    adata, shape = model.adata, model.module.shape
    model.save(out / "model", overwrite=True)
    write_table(adata, table, out / "table.h5ad")
    with whole(out / "history.csv") as part:
        model.training_log.to_csv(part, index=False)
    if shape.linear_decoder:
        with whole(out / "loadings.csv") as part:
            model.get_loadings().to_csv(part, index_label="gene")
    labels = adata.obs[_keys.DOMAIN].to_numpy() if parameters["domains"] is not None else None
    latent = adata.obsm[_keys.LATENT][:, : shape.n_niche or shape.n_cell]
    figures = {"training": plots.training_curve(model.training_log), "latent": plots.latent_map(latent, labels)}
    if labels is not None and model.setup.spatial_key is not None:
        figures["domains"] = plots.domains_in_space(np.asarray(adata.obsm[model.setup.spatial_key]), labels)
    for name, figure in figures.items():
        with whole(out / f"{name}.png") as part:
            figure.savefig(part)
    with whole(out / "run.json") as part:
        part.write_text(json.dumps(_about(model, table, parameters, elbo, started), indent=1))


def _about(model: SpatialVAE, table: Path, parameters: dict[str, Any], elbo: float, started: float) -> dict[str, Any]:
    from dataclasses import asdict
    from importlib.metadata import version

    with table.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {
        "versions": {name: version(name) for name in ("merfish", "numpy", "torch", "anndata")},
        "input": {"path": str(table), "bytes": table.stat().st_size, "sha256": digest},
        "parameters": asdict(model.setup) | asdict(model.module.shape) | parameters,
        "figures": {"steps": int(model.training_log["step"].iloc[-1]), "elbo": elbo},
        "seconds": round(time.time() - started, 2),
    }
