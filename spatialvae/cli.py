"""The ``spatialvae`` command: train models on tables, and use them."""

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
    from matplotlib.figure import Figure

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
    likelihood: Annotated[
        str, typer.Option(help="of counts: nb, zinb or poisson; `spatialvae evaluate` says which explains TABLE best")
    ] = "nb",
    measurement: Annotated[
        bool,
        typer.Option(
            "--measurement", help="include detection efficiency and wrong calls, as `merfish run` estimates them"
        ),
    ] = False,
    linear_decoder: Annotated[
        bool, typer.Option("--linear-decoder", help="expression linear in the latents; writes loadings.csv")
    ] = False,
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
        model = SpatialVAE(
            adata, gene_likelihood=likelihood, seed=seed, measurement=measurement, linear_decoder=linear_decoder
        )
    model.train(max_epochs, seed=seed, progress=is_first())
    if not is_first():
        return
    with _status("embedding, writing"):
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


@app.command()
def embed(
    table: Table,
    model: Annotated[Path, typer.Option(help="folder that `spatialvae train` wrote", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="where to write the table with its embedding", metavar="TABLE2.h5ad")],
) -> None:
    """Embed TABLE, which may hold new cells, with a trained model."""
    adata = _read(table)
    from spatialvae.model import SpatialVAE

    with _status("reading counts, finding neighbours, embedding"):
        loaded = SpatialVAE.load(_model_folder(model), adata)
        _embed(loaded, adata)
        _write_table(adata, table, out)
    typer.echo(f"{adata.n_obs} cells embedded. Written to {out}")


Labels = Annotated[str, typer.Option(help="obs with the type, or domain, of each cell", metavar="KEY")]
Places = Annotated[str, typer.Option(help="obsm with coordinates", metavar="KEY")]
Sections = Annotated[str | None, typer.Option(help="obs naming the section of each cell", metavar="KEY")]


@app.command()
def neighbours(
    table: Table,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="folder for couplings.csv and couplings.png", metavar="DIR")],
    spatial_key: Places = "spatial",
    sample_key: Sections = None,
) -> None:
    """Find types that are neighbours more, or less, often than their abundances explain: a Potts model of the labels.

    Errors are estimated from blocks of the tissue, so that they account for its gradients.
    """
    adata = _read(table)
    from spatialvae import plots
    from spatialvae.data import graphs_of
    from spatialvae.inference import spatial_blocks
    from spatialvae.potts import fit_potts, interactions
    from spatialvae.setup import Setup, read_codes, read_places

    types, names = read_codes(adata, labels)
    places, samples = read_places(adata, Setup(None, spatial_key, sample_key))
    with _status("finding neighbours, fitting couplings"):
        adjacency = graphs_of(places, samples).near.adjacency()
        found = interactions(fit_potts(types, adjacency, blocks=spatial_blocks(places, 25, samples)), names)
    _write_csv(found, out / "couplings.csv")
    _write_figure(plots.couplings(found), out / "couplings.png")
    certain = found[found["fdr"] < 0.05]
    typer.echo(f"{len(certain)} of {len(found)} pairs attract or repel each other at an FDR of 5 %. Written to {out}")
    for row in certain.head(10).to_dict("records"):
        verb = "attract" if row["coupling"] > 0 else "repel"
        size = f"{row['coupling']:+.2f} nats per edge, +- {row['error']:.2f}"
        typer.echo(f"  {row['label']} and {row['neighbour']} {verb}: {size}")


