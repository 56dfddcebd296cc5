"""Embed cells with SpatialVAE, which is imported inside the functions that need it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merfish import results
from merfish._text import counted
from merfish.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialvae import SpatialVAE

SEED = 0
MODEL = "model"  # folder beside the table of a run


def need_embedding(what: str) -> None:
    """Raise InputError if packages that ``what`` needs are not installed."""
    missing = [name for name in ("torch", "torch_geometric", "safetensors", "sklearn") if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} embeds cells and needs {', '.join(missing)}: pip install 'merfish[vae]'")


def fit_embedding(
    table: AnnData,
    n_domains: int | None,
    *,
    max_epochs: int | None = None,
    neighbours: bool = True,
    progress: bool = True,
) -> SpatialVAE:
    """Train a model on a table of counts, and add its embedding and spatial domains to the table.

    n_domains: by default the number whose domains are most reproducible in halves of the cells. max_epochs: by default
    training stops when the loss of held-out cells no longer improves. neighbours: whether to fit the prediction of a
    cell from its neighbours, which embedding and domains do not use. Adds ``obsm["X_spatialvae"]``, the names of its
    columns as ``uns["X_spatialvae_names"]``, ``obsm["spatial_domain_probability"]`` and ``obs["spatial_domain"]``.
    Raises InputError for a table that cannot be embedded.
    """
    from spatialvae import InputError as NotEmbeddable
    from spatialvae import SpatialVAE

    try:
        SpatialVAE.setup_anndata(table)
        model = SpatialVAE(table, seed=SEED) if neighbours else SpatialVAE(table, niche_encoder="field", seed=SEED)
        model.train(max_epochs, progress=progress)
        table.obsm[results.LATENT] = model.get_latent_representation()
        table.uns[results.LATENT_NAMES] = model.latent_names
        model.domains(n_domains)
    except NotEmbeddable as error:
        raise InputError(f"the {table.n_obs} cells cannot be embedded: {error}") from error
    return model


def embed_run(out: Path, n_domains: int | None = None, *, progress: bool = False) -> list[str]:
    """Embed the cells of a finished run: add embedding and domains to its table, and save the model beside it.

    Table and record are replaced together; nothing is done if an earlier call with the same ``n_domains`` embedded the
    same results. Returns lines for the terminal. Raises InputError if the run cannot be embedded.
    """
    import anndata

    from merfish.pipeline import folder
    from merfish.report import write_run_report

    need_embedding("--embed")
    with folder.owned(out):
        record = results.read_run(out)
        asked: dict[str, Any] = {"n_domains": n_domains, "seed": SEED}
        if record.get("embedding", {}).get("asked") == asked and (out / MODEL).is_dir():
            return [f"the cells are already embedded; domains: {record['embedding']['found']}"]
        table = anndata.read_h5ad(out / results.CELL_BY_GENE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = fit_embedding(table, n_domains, progress=progress)
        found = int(table.obs[results.DOMAIN].nunique())
        model.save(out / MODEL, overwrite=True)
        stage = folder.new_stage(out)
        table.write_h5ad(stage / results.CELL_BY_GENE)
        size = (stage / results.CELL_BY_GENE).stat().st_size
        record["results"] = {**record["results"], results.CELL_BY_GENE: size}
        folder.write_json(stage / results.RUN, {**record, "embedding": {"asked": asked, "found": found}})
        folder.publish(out)
        write_run_report(out)
    said = [f"warning: {warning.message}" for warning in caught if issubclass(warning.category, UserWarning)]
    return [*said, f"{counted(table.n_obs, 'cell')} embedded, {counted(found, 'domain')}, model in {out / MODEL}"]
