"""Commands on neighbouring types, dependence between genes, and figures of an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spatialvae.cli.files import latent_names, read_table, status, write_csv, write_figure
from spatialvae.cli.options import Labels, Places, Sections, Table
from spatialvae.errors import InputError


def neighbours(
    table: Table,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Folder for couplings.csv and couplings.png.", metavar="DIR")],
    spatial_key: Places = "spatial",
    sample_key: Sections = None,
) -> None:
    """Find types that are neighbours more or less often than their abundances predict, by a Potts model of the labels.

    Standard errors are estimated from blocks of the tissue, so that they account for gradients.
    """
    adata = read_table(table)
    from spatialvae import plots
    from spatialvae.data import graphs_of
    from spatialvae.inference import spatial_blocks
    from spatialvae.potts import fit_potts, interactions
    from spatialvae.setup import Setup, read_codes, read_places

    types, names = read_codes(adata, labels)
    places, samples = read_places(adata, Setup(None, spatial_key, sample_key))
    with status("finding neighbours and fitting couplings"):
        adjacency = graphs_of(places, samples).near
        found = interactions(fit_potts(types, adjacency, blocks=spatial_blocks(places, 25, samples)), names)
    write_csv(found, out / "couplings.csv")
    write_figure(plots.couplings(found), out / "couplings.png")
    certain = found[found["fdr"] < 0.05]
    typer.echo(f"{len(certain)} of {len(found)} pairs have a coupling at an FDR of 5 %. Written to {out}")
    for row in certain.head(10).to_dict("records"):
        verb = "more" if row["coupling"] > 0 else "less"
        size = f"{row['coupling']:+.2f} +- {row['error']:.2f} nats per edge"
        typer.echo(f"  {row['label']} and {row['neighbour']}, neighbours {verb} often than expected: {size}")


def dependence(
    table: Table,
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.", metavar="DIR")],
    layer: Annotated[str | None, typer.Option(help="Layer with counts. [default: X]")] = None,
    spatial_key: Places = "spatial",
    sample_key: Sections = None,
    labels: Annotated[str | None, typer.Option(help="Column of obs with the type of each cell.", metavar="KEY")] = None,
    genes: Annotated[int, typer.Option(min=3, help="Number of genes; the most variable are used.")] = 60,
    max_false: Annotated[float, typer.Option(min=0.01, help="Largest expected number of wrong edges.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the thinning and of the halves.")] = 0,
) -> None:
    """Find genes that depend on each other given all others and the neighbours; with --labels, effects of neighbours.

    Write edges.csv and edges_without_neighbours.csv, with --labels also variance.csv and neighbour_effects.csv, and
    their figures.
    """
    adata = read_table(table)
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
    near, blocks = graphs.near, spatial_blocks(cells.coordinates, 50, cells.samples)
    counts = cells.counts.dense(np.arange(cells.n_cells))
    chosen = model.most_variable(counts, genes)
    names = [cells.genes[gene] for gene in chosen]
    found = []
    for of, name in ((near, "edges"), (None, "edges_without_neighbours")):
        with status("selecting stable " + name.replace("_", " ")):
            found.append(model.partial_correlations(counts[:, chosen], blocks, of, cells.depth, names, max_false, seed))
        write_csv(found[-1], out / f"{name}.csv")
    write_figure(plots.dependence_graph(*found), out / "edges.png")
    typer.echo(f"{len(found[0])} edges between {len(names)} genes given the neighbours, {len(found[1])} without them.")
    if labels is not None:
        expression = model.log_expression(counts)
        niche = graphs.wide.adjacency() @ np.eye(len(kinds))[types]  # types of the neighbours, without an embedding
        if _keys.LATENT in adata.obsm:
            niche = np.asarray(adata.obsm[_keys.LATENT])
            niche = niche[:, [name.startswith("niche") for name in latent_names(table, niche.shape[1])]]
        shares = model.variance_shares(expression, types, niche, near, blocks, cells.genes)
        write_csv(shares, out / "variance.csv")
        write_figure(plots.variance_bars(shares), out / "variance.png")
        try:
            with status("testing effects of neighbours"):
                effects = model.neighbour_effects(
                    expression, types, near, cells.coordinates, kinds, cells.genes, cells.samples
                )
        except InputError as reason:  # the table is valid, but too small for these tests
            typer.echo(f"Effects of neighbours were not tested: {reason}.")
        else:
            write_csv(effects, out / "neighbour_effects.csv")
            write_figure(plots.effects(effects), out / "neighbour_effects.png")
            typer.echo(f"{int((effects['fdr'] < 0.1).sum())} effects of neighbours at an FDR of 10 %.")
    typer.echo(f"Written to {out}")


def latent(
    table: Table,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Figure to write: .png, .pdf or .svg.")],
    key: Annotated[str, typer.Option(help="Key of the embedding in obsm.")] = "X_spatialvae",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the choice of cells and of the two-dimensional embedding.")
    ] = 0,
) -> None:
    """Draw distances between cells in latent space, ordered by type, and a two-dimensional embedding."""
    adata = read_table(table)
    import numpy as np

    from spatialvae import plots
    from spatialvae.setup import read_codes

    codes, names = read_codes(adata, labels)
    if key not in adata.obsm:
        raise InputError(f"no {key!r} in obsm; it has {', '.join(sorted(adata.obsm))}; run `spatialvae embed` first")
    with status("embedding in two dimensions"):
        figure = plots.latent_distances(np.asarray(adata.obsm[key], float), np.array(names)[codes], seed)
    write_figure(figure, out)
    typer.echo(f"Written to {out}")