@app.command()
def dependence(
    table: Table,
    out: Annotated[Path, typer.Option(help="folder for tables and figures", metavar="DIR")],
    layer: Annotated[str | None, typer.Option(help="layer with counts; X if not given")] = None,
    spatial_key: Places = "spatial",
    sample_key: Sections = None,
    labels: Annotated[str | None, typer.Option(help="obs with the type of each cell", metavar="KEY")] = None,
    genes: Annotated[int, typer.Option(min=3, help="number of genes, the most variable")] = 60,
    max_false: Annotated[float, typer.Option(min=0.01, help="expected number of wrong edges, at most")] = 1.0,
    seed: Annotated[int, typer.Option(help="of halves")] = 0,
) -> None:
    """Find genes that depend on each other given all others and the neighbours; with labels, effects of neighbours.

    Writes edges.csv and edges_without_neighbours.csv; with labels also variance.csv and neighbour_effects.csv; and
    figures of them.
    """
    adata = _read(table)
    import numpy as np

    from spatialvae import _keys, plots
    from spatialvae import dependence as model
    from spatialvae.data import graphs_of, read_cells
    from spatialvae.inference import spatial_blocks
    from spatialvae.setup import Setup, read_codes

    cells = read_cells(adata, Setup(layer, spatial_key, sample_key))
    assert cells.coordinates is not None
    types, kinds = read_codes(adata, labels)
    graphs = graphs_of(cells.coordinates, cells.samples)
    near, blocks = graphs.near.adjacency(), spatial_blocks(cells.coordinates, 50, cells.samples)
    counts = cells.counts.dense(np.arange(cells.n_cells))
    chosen = model.most_variable(counts, genes)
    names = [cells.genes[gene] for gene in chosen]
    found = []
    for of, name in ((near, "edges"), (None, "edges_without_neighbours")):
        with _status("halving the tissue: " + name.replace("_", " ")):
            found.append(model.partial_correlations(counts[:, chosen], blocks, of, cells.depth, names, max_false, seed))
        _write_csv(found[-1], out / f"{name}.csv")
    _write_figure(plots.dependence_graph(*found), out / "edges.png")
    typer.echo(f"{len(found[0])} edges between {len(names)} genes given the neighbours, {len(found[1])} without them.")
    if labels is not None:
        expression = model.log_expression(counts)
        niche = graphs.wide.adjacency() @ np.eye(len(kinds))[types]  # what is around, as long as no model says more
        if _keys.LATENT in adata.obsm:
            niche = np.asarray(adata.obsm[_keys.LATENT])
            niche = niche[:, [name.startswith("niche") for name in _latent_names(table, niche.shape[1])]]
        shares = model.variance_shares(expression, types, niche, near, blocks, cells.genes)
        _write_csv(shares, out / "variance.csv")
        _write_figure(plots.variance_bars(shares), out / "variance.png")
        try:
            with _status("comparing cells of a type"):
                effects = model.neighbour_effects(
                    expression, types, near, cells.coordinates, kinds, cells.genes, cells.samples
                )
        except InputError as reason:  # the table is good, only too small for this
            typer.echo(f"No effects of neighbours: {reason}.")
        else:
            _write_csv(effects, out / "neighbour_effects.csv")
            _write_figure(plots.effects(effects), out / "neighbour_effects.png")
            typer.echo(f"{int((effects['fdr'] < 0.1).sum())} effects of neighbours at an FDR of 10 %.")
    typer.echo(f"Written to {out}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder that `spatialvae train` wrote", metavar="DIR")],
    labels: Annotated[str | None, typer.Option(help="obs to compare domains with", metavar="KEY")] = None,
    gene_sets: Annotated[Path | None, typer.Option(help="GMT file that names programs", metavar="FILE")] = None,
) -> None:
    """Write DIR/report.html: training, latent space, domains, niches, programs, and what other commands wrote there."""
    import numpy as np

    adata = _read(folder / "table.h5ad")
    from spatialvae.model import SpatialVAE
    from spatialvae.report import write_report

    with _status("reading counts, finding neighbours, drawing"):
        loaded = SpatialVAE.load(_model_folder(folder), adata)
        adata.obsm = {name: np.asarray(value) for name, value in adata.obsm.items()}
        path = write_report(folder, loaded, labels, gene_sets)
    typer.echo(f"Written to {path}")


plot = typer.Typer(help="Figures of an embedded table.", no_args_is_help=True)
app.add_typer(plot, name="plot")


@plot.command()
def latent(
    table: Table,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="the figure: .png, .pdf or .svg")],
    key: Annotated[str, typer.Option(help="obsm with the embedding")] = "X_spatialvae",
    seed: Annotated[int, typer.Option(help="of the cells drawn and of the map")] = 0,
) -> None:
    """Distances between cells in latent space, ordered by type, and a two-dimensional embedding."""
    adata = _read(table)
    import numpy as np

    from spatialvae import plots
    from spatialvae.setup import read_codes

    codes, names = read_codes(adata, labels)
    if key not in adata.obsm:
        raise InputError(f"no {key!r} in obsm, which has {', '.join(sorted(adata.obsm))}; run `spatialvae embed` first")
    with _status("mapping"):
        figure = plots.latent_distances(np.asarray(adata.obsm[key], float), np.array(names)[codes], seed)
    _write_figure(figure, out)
    typer.echo(f"Written to {out}")


