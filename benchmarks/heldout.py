"""Held-out counts and cells, and cell types: SpatialVAE compared with scVI.

    python benchmarks/heldout.py DATA                  # SpatialVAE alone
        python benchmarks/heldout.py DATA --peers FOLDER   # also scVI, in a separate environment (--cache DIR)

With --only, only the named figures. DATA contains spatial_tables/ and single_cell/; osmFISH is bundled with the
package. Writes benchmarks/results/heldout.md and, for all figures with scVI, heldout.png. FOLDER stores tables and
scVI's results, and existing files are reused. Cell types need the extra [analysis]: pip install -c constraints.txt -e
'.[vae,analysis]'.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from a second thread

import argparse
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from clusters import communities, neighbour_graph
from heldout_tables import HELD_OUT, LEAST, REMOVED, dense, sections, split
from matplotlib.figure import Figure
from peers.embed import CACHE, deliver
from scipy.special import xlogy
from sklearn.metrics import normalized_mutual_info_score
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE

LABELLED = ("hypothalamus", "osmfish")
THINNED = ("hypothalamus", "mop1", "osmfish")
FIGURES = ("types", "cells", "counts", "transfer")
LATENT = 10  # dimensions of z, the same for scVI
RESOLUTIONS = np.geomspace(0.1, 4, 12)

Row = tuple[str, str, str, int, float]  # figure, section, method, seed, value


def trained(table: anndata.AnnData, seed: int, layer: str | None = None, **sizes: int) -> SpatialVAE:
    """Build our model with scVI's likelihood, so that the comparison does not depend on the likelihood."""
    SpatialVAE.setup_anndata(table, layer=layer, spatial_key="spatial" if "spatial" in table.obsm else None)
    model = SpatialVAE(table, seed=seed, gene_likelihood="nb", **sizes)
    model.train(seed=seed, progress=False)
    return model


def best_nmi(latent: np.ndarray, kinds: pd.Series, seed: int) -> float:
    """Score Leiden at the resolution that fits the labels best."""
    graph = neighbour_graph(latent)
    return max(normalized_mutual_info_score(kinds, communities(graph, r, seed)) for r in RESOLUTIONS)


def deviance(table: anndata.AnnData, share: np.ndarray) -> float:
    """Return the mean Poisson deviance per entry of the thinned counts; ``share`` (cell, gene) is the expectation."""
    left = dense(table.layers["thinned"])
    removed = dense(table.X) - left
    expected = share * left.sum(1, keepdims=True) * REMOVED / (1 - REMOVED)
    return float(2 * (xlogy(removed, removed / expected) - removed + expected).mean())


def of_spatialvae(
    tables: dict[str, anndata.AnnData], seed: int, samples: int, figures: tuple[str, ...]
) -> Iterator[Row]:
    """Return ``figures`` of our model for one seed."""
    for name in LABELLED if "types" in figures else ():
        latent = trained(tables[name], seed).get_latent_representation(which="cell")
        yield "types", name, "SpatialVAE", seed, best_nmi(latent, tables[name].obs["kind"], seed)
    for name in HELD_OUT if "cells" in figures else ():
        rest, held = split(tables[name])
        model = trained(rest, seed, n_latent=LATENT)
        yield "cells", name, "SpatialVAE", seed, model.get_marginal_ll(held, samples, seed)
        if "spatial" in rest.obsm:
            given = model.get_marginal_ll(held, samples, seed, given=rest)
            yield "cells", name, "SpatialVAE, given neighbours", seed, given
    for name in THINNED if "counts" in figures else ():
        share = trained(tables[name], seed, layer="thinned", n_latent=LATENT).get_normalized_expression().to_numpy()
        yield "counts", name, "SpatialVAE", seed, deviance(tables[name], share)
    if "transfer" not in figures:
        return
    rest, held = split(tables["mop10"])
    for where, model in {"slice 1": trained(tables["mop1"], seed), "slice 10": trained(rest, seed)}.items():
        yield "transfer", "without neighbours", where, seed, model.get_marginal_ll(held, samples, seed)
        yield "transfer", "given neighbours", where, seed, model.get_marginal_ll(held, samples, seed, given=rest)


