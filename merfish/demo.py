"""Demonstration: real fields, a simulated tissue scored against its truth, embeddings, and one report.

This module and `merfish.embedding` are the only ones that use `spatialvae`, through its public functions, which are
imported when they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely

from merfish import plots, results
from merfish.codebook import Codebook
from merfish.config import RunConfig
from merfish.embedding import SEED, fit_embedding, need_embedding
from merfish.report import Section, Table, figures, picture, run_sections, write_report
from merfish.report.domains import principal_components

if TYPE_CHECKING:
    from anndata import AnnData

N_PERMUTED = 20  # codebooks with permuted bits
EXCESS = "(genes - blanks) / sqrt(genes + blanks)"  # of calls; a ratio of so few calls is less informative
TISSUE_DOMAINS = 3
OSMFISH_REGIONS = 11
EPOCHS = 25  # maximum number of training epochs, so that the demonstration takes about a minute
MATCH_MICRONS = 0.25  # a call is right if a true molecule of its gene lies within this distance
CELL_OVERLAP = 0.5  # intersection over union above which a true cell counts as found


def run_demo(out: Path, *, fields: tuple[int, int] = (4, 4), shape: tuple[int, int] = (512, 512)) -> Path:
    """Run all steps, write the results to ``out`` and return the path of the report.

    fields: (rows, columns) of the simulated tissue; shape: (y, x) of its fields, pixel. Raises InputError if a package
    that the embedding needs is missing.
    """
    started = time.perf_counter()
    need_embedding("the demo")
    out.mkdir(parents=True, exist_ok=True)
    # the cortex needs nothing of the other steps, and these keep one core busy for most of the time
    with ProcessPoolExecutor(1, get_context("spawn")) as beside:
        cortex = beside.submit(embed_cortex, out)
        sections = [
            *_stage("1/4 real MERFISH fields", lambda: real_fields(out)),
            *_stage("2/4 a simulated tissue", lambda: simulated_tissue(out, fields, shape)),
            *_stage("3/4 embedding of the tissue", lambda: [embed_tissue(out)]),
            *_stage("4/4 embedding of a real cortex", lambda: [cortex.result()]),
        ]
    lead = (
        f"Made by “merfish demo” in {time.perf_counter() - started:.0f} s: real data that are included in the package, "
        "and a simulated tissue whose truth is known."
    )
    page = write_report(out / results.REPORT, "MERFISH from raw images to neighbourhoods", lead, sections)
    print(f"done in {time.perf_counter() - started:.0f} s; open {page}")
    return page


def _stage(title: str, work: Callable[[], list[Section]]) -> list[Section]:
    """Print the title of a stage, do its work, and print the first table of its first section."""
    print(f"\n{title}")
    sections = work()
    table = sections[0].tables[0]
    _print_table(table.columns, table.rows)
    return sections


# --- real fields ------------------------------------------------------------------------------------------------


def real_fields(out: Path) -> list[Section]:
    """Run the bundled raw experiment, and decode its fields with permuted codebooks as a control."""
    from merfish import datasets
    from merfish.pipeline import run

    folder = out / "real"
    run(datasets.merfish_raw(), out=folder, progress=True)
    rows, pictures = [], []
    for fov, control in permuted_controls(datasets.merfish_raw(), folder).items():
        real, permuted = control.iloc[0], control.iloc[1:]
        rows.append(
            (
                fov,
                f"{real.genes:.0f} / {real.blanks:.0f}",
                f"{real.excess:.1f}",
                f"{permuted.genes.min():.0f}-{permuted.genes.max():.0f}",
                f"{permuted.excess.min():.1f} to {permuted.excess.max():.1f}",
                "yes" if real.excess > permuted.excess.max() and real.genes > permuted.genes.max() else "NO",
            )
        )
        figure = plots.permuted_control(real.excess, permuted.excess.tolist(), EXCESS, f"field {fov}")
        pictures.append(
            picture(f"permuted_{fov}", figure, f"Field {fov}: the real codebook against {len(permuted)} permuted ones")
        )
    columns = ("field", "genes / blanks called", "excess", "genes, permuted", "excess, permuted", "above control")
    text = [
        "Two fields of view from a real experiment, 128 x 128 px, 8 rounds, 16 bits, 70 genes and 70 blanks. Blanks "
        "are words that are not assigned to any RNA, so every call of a blank is an error; here, half of all words are "
        "blanks.",
        "Control: the same images decoded with codebooks whose bits were permuted. Their gene words are not assigned "
        "to any RNA either, so genes and blanks should be called equally often; only with the real codebook should "
        f"there be more genes. Excess: {EXCESS}; by chance it has mean 0 and standard deviation 1, for any number of "
        "calls.",
    ]
    first = Section("Real fields: genes against blanks", text, [Table(columns, rows)], pictures)
    return [first, *_titled("Real fields", run_sections(folder))]


def permuted_controls(experiment: Path, folder: Path) -> dict[int, pd.DataFrame]:
    """Calls of genes and blanks in each field, see `count_calls`; the first row is of the real codebook."""
    from merfish.imaging.field import register_field
    from merfish.imaging.opening import open_experiment
    from merfish.pipeline.survey import read_calibration

    source, config = open_experiment(experiment), RunConfig()
    calibration = read_calibration(folder)
    rng = np.random.default_rng(SEED)
    books = [source.codebook]
    books += [source.codebook.permuted(rng.permutation(source.codebook.n_bits)) for _ in range(N_PERMUTED)]
    return {
        fov: pd.DataFrame([count_calls(field.bits, book, calibration.normalization) for book in books])
        for fov in source.fovs
        for field in [register_field(source, fov, config, calibration)]
    }


def count_calls(bits: np.ndarray, codebook: Codebook, normalization: Any) -> dict[str, float]:
    """Numbers of calls of genes and of blanks that are more likely right than wrong, and their `EXCESS`."""
    from merfish.calls.filtering import rate_calls
    from merfish.decoding.methods import decode_filtered

    calls = rate_calls(decode_filtered(bits, codebook, normalization), codebook)
    calls = calls[calls["probability"] > 0.5]
    blanks = int(calls["is_blank"].sum())
    excess = (len(calls) - 2 * blanks) / max(len(calls), 1) ** 0.5
    return {"genes": len(calls) - blanks, "blanks": blanks, "excess": excess}


# --- simulated tissue -------------------------------------------------------------------------------------------


def simulated_tissue(out: Path, fields: tuple[int, int], shape: tuple[int, int]) -> list[Section]:
    """Simulate a raw experiment, run it, and score molecules, cells and counts against the truth."""
    from merfish.cells.counts import read_cells
    from merfish.pipeline import run
    from merfish.simulate import simulate_experiment

    raw, folder = out / "tissue", out / "tissue_run"
    if not raw.exists():
        simulate_experiment(raw, fields=fields, shape=shape, seed=SEED, progress=True)
    table = run(raw, out=folder, progress=True)
    score = score_run(folder, raw)
    rows = [
        ("molecules found (recall)", f"{score['recall']:.3f}"),
        ("molecules correct (precision)", f"{score['precision']:.3f}"),
        ("median position error", f"{score['median_error']:.3f} µm"),
        ("cells found", f"{score['cells_found']:.3f} of {score['n_cells']}"),
        ("counts of each cell and gene, Pearson r", f"{score['count_r']:.3f}"),
    ]
    truth = read_cells(raw / "truth" / "cells.parquet")
    domain = truth["domain"].astype(str).to_numpy()
    shown = [
        picture(
            "counts_against_truth",
            plots.scatter_counts(score["measured"], score["true"], f"r = {score['count_r']:.3f}"),
            "Counts against truth",
            pd.DataFrame({"true": score["true"].ravel(), "measured": score["measured"].ravel()}),
        ),
        picture(
            "true_domains",
            figures.domain_map(truth["geometry"].to_numpy(), domain, plots.colours_of(domain)),
            "The simulated tissue: cells by their true domain",
            truth.drop(columns="geometry"),
        ),
    ]
    text = [
        f"{fields[0]} x {fields[1]} overlapping fields of {shape[0]} x {shape[1]} px with drift, beads, stains and the "
        "bit errors of real experiments (1->0 10 %, 0->1 4 %), processed like any raw experiment and compared with the "
        f"simulated truth. {table.n_obs} cells were segmented."
    ]
    return [
        Section("Simulated tissue against its truth", text, [Table(("measure", "value"), rows)], shown),
        *_titled("Simulated tissue", run_sections(folder)),
    ]


def score_run(folder: Path, raw: Path) -> dict[str, Any]:
    """Score molecules, cells and counts of a run against the truth of a simulated experiment."""
    import anndata

    from merfish.cells.counts import read_cells
    from merfish.simulate import match_calls
    from merfish.transcripts import read_transcripts

    calls = read_transcripts(folder / results.TRANSCRIPTS)
    truth = pd.read_parquet(raw / "truth" / "molecules.parquet")
    paired, real = match_calls(_in_microns(calls), _in_microns(truth), radius=MATCH_MICRONS)
    # partners may lie in the margin, so that neither calls nor molecules are penalised at the border
    inner_calls, inner_truth = in_fields(calls, raw), in_fields(truth, raw)
    error = np.hypot(*(calls[k].to_numpy()[paired] - truth[k].to_numpy()[real] for k in ("global_x", "global_y")))
    score: dict[str, Any] = {
        "recall": inner_truth[real].sum() / inner_truth.sum(),
        "precision": inner_calls[paired].sum() / inner_calls.sum(),
        "median_error": float(np.median(error)),
    }
    cells = read_cells(folder / results.CELLS)
    true_cells = read_cells(raw / "truth" / "cells.parquet")
    match = match_cells(cells["geometry"].to_numpy(), true_cells["geometry"].to_numpy())
    table = anndata.read_h5ad(folder / results.CELL_BY_GENE)
    true_table = anndata.read_h5ad(raw / "truth" / "cell_by_gene.h5ad")
    genes = true_table.var_names[~true_table.var["is_blank"].to_numpy(bool)]
    true = true_table[:, genes].X.toarray()
    measured = np.zeros_like(true)
    found = match >= 0
    measured[found] = table[match[found]][:, genes].X.toarray()
    score |= {
        "n_cells": len(true_cells),
        "cells_found": float(found.mean()),
        "count_r": float(np.corrcoef(measured.ravel(), true.ravel())[0, 1]),
        "true": true,
        "measured": measured,
        "domain_of_cell": {int(match[k]): str(true_cells["domain"].iloc[k]) for k in np.flatnonzero(found)},
    }
    return score


def in_fields(molecules: pd.DataFrame, raw: Path, margin: int = 10) -> np.ndarray:
    """Return whether molecules lie in any field, at least ``margin`` px inside the outer border; bool (molecule,)."""
    from merfish.imaging.opening import open_experiment

    source = open_experiment(raw)
    width, height = source.image_dimensions or (0, 0)
    low = source.positions.min(axis=0) + margin * source.microns_per_pixel
    high = source.positions.max(axis=0) + (np.array([width, height]) - 1 - margin) * source.microns_per_pixel
    x, y = molecules["global_x"].to_numpy(), molecules["global_y"].to_numpy()
    return (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1])


def _in_microns(molecules: pd.DataFrame) -> pd.DataFrame:
    return molecules[["barcode_id"]].assign(x=molecules["global_x"], y=molecules["global_y"]).reset_index(drop=True)


def match_cells(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Row (true cell,) of the found cell whose intersection over union with each true one exceeds 0.5, or -1.

    found, true: (cell,) shapely polygons. At most one found cell overlaps a true one by more than 0.5.
    """
    match = np.full(len(true), -1)
    if not len(found):
        return match
    t, f = shapely.STRtree(found).query(true, predicate="intersects")
    common = shapely.area(shapely.intersection(true[t], found[f]))
    good = common / (shapely.area(true[t]) + shapely.area(found[f]) - common) > CELL_OVERLAP
    match[t[good]] = f[good]
    return match