@app.command()
def evaluate(
    table: Table,
    model: Annotated[Path | None, typer.Option(help="folder that `spatialvae train` wrote", metavar="DIR")] = None,
    labels: Annotated[str | None, typer.Option(help="with --model: obs with known domains to compare")] = None,
    samples: Annotated[int, typer.Option(min=1, help="importance samples of log p(x)")] = 100,
    seed: Annotated[int, typer.Option(help="of draws, mixtures, weights and held-out cells")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for evidence.csv or, with --model, checks.csv")] = None,
    likelihood: Annotated[str, typer.Option(help="without --model: likelihoods to compare")] = "nb,zinb,poisson",
    latent: Annotated[str, typer.Option(help="without --model: latent sizes to compare")] = "10,30",
    held_out: Annotated[float, typer.Option(min=0, max=1, help="without --model: share of cells")] = 0.1,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="without --model: passes over the table")] = None,
    layer: Annotated[str | None, typer.Option(help="without --model: layer with counts; X if not given")] = None,
    spatial_key: Annotated[str, typer.Option(help="without --model: obsm with coordinates; '' for none")] = "spatial",
    sample_key: Annotated[str | None, typer.Option(help="without --model: obs naming sections")] = None,
    batch_key: Annotated[str | None, typer.Option(help="without --model: obs naming batches")] = None,
) -> None:
    """Evaluate a model on TABLE, or compare models of TABLE by their evidence for held-out cells.

    With --model: prints, as JSON, bounds and evidence in nats per cell, and the agreement of domains with labels; with
    --out, also compares TABLE with counts drawn from the model's posterior, in OUT/checks.csv and OUT/checks.png.
    Without --model: trains models with each likelihood and latent size, with and without neighbours, on a part of the
    cells, and writes their evidence for the others to OUT/evidence.csv and OUT/evidence.png.
    """
    if model is None and out is None:
        raise InputError("give --model DIR to evaluate a model, or --out DIR to compare models of the table")
    adata = _read(table)
    if model is None and out is not None:
        from spatialvae.model import SpatialVAE

        sizes = [_whole(text, "--latent") for text in latent.split(",")]
        SpatialVAE.setup_anndata(adata, layer, spatial_key or None, sample_key, batch_key)
        return _compare(adata, out, likelihood.split(","), sizes, held_out, samples, max_epochs, seed)
    assert model is not None
    return _evaluate_model(adata, model, labels, samples, seed, out)


def _evaluate_model(adata: AnnData, model: Path, labels: str | None, samples: int, seed: int, out: Path | None) -> None:
    from spatialvae.model import SpatialVAE

    if labels is not None and labels not in adata.obs:
        raise InputError(f"no column {labels!r} in obs, which has {', '.join(sorted(adata.obs))}")
    with _status("reading counts, finding neighbours"):
        loaded = SpatialVAE.load(_model_folder(model), adata)
    evidence, error = loaded.get_marginal_ll(n_mc_samples=samples, seed=seed, return_error=True)
    figures: dict[str, float] = {
        "elbo": loaded.get_elbo(seed=seed),
        "reconstruction_error": loaded.get_reconstruction_error(seed=seed),
        "marginal_log_likelihood_without_neighbours": evidence,
        "marginal_log_likelihood_monte_carlo_error": error,
    }
    if labels is not None:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        truth = adata.obs[labels].astype(str).to_numpy()
        found = loaded.domains(len(set(truth)), seed=seed)
        figures["ari"] = float(adjusted_rand_score(truth, found))
        figures["nmi"] = float(normalized_mutual_info_score(truth, found))
    if out is not None:
        with _status("drawing counts, comparing them with those of the table"):
            figures |= _check(loaded, out, seed)
    typer.echo(json.dumps(figures, indent=1))


def _check(model: SpatialVAE, out: Path, seed: int) -> dict[str, float]:
    from spatialvae import checks
    from spatialvae._files import whole

    real, sampled, found = checks.of_model(model, seed)
    with whole(out / "checks.csv") as part:
        checks.compared(real, sampled).to_csv(part, index_label="statistic")
    with whole(out / "checks.png") as part:
        checks.check_plot(real, sampled).savefig(part)
    return found


def _compare(
    adata: AnnData,
    out: Path,
    likelihoods: list[str],
    sizes: list[int],
    held_out: float,
    samples: int,
    max_epochs: int | None,
    seed: int,
) -> None:
    from rich.console import Console

    from spatialvae import comparison
    from spatialvae._files import whole

    with Console(stderr=True).status("holding cells out") as status:
        found = comparison.compare(
            adata,
            likelihoods,
            sizes,
            held_out=held_out,
            samples=samples,
            max_epochs=max_epochs,
            seed=seed,
            report=status.update,
        )
    with whole(out / "evidence.csv") as part:
        found.to_csv(part, index=False)
    with whole(out / "evidence.png") as part:
        comparison.evidence_plot(found).savefig(part)
    typer.echo(found.to_string(index=False, float_format="%.3f"))
    typer.echo(f"Written to {out}")