def of_scvi(
    tables: dict[str, anndata.AnnData], folder: Path, seeds: int, cache: Path, figures: tuple[str, ...]
) -> Iterator[Row]:
    """Return ``figures`` of scVI, run if ``folder`` lacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"types": ("scVI", LABELLED), "cells": ("scVI_heldout", HELD_OUT), "counts": ("scVI_thinned", THINNED)}
    for method, names in (runs[figure] for figure in figures if figure in runs):
        for name in names:
            path = folder / f"{name}.h5ad"
            if not path.exists():
                tables[name].write_h5ad(path)
            deliver(path, folder, [method], seeds, cache)
            for seed in range(seeds):
                found = np.load(folder / f"{name}-{method}-{seed}.npy", allow_pickle=False)
                if method == "scVI":
                    yield "types", name, "scVI", seed, best_nmi(found, tables[name].obs["kind"], seed)
                elif method == "scVI_heldout":
                    yield "cells", name, "scVI", seed, float(found.mean())
                else:
                    yield "counts", name, "scVI", seed, deviance(tables[name], found)


def of_shares(tables: dict[str, anndata.AnnData]) -> Iterator[Row]:
    """Predict thinned counts from the overall share of each gene, without a model."""
    for name in THINNED:
        left = dense(tables[name].layers["thinned"])
        share = np.broadcast_to(left.sum(0) / left.sum(), left.shape)
        yield "counts", name, "shares of all cells", 0, deviance(tables[name], share)


def summary(rows: pd.DataFrame, figure: str, digits: int) -> str:
    """Return median, minimum and maximum over seeds, by section and method."""
    part = rows[rows["figure"] == figure]

    def told(values: pd.Series) -> str:
        median, least, most = (f"{v:.{digits}f}" for v in (values.median(), values.min(), values.max()))
        return median if least == most else f"{median} ({least} to {most})"

    wide = part.pivot_table(index="method", columns="section", values="value", aggfunc=told, sort=False)
    return as_markdown(wide.fillna("").reset_index())


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Plot every seed as a dot; likelihoods as differences from scVI's median."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = {"SpatialVAE": "#2563eb", "SpatialVAE, given neighbours": "#7c3aed", "scVI": "#ea580c"}
    titles = {
        "types": "cell types: NMI of leiden (higher is better)",
        "cells": "held-out cells: log p relative to scVI's, nats per cell (higher is better)",
        "counts": "held-out counts: deviance over scVI's (lower is better)",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        part = rows[(rows["figure"] == name) & rows["method"].isin(colours)]
        places = {section: i for i, section in enumerate(part["section"].unique())}
        for i, (method, colour) in enumerate(colours.items()):
            for section, place in places.items():
                here = part[part["section"] == section]
                values = here.loc[here["method"] == method, "value"].to_numpy()
                base = here.loc[here["method"] == "scVI", "value"].median()
                values = values - base if name == "cells" else values / base if name == "counts" else values
                ax.scatter(place + 0.18 * (i - 1) + np.zeros(len(values)), values, s=22, color=colour, alpha=0.7)
        if name != "types":
            ax.axhline(0 if name == "cells" else 1, color="#94a3b8", lw=0.8, zorder=0)
        ax.set_xticks(list(places.values()), list(places))
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    for method, colour in colours.items():
        axes[1].scatter([], [], s=22, color=colour, label=method)
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def page(rows: pd.DataFrame, seeds: int, samples: int, figures: tuple[str, ...], command: str) -> str:
    """Return the whole page."""
    text = f"""# Cell types, held-out cells and held-out counts