# --- embeddings -------------------------------------------------------------------------------------------------


def embed_tissue(out: Path) -> Section:
    """Embed the cells of the simulated run and compare the domains found with the true ones."""
    import anndata

    from merfish.cells.counts import read_cells

    table = anndata.read_h5ad(out / "tissue_run" / results.CELL_BY_GENE)
    table = table[:, ~table.var["is_blank"].to_numpy(bool)].copy()
    table = table[np.asarray(table.X.sum(axis=1)).ravel() > 0].copy()
    cells = read_cells(out / "tissue_run" / results.CELLS).set_index("cell_id")
    domain_of = score_run(out / "tissue_run", out / "tissue")["domain_of_cell"]
    rows = np.flatnonzero(np.isin(table.obs["cell_id"], cells.index))
    by_row = {cell_id: domain_of.get(row, "") for row, cell_id in enumerate(cells.index)}
    truth = np.array([by_row[cell_id] for cell_id in table.obs["cell_id"]])[rows]
    section = embed("Embedding of the simulated tissue", table, TISSUE_DOMAINS, truth, "true domain", "tissue")
    table.write_h5ad(out / "tissue_embedded.h5ad")
    return section


def embed_cortex(out: Path) -> Section:
    """Embed the bundled osmFISH cortex and compare the domains found with the annotated regions."""
    from merfish import datasets

    table = datasets.osmfish()
    regions = table.obs["Region"].astype(str).to_numpy()
    title = "Embedding of a real cortex (osmFISH)"
    section = embed(title, table, OSMFISH_REGIONS, regions, "annotated region", "cortex", progress=False)
    table.write_h5ad(out / "osmfish_embedded.h5ad")
    return section


