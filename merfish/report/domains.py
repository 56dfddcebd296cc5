"""What ``--embed`` found, for the page of a run: domains on the tissue, their genes, the embedding in the plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from merfish import results
from merfish.exchange.run import count_blocks, read_var
from merfish.plots import colours_of
from merfish.report import figures
from merfish.report.page import Section, Table, picture
from merfish.results import DOMAIN, LATENT, LATENT_NAMES

TOP_GENES = 5
FEWEST_MOLECULES = 10  # of a gene in all cells; of fewer one sees their noise
MOST_DRAWN = 20_000  # cells in the plane


def domain_section(stage: Path, cells: pd.DataFrame, outlines: np.ndarray | None) -> Section:
    """Section of a run whose table has been embedded (`merfish.embedding.embed_run`).

    stage: folder of the results. cells: center_x, center_y (micrometre), in the order of the table of counts; outlines:
    theirs (shapely), or None where there are too many to draw.
    """
    found, niche = read_embedding(stage / results.CELL_BY_GENE)
    colours = colours_of(found)
    names = list(colours)
    sizes = pd.Series(found).value_counts()
    total, genes = domain_counts(stage, found, names)
    top = top_genes(total, genes)
    rows = [
        (name, int(sizes[name]), sizes[name] / len(found), float(molecules), ", ".join(raised))
        for name, molecules, raised in zip(names, total.sum(axis=1) / sizes[names].to_numpy(), top, strict=True)
    ]
    columns = ("domain", "cells", "share of cells", "molecules of genes a cell", "genes raised most")
    formats = {"cells": "{:,}", "share of cells": "{:.1%}", "molecules of genes a cell": "{:.1f}"}
    plane = principal_components(niche)
    places = cells[["center_x", "center_y"]].to_numpy()
    numbers = pd.DataFrame(
        {"x": places[:, 0], "y": places[:, 1], "domain": found, "pc1": plane[:, 0], "pc2": plane[:, 1]}
    )
    drawn = np.random.default_rng(0).permutation(len(found))[:MOST_DRAWN]  # none always lies above another
    text = [
        f"SpatialVAE was trained on the counts and places of the {len(found):,} cells, and {len(names)} domains were "
        "found in its embedding. Genes raised most: those whose share of the molecules in the domain exceeds that in "
        "all other cells by the largest factors."
    ]
    shown = [
        picture("domains", figures.domain_map(places, outlines, found, colours), "Cells by domain", numbers),
        picture(
            "embedding",
            figures.embedding_plane(plane[drawn], found[drawn], colours),
            "Niches of the cells in the embedding, first two principal components, by domain",
        ),
    ]
    return Section("Domains", text, [Table(columns, rows, formats, "domain_table", sortable=True)], shown)


def read_embedding(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Domains (cell,) as text and niches (cell, dimension) of a table of counts: the part that domains are found in."""
    import h5py
    from anndata.io import read_elem

    with h5py.File(path) as file:
        domain, latent = np.asarray(read_elem(file[f"obs/{DOMAIN}"])).astype(str), read_elem(file[f"obsm/{LATENT}"])
        names = read_elem(file[f"uns/{LATENT_NAMES}"]) if LATENT_NAMES in file["uns"] else []
    niche = [k for k, name in enumerate(names) if str(name).startswith("niche")]
    return domain, latent[:, niche] if niche else latent


def domain_counts(stage: Path, domain: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Molecules (domain, gene) of the cells of each domain, and the names of the genes; blanks are left out."""
    code = pd.Categorical(domain, names).codes
    var = read_var(stage)
    total, row = np.zeros((len(names), len(var))), 0
    for _, block in count_blocks(stage):
        chosen = code[row : row + block.shape[0]] == np.arange(len(names))[:, None]
        total += np.asarray(chosen.astype(float) @ block)
        row += block.shape[0]
    gene = ~var["is_blank"].to_numpy(bool)
    return total[:, gene], var.index[gene].to_list()


def top_genes(total: np.ndarray, genes: list[str]) -> list[list[str]]:
    """Genes of each domain whose share is higher than in the others, highest factor first; total: (domain, gene)."""
    rest = total.sum(axis=0) - total
    share, other = ((counts + 0.5) / (counts.sum(axis=1, keepdims=True) + 0.5) for counts in (total, rest))
    factor = np.where(total.sum(axis=0) >= FEWEST_MOLECULES, share / other, 0.0)
    return [[genes[k] for k in np.argsort(-row, kind="stable")[:TOP_GENES] if row[k] > 1] for row in factor]


def principal_components(latent: np.ndarray) -> np.ndarray:
    """The first two (cell, 2) of an embedding (cell, dimension); zeros where it has fewer dimensions."""
    centred = latent - latent.mean(axis=0, dtype=float)
    plane = np.zeros((len(latent), 2))
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :2]
    plane[:, : axes.shape[1]] = centred @ axes
    return plane
