"""Section on spatial domains: their map, their genes, and the embedding in two dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from merfish import results
from merfish._parquet import read_table
from merfish.exchange.run import count_blocks, read_var
from merfish.plots import colours_of
from merfish.report import figures
from merfish.report.page import Section, Table, picture
from merfish.report.run import Run
from merfish.report.summary import Squares, most_frequent
from merfish.results import DOMAIN, LATENT, LATENT_NAMES

TOP_GENES = 5
FEWEST_MOLECULES = 10  # of a gene in all cells; with fewer, counting noise dominates
MOST_DRAWN = 20_000  # cells in the plot of the embedding


def domain_section(run: Run) -> Section | None:
    """Return the section on domains of a run with an embedding (`merfish.embedding.embed_run`), None for other runs."""
    if "embedding" not in run.record:
        return None
    found, niche = read_embedding(run.stage / results.CELL_BY_GENE)
    colours = colours_of(found)
    names = list(colours)
    code = pd.Categorical(found, names).codes.astype(np.int64)
    sizes = np.bincount(code, minlength=len(names))
    total, genes = domain_counts(run.stage, code, len(names))
    rows = [
        (name, int(size), size / len(found), float(molecules), ", ".join(raised))
        for name, size, molecules, raised in zip(
            names, sizes, total.sum(axis=1) / sizes, top_genes(total, genes), strict=True
        )
    ]
    columns = ("domain", "cells", "share of cells", "molecules of genes per cell", "genes raised most")
    formats = {"cells": "{:,}", "share of cells": "{:.1%}", "molecules of genes per cell": "{:.1f}"}
    text = [
        f"SpatialVAE was trained on the counts and positions of the {len(found):,} cells, and {len(names)} domains "
        "were found in its embedding. Genes raised most: those whose share of the molecules in the domain exceeds "
        "their share in all other cells by the largest factors."
    ]
    centres = read_table(run.stage / results.CELLS, ["center_x", "center_y"])
    places = np.column_stack([column.to_numpy() for column in centres.columns])
    plane = principal_components(niche)
    numbers = pd.DataFrame(
        {"x": places[:, 0], "y": places[:, 1], "domain": found, "pc1": plane[:, 0], "pc2": plane[:, 1]}
    )
    if run.outlines is None:
        caption = "The domain of most cells in each square"
        squares = Squares.for_cells(len(places), *run.corners)
        tissue = figures.domain_squares(most_frequent(squares, places, code, len(names)), squares, colours)
    else:
        caption = "Cells by domain"
        tissue = figures.domain_map(run.outlines, found, colours)
    drawn = np.random.default_rng(0).permutation(len(found))[:MOST_DRAWN]  # in random order: no domain hides another
    shown = [
        picture("domains", tissue, caption, numbers),
        picture(
            "embedding",
            figures.embedding_plane(plane[drawn], found[drawn], colours),
            "First two principal components of the niche dimensions of the embedding, by domain",
        ),
    ]
    return Section("Domains", text, [Table(columns, rows, formats, "domain_table", sortable=True)], shown)


def read_embedding(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read domains (cell,) as text, and the niche dimensions (cell, dimension) of the embedding, from a count table."""
    import h5py
    from anndata.io import read_elem

    with h5py.File(path) as file:
        domain, latent = np.asarray(read_elem(file[f"obs/{DOMAIN}"])).astype(str), read_elem(file[f"obsm/{LATENT}"])
        names = read_elem(file[f"uns/{LATENT_NAMES}"]) if LATENT_NAMES in file["uns"] else []
    niche = [k for k, name in enumerate(names) if str(name).startswith("niche")]
    return domain, latent[:, niche] if niche else latent


def domain_counts(stage: Path, code: np.ndarray, n_domains: int) -> tuple[np.ndarray, list[str]]:
    """Sum the molecules in the cells of each domain (domain, gene); also returns the genes' names. Blanks are omitted.

    code: (cell,), index of the domain of each cell of the table in the folder ``stage``.
    """
    var = read_var(stage)
    total, row = np.zeros((n_domains, len(var))), 0
    for _, block in count_blocks(stage):
        chosen = code[row : row + block.shape[0]] == np.arange(n_domains)[:, None]
        total += np.asarray(chosen.astype(float) @ block)
        row += block.shape[0]
    gene = ~var["is_blank"].to_numpy(bool)
    return total[:, gene], var.index[gene].to_list()


def top_genes(total: np.ndarray, genes: list[str]) -> list[list[str]]:
    """Return each domain's genes with a higher share than in all others, highest ratio first; total: (domain, gene)."""
    rest = total.sum(axis=0) - total
    share, other = ((counts + 0.5) / (counts.sum(axis=1, keepdims=True) + 0.5) for counts in (total, rest))
    factor = np.where(total.sum(axis=0) >= FEWEST_MOLECULES, share / other, 0.0)
    return [[genes[k] for k in np.argsort(-row, kind="stable")[:TOP_GENES] if row[k] > 1] for row in factor]


def principal_components(latent: np.ndarray) -> np.ndarray:
    """Return the first two principal components (cell, 2) of (cell, dimension); the second is 0 for one dimension."""
    centred = latent - latent.mean(axis=0, dtype=float)
    plane = np.zeros((len(latent), 2))
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :2]
    plane[:, : axes.shape[1]] = centred @ axes
    return plane