def embed(
    title: str,
    table: AnnData,
    n_domains: int,
    truth: np.ndarray,
    truth_name: str,
    name: str,
    *,
    progress: bool = True,
) -> Section:
    """Train a model on a table of counts, find domains, compare them with ``truth`` ("" = unknown), and plot them.

    name: start of the names of the figure files.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    from spatialvae import plots as embedding_plots

    started = time.perf_counter()
    model = fit_embedding(table, n_domains, max_epochs=EPOCHS, neighbours=False, progress=progress)
    seconds = time.perf_counter() - started
    labels = table.obs["spatial_domain"].astype(str).to_numpy()
    known = truth != ""
    agreement = (
        adjusted_rand_score(truth[known], labels[known]),
        normalized_mutual_info_score(truth[known], labels[known]),
    )
    rows = [
        ("cells, genes", f"{table.n_obs:,}, {table.n_vars}"),
        ("adjusted Rand index", f"{agreement[0]:.3f}"),
        ("normalised mutual information", f"{agreement[1]:.3f}"),
        (f"training, at most {EPOCHS} epochs, and embedding", f"{seconds:.0f} s"),
    ]
    x, y = np.asarray(table.obsm["spatial"])[:, :2].T
    true_colours = plots.colours_of(truth[known])
    colours = plots.matching_colours(labels, truth, true_colours)
    first, second = principal_components(np.asarray(table.obsm["X_spatialvae"], float)).T
    numbers = pd.DataFrame({"x": x, "y": y, truth_name: truth, "domain": labels, "pc1": first, "pc2": second})
    truth_map = plots.labels_by_place(x, y, truth, truth_name, true_colours)
    found_map = plots.labels_by_place(x, y, labels, "domains found", colours)
    latent_map = plots.labels_by_place(first, second, labels, "principal components of the latent space", colours)
    training = embedding_plots.training_curve(model.training_log)
    shown = [
        picture(f"{name}_truth", truth_map, f"Cells by their {truth_name}", numbers),
        picture(f"{name}_domains", found_map, f"Cells by domain, in the colour of the best matching {truth_name}"),
        picture(f"{name}_latent", latent_map, "Cells in the latent space, by the domain found"),
        picture(f"{name}_training", training, "Training", model.training_log, "wide"),
    ]
    text = [
        f"SpatialVAE was trained on counts and positions only; {n_domains} domains were then found in its latent "
        f"space and compared with the {truth_name}s, which were not used in training."
    ]
    return Section(title, text, [Table(("measure", "value"), rows)], shown)


# --- printing ---------------------------------------------------------------------------------------------------


def _titled(prefix: str, sections: list[Section]) -> list[Section]:
    start = prefix.lower().replace(" ", "_")
    return [
        replace(
            section,
            title=f"{prefix}: {section.title[0].lower()}{section.title[1:]}",
            tables=[replace(table, name=table.name and f"{start}_{table.name}") for table in section.tables],
            figures=[replace(figure, name=f"{start}_{figure.name}") for figure in section.figures],
        )
        for section in sections
    ]


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table as ConsoleTable

    table = ConsoleTable(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
