"""Commands that evaluate models and draw counts from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spatialvae._defaults import LIKELIHOODS
from spatialvae.cli.files import model_folder, read_table, status
from spatialvae.cli.options import Table
from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialvae.model import SpatialVAE


def evaluate(
    table: Table,
    model: Annotated[Path | None, typer.Option(help="Output folder of 'spatialvae train'.", metavar="DIR")] = None,
    labels: Annotated[str | None, typer.Option(help="With --model: column of obs with known domains.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per cell for log p(x).")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws, mixtures, weights and held-out cells.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for evidence.csv or, with --model, checks.csv.")] = None,
    likelihood: Annotated[str, typer.Option(help="Without --model: likelihoods to compare.")] = ",".join(LIKELIHOODS),
    latent: Annotated[str, typer.Option(help="Without --model: latent sizes to compare.")] = "10,30",
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Without --model: share of held-out cells.")] = 0.1,
    max_epochs: Annotated[
        int | None, typer.Option(min=1, help="Without --model: largest number of passes over the table.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Without --model: layer with counts. [default: X]")] = None,
    spatial_key: Annotated[
        str, typer.Option(help="Without --model: key of the coordinates in obsm; '' for none.")
    ] = "spatial",
    sample_key: Annotated[
        str | None, typer.Option(help="Without --model: column of obs with the section of each cell.")
    ] = None,
    batch_key: Annotated[
        str | None, typer.Option(help="Without --model: column of obs with batches to correct for.")
    ] = None,
) -> None:
    """Evaluate a model on TABLE, or compare models of TABLE by their evidence for held-out cells.

    With --model: print as JSON the ELBO, the reconstruction error and the evidence, in nats per cell, and with
    --labels the agreement of domains with labels. With --out, also compare TABLE with counts drawn from the posterior
    of the model, in OUT/checks.csv and OUT/checks.png.
    Without --model: train models with each likelihood and latent size, with and without neighbours, and write their
    evidence for held-out cells to OUT/evidence.csv and OUT/evidence.png.
    """
    if model is None and out is None:
        raise InputError("give --model DIR to evaluate a model, or --out DIR to compare models of the table")
    adata = read_table(table)
    if model is None and out is not None:
        from spatialvae.model import SpatialVAE

        sizes = [_whole(text, "--latent") for text in latent.split(",")]
        SpatialVAE.setup_anndata(adata, layer, spatial_key or None, sample_key, batch_key)
        names = [name.strip() for name in likelihood.split(",")]
        return _compare(adata, out, names, sizes, held_out, samples, max_epochs, seed)
    assert model is not None
    return _evaluate_model(adata, model, labels, samples, seed, out)


def _evaluate_model(adata: AnnData, model: Path, labels: str | None, samples: int, seed: int, out: Path | None) -> None:
    from spatialvae.model import SpatialVAE

    if labels is not None and labels not in adata.obs:
        raise InputError(f"no column {labels!r} in obs; it has {', '.join(sorted(adata.obs))}")
    with status("reading counts and finding neighbours"):
        loaded = SpatialVAE.load(model_folder(model), adata)
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
        with status("comparing drawn with measured counts"):
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

    out.mkdir(parents=True, exist_ok=True)  # an error after training would lose the results
    with Console(stderr=True).status("selecting held-out cells") as status:
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
        raise InputError(f"{option} contains {text!r}; expected whole numbers separated by commas")
    return int(text)


def sample(
    table: Table,
    model: Annotated[Path, typer.Option(help="Output folder of 'spatialvae train'.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="File for the sampled counts.", metavar="TABLE2.h5ad")],
    what: Annotated[str, typer.Option(help="What to sample: posterior, tissue or prior.")] = "posterior",
    given: Annotated[
        Path | None,
        typer.Option(
            help="Table of cells whose counts are given; only positions and total counts of TABLE are then used."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="posterior: number of draws; all but the first are stored as layers.")
    ] = 1,
    cells: Annotated[
        str, typer.Option(help="tissue, prior: draw z_cell from the 'model', or take it from cells of the 'table'.")
    ] = "table",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Draw counts from a model: for the cells of TABLE (posterior), for new cells at their positions (tissue), or for
    the same number of independent cells (prior)."""
    if what not in ("posterior", "tissue", "prior"):
        raise InputError(f"--what is {what!r}; expected posterior, tissue or prior")
    if given is not None and what == "prior":
        raise InputError("--given cannot be used with --what prior, whose cells are independent")
    adata, known = read_table(table), None if given is None else read_table(given)
    from spatialvae._files import whole
    from spatialvae.model import SpatialVAE

    with status("reading counts and sampling"):
        loaded = SpatialVAE.load(model_folder(model), adata)
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
            raise InputError("the model was trained without coordinates; use --what prior")
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