Made by `{command}`. {seeds} seeds: median (least to largest). All cells with at
least {LEAST} counts. scVI: scvi-tools 1.4.2, one environment for all figures, pins in `benchmarks/peers/scvi.txt`.
"""
    told = {"types": of_types, "cells": of_cells, "counts": of_counts, "transfer": of_transfer}
    return text + "".join(told[figure](rows, samples) for figure in figures)


def of_types(rows: pd.DataFrame, samples: int) -> str:
    grid = f"{len(RESOLUTIONS)} resolutions from {RESOLUTIONS[0]:g} to {RESOLUTIONS[-1]:g}"
    return f"""
## Cell types

NMI of Leiden clusters (15 neighbours, the best of {grid}) of `z_cell` and of scVI's latent space, both
models with their defaults, trained on all cells without labels.

{summary(rows, "types", 3)}
"""


def of_cells(rows: pd.DataFrame, samples: int) -> str:
    return f"""
## Held-out cells

Mean log p(x_i) of {REMOVED:.0%} of the cells, the same for both, in nats per cell, given their total counts; NB,
{LATENT} latent dimensions. Importance samples: {samples:,} for SpatialVAE, from its approximate posterior
(`spatialvae/evidence.py`); 1,000 for scVI, from q(z | x_i) with its standard deviations 1.3 times as wide. scVI is used
with its defaults and early stopping. "SpatialVAE" and "scVI" use only the counts of the cell itself. "given neighbours"
is another quantity, log p(x_i | counts of the training cells), with the field that these predict at the position of the
held-out cell.

{summary(rows, "cells", 2)}
"""


def of_counts(rows: pd.DataFrame, samples: int) -> str:
    return f"""
## Held-out counts

{REMOVED:.0%} of the molecules were removed by binomial thinning; the models were trained on the rest (NB, {LATENT}
latent dimensions). Mean Poisson deviance per entry of the removed counts from their expected values: the model's share
of the gene times the cell's remaining total times {REMOVED:g} / {1 - REMOVED:g}. The Poisson deviance depends on the
mean only. SpatialVAE at posterior means, which depend on the neighbours; scVI averaged over 25 draws.

{summary(rows, "counts", 4)}
"""


def of_transfer(rows: pd.DataFrame, samples: int) -> str:
    transfer = rows[rows["figure"] == "transfer"].groupby(["section", "method"], sort=False)["value"].median().unstack()
    ratio = transfer["slice 1"] / transfer["slice 10"]
    ratios = ", ".join(f"{value:.4f} {name}" for name, value in ratio.items())
    return f"""
## A new section

Mean log p(x_i) of the held-out cells of MOp slice 10 under a model trained on slice 1, and under one trained on the
other cells of slice 10; given neighbours: given those other cells. Defaults.

{summary(rows, "transfer", 2)}

Ratio of the medians, slice 1 to slice 10 (log p is negative, so that values above 1 are worse): {ratios}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000, help="importance samples of SpatialVAE")
    parser.add_argument("--peers", type=Path, help="folder for tables and results of scVI")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of environments")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    options = parser.parse_args()
    figures, tables = tuple(options.only), sections(options.data)
    rows = list(of_shares(tables)) if "counts" in figures else []
    if options.peers:
        rows += of_scvi(tables, options.peers, options.seeds, options.cache, figures)
    for seed in range(options.seeds):
        rows += of_spatialvae(tables, seed, options.samples, figures)
    table = pd.DataFrame(rows, columns=["figure", "section", "method", "seed", "value"])
    command = f"python benchmarks/heldout.py DATA{' --peers FOLDER' * bool(options.peers)} --seeds {options.seeds}"
    command += f" --samples {options.samples}" + (f" --only {' '.join(figures)}" if figures != FIGURES else "")
    (RESULTS / "heldout.md").write_text(page(table, options.seeds, options.samples, figures, command))
    if options.peers and figures == FIGURES:
        picture(table, RESULTS / "heldout.png")
    print((RESULTS / "heldout.md").read_text())


if __name__ == "__main__":
    main()