def _whole(text: str, option: str) -> int:
    if not text.strip().isdigit():
        raise InputError(f"{option} holds {text!r}; expected whole numbers with commas between them")
    return int(text)


@app.command()
def sample(
    table: Table,
    model: Annotated[Path, typer.Option(help="folder that `spatialvae train` wrote", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="where to write the sampled counts", metavar="TABLE2.h5ad")],
    what: Annotated[str, typer.Option(help="posterior, tissue or prior")] = "posterior",
    given: Annotated[
        Path | None, typer.Option(help="cells that are given; of TABLE only the positions are then used")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="posterior: draws, the second and later ones as layers")] = 1,
    cells: Annotated[str, typer.Option(help="tissue, prior: cells of the 'model', or types of the 'table'")] = "table",
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
) -> None:
    """Draw counts from a model: of TABLE's cells (posterior), of new cells at TABLE's positions (tissue), or of as many
    independent cells (prior)."""
    if what not in ("posterior", "tissue", "prior"):
        raise InputError(f"--what is {what!r}; expected posterior, tissue or prior")
    if given is not None and what == "prior":
        raise InputError("--given is for --what posterior and tissue: cells of the prior are independent")
    adata, known = _read(table), None if given is None else _read(given)
    from spatialvae._files import whole
    from spatialvae.model import SpatialVAE

    with _status("reading counts, sampling"):
        loaded = SpatialVAE.load(_model_folder(model), adata)
        made = _sampled(loaded, what, known, samples, cells, seed)
        with whole(out) as part:
            made.write_h5ad(part, compression="gzip")
    typer.echo(f"{made.n_obs} cells sampled. Written to {out}")


def _sampled(model: SpatialVAE, what: str, given: AnnData | None, samples: int, cells: str, seed: int) -> AnnData:
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from spatialvae.setup import read_places

    table = model.adata
    if what == "prior":
        return model.sample_prior(table.n_obs, cells, seed)
    if what == "tissue":
        if model.setup.spatial_key is None:
            raise InputError("the model was trained without coordinates: use --what prior")
        where, names = read_places(table, model.setup)
        return model.sample_tissue(where, names, given, None, cells, seed)
    drawn = model.posterior_predictive_sample(n_samples=samples, given=given, seed=seed)
    drawn = drawn.reshape(table.n_obs, len(model.genes), samples)
    made = AnnData(csr_matrix(drawn[..., 0]), table.obs.copy(), pd.DataFrame(index=list(model.genes)))
    for i in range(1, samples):
        made.layers[f"sample_{i}"] = csr_matrix(drawn[..., i])
    if model.setup.spatial_key is not None:
        made.obsm[model.setup.spatial_key] = np.asarray(table.obsm[model.setup.spatial_key])
    return made


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2. A warning is printed on one line."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(2)


def _read(path: Path) -> AnnData:
    """The table with its counts, layers and arrays over cells left in the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an AnnData table (.h5ad)")
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
        raise InputError(f"{path}: cannot be read as an AnnData file: {error}") from error


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


def _latent_names(table: Path, size: int) -> list[str]:
    """Names of the columns of the embedding in the file ``table``."""
    import h5py
    from anndata.io import read_elem

    from spatialvae import _keys

    with h5py.File(table) as file:
        uns = file.get("uns", {})
        names = [str(name) for name in read_elem(uns[_keys.LATENT_NAMES])] if _keys.LATENT_NAMES in uns else []
    return names if len(names) == size else ["niche"] * size


def _write_csv(frame: Any, path: Path) -> None:
    from spatialvae._files import whole

    with whole(path) as part:
        frame.to_csv(part, index=False)


def _write_figure(figure: Figure, path: Path) -> None:
    from spatialvae._files import whole

    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise InputError(f"{path}: unknown figure format; use .png, .pdf or .svg")
    with whole(path) as part:
        figure.savefig(part)


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
        "figures": {"steps": int(model.training_log["step"].iloc[-1]), "elbo": elbo},
        "seconds": round(time.time() - started, 2),
    }


if __name__ == "__main__":
    main()
