"""The report of a trained model, as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialvae import _keys, interpret, plots
from spatialvae._files import whole
from spatialvae.dependence import log_expression
from spatialvae.errors import InputError
from spatialvae.setup import read_codes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spatialvae.model import SpatialVAE

WIDE_INCHES = 8.0
DIMENSIONS_SHOWN = 12
SETS_SHOWN = 3  # per program
OTHERS = {  # files that other commands write into the folder: heading and caption
    "evidence.png": ("Evidence", "Evidence of models for held-out cells (spatialvae evaluate)"),
    "checks.png": (
        "Predictive checks",
        "Statistics of counts drawn from the model against those of the measured counts (spatialvae evaluate --model)",
    ),
    "couplings.png": (
        "Neighbouring types",
        "Red: neighbours more often than expected; blue: less often; dots: FDR below 5 % (spatialvae neighbours)",
    ),
    "edges.png": (
        "Conditional dependence between genes",
        "Given all other genes and the neighbours (spatialvae dependence)",
    ),
    "variance.png": ("Effects of neighbours", "Shares of the variance of expression explained in held-out cells"),
    "neighbour_effects.png": (
        "Effects of neighbours",
        "Change of expression with the number of neighbours of another type, between nearby cells of one type",
    ),
}


@dataclass(frozen=True)
class Picture:
    """A figure as base64-encoded PNG, with its caption; a wide one takes a full row."""

    png: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Column names and rows of values, printed as they are."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures below it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()


def write_report(folder: Path, model: SpatialVAE, labels: str | None = None, gene_sets: Path | None = None) -> Path:
    """Write FOLDER/report.html from the results of ``spatialvae train`` and other commands in the folder.

    The file is replaced atomically.

    Parameters
    ----------
    folder : output folder of ``spatialvae train``
    model : the model, loaded with the embedded table of the folder
    labels : column of obs to compare domains with
    gene_sets : GMT file; programs are annotated with the sets that are enriched among increasing genes

    Returns
    -------
    The path of the report

    Raises
    ------
    InputError : if the folder has no readable run.json, the table has no such ``labels``, or ``gene_sets`` is not a GMT
        file
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    try:
        run = json.loads((folder / "run.json").read_text())
        elbo, source = float(run["figures"]["elbo"]), Path(run["input"]["path"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/run.json cannot be read ({error}); expected the output folder of `spatialvae train`"
        ) from error
    sets = None if gene_sets is None else interpret.read_gmt(gene_sets)
    known = None if labels is None else _names(model, labels)
    sections = [
        _training(model, elbo),
        *_maps(model, labels, known),
        *_niches(model, labels, known),
        _programs(model, sets),
    ]
    environment = Environment(loader=PackageLoader("spatialvae"), autoescape=True, undefined=StrictUndefined)
    lead = f"{model.adata.n_obs:,} cells, {len(model.genes):,} genes, {elbo:.2f} nats per cell (ELBO)"
    page = environment.get_template("report.html").render(
        title=f"SpatialVAE of {source}", lead=lead, sections=[*sections, *_of_others(folder)]
    )
    with whole(folder / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    return folder / "report.html"


def picture(figure: Figure, caption: str) -> Picture:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(_base64(buffer.getvalue()), caption, figure.get_figwidth() > WIDE_INCHES)


def table_of(frame: pd.DataFrame) -> Table:
    """A table of a data frame, with numbers rounded to three digits."""

    def text(value: Any) -> str:
        return f"{float(f'{value:.3g}'):,g}" if isinstance(value, float) else str(value)

    return Table([str(name).replace("_", " ") for name in frame], [[text(v) for v in row] for row in frame.to_numpy()])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _names(model: SpatialVAE, key: str) -> np.ndarray:
    codes, names = read_codes(model.adata, key)
    return np.array(names)[codes]


def _training(model: SpatialVAE, elbo: float) -> Section:
    shape, steps = model.module.shape, int(model.training_log["step"].iloc[-1])
    text = f"{steps:,} steps. The latent space of cells (z_cell) has {shape.n_cell} dimensions"
    text += f", of which the first {shape.n_niche} vary in space (z_niche)." if shape.n_niche else "."
    text += f" The evidence lower bound (ELBO) is {elbo:.2f} nats per cell."
    return Section("Training", [text], figures=[picture(plots.training_curve(model.training_log), "Training, by step")])


def _maps(model: SpatialVAE, labels: str | None, known: np.ndarray | None) -> list[Section]:
    adata, key = model.adata, model.setup.spatial_key
    found = _names(model, _keys.DOMAIN) if _keys.DOMAIN in adata.obs else None
    shown = known if known is not None else found
    cell = model.get_latent_representation(which="cell")
    latent = [picture(plots.latent_map(cell, shown, "z_cell"), "First two principal components of z_cell")]
    if shown is not None:
        caption = "Distances between cells in z_cell, ordered by label, and a two-dimensional embedding of the cells"
        latent = [picture(plots.latent_distances(cell, shown, title="z_cell"), caption)]
    sections = [Section("Latent space", figures=latent)]
    if found is None or key is None:
        return sections
    places = np.asarray(adata.obsm[key])
    figures = [picture(plots.domains_in_space(places, found, like=known), "Domains, found without labels")]
    if _keys.DOMAIN_NUMBER in adata.uns:
        drawn = plots.number_of_domains(adata.uns[_keys.DOMAIN_NUMBER])
        figures.append(picture(drawn, "Agreement between domains found in random halves of the cells, by number"))
    sizes = pd.Series(found).value_counts().rename_axis("domain").reset_index(name="cells")
    text, tables = [f"{len(sizes)} domains."], []
    if known is not None:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        figures.append(picture(plots.domains_in_space(places, known, str(labels)), f"{labels} in the table"))
        text.append(
            f"Agreement with {labels}: adjusted Rand index (ARI) {adjusted_rand_score(known, found):.3f}, normalised "
            f"mutual information (NMI) {normalized_mutual_info_score(known, found):.3f}."
        )
    programs = interpret.domain_programs(_log_expression(model), found, list(model.genes))
    if programs.shape[1]:
        tables = [table_of(sizes.merge(interpret.top_genes(programs).rename(columns={"program": "domain"})))]
    return [*sections, Section("Domains", [" ".join(text)], tables, figures)]


def _log_expression(model: SpatialVAE) -> Iterator[np.ndarray]:
    """``dependence.log_expression`` of the model's table, in blocks of rows."""
    counts = model._read(None).cells.counts
    typical = float(np.median(counts.depth[counts.depth > 0]))
    for _, block in counts.blocks():
        yield log_expression(block.toarray(), typical)


def _niches(model: SpatialVAE, labels: str | None, known: np.ndarray | None) -> list[Section]:
    from spatialvae.inference import spatial_blocks

    section = model._read(None)
    if section.graphs is None or section.cells.coordinates is None or not section.graphs.near.nnz:
        return []
    reach = interpret.neighbour_reach(model)
    reach["distances"] = reach["range"] / section.graphs.spacing
    text = [
        "First table, for each dimension: share of z_niche in the variance, and correlation length of z_niche, in the "
        "unit of the coordinates and relative to the median distance between neighbours."
    ]
    names = {
        "niche_share": "niche share",
        "range": "correlation length",
        "distances": "correlation length / neighbour distance",
    }
    tables = [table_of(reach.set_index("dimension")[list(names)].T.rename(names).reset_index(names=""))]
    answers = {} if known is None or labels is None else {labels: known}
    if _keys.DOMAIN in model.adata.obs:
        answers["domain"] = _names(model, _keys.DOMAIN)
    if answers:
        niche, cell = (model.get_latent_representation(which=which) for which in ("niche", "cell"))
        blocks = spatial_blocks(section.cells.coordinates, 25, section.cells.samples)
        tables.append(table_of(interpret.disentanglement(niche, cell, answers, blocks)))
        text.append(
            "Second table: balanced accuracy of predicting labels from z_niche, z_cell and both, in held-out blocks of "
            "the tissue."
        )
    return [Section("Niches", text, tables)]


def _programs(model: SpatialVAE, sets: dict[str, frozenset[str]] | None) -> Section:
    programs = interpret.latent_programs(model)
    shown = programs.iloc[:, :DIMENSIONS_SHOWN]
    table = interpret.top_genes(shown)
    text = (
        "Genes whose share increases and decreases most with each dimension of z_cell. z_niche is the smooth part of "
        "the first dimensions and has the same programs."
    )
    if sets is not None:
        rising = [interpret.ranked_enrichment(shown[name], sets) for name in shown]
        table["sets"] = [
            ", ".join(each.loc[(each["fdr"] < 0.05) & (each["auc"] > 0.5), "set"].head(SETS_SHOWN)) for each in rising
        ]
    figure = plots.programs_map(shown)
    return Section("Gene programs", [text], [table_of(table)], [picture(figure, "Change of log share per unit")])


def _of_others(folder: Path) -> list[Section]:
    found: dict[str, list[Picture]] = {}
    for name, (title, caption) in OTHERS.items():
        if (folder / name).is_file():
            found.setdefault(title, []).append(Picture(_base64((folder / name).read_bytes()), caption))
    return [Section(title, figures=pictures) for title, pictures in found.items()]
