"""Decoders on real images, and on images rendered from real molecules: python benchmarks/decode_real.py.

Writes benchmarks/results/decode_real.md and decode_real.png. The molecules are read from
DATA/molecules/u2os_merfish_sample.h5ad, the codebook from DATA/codebooks/L26E1.csv; ``--data`` sets DATA. ``--quick``
is a smoke run on a part of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from tables import RESULTS, as_markdown

from merfish import datasets, plots, read_codebook
from merfish.calls.error_model import bit_error_rates, tally_words
from merfish.calls.filtering import keep_calls, rate_calls
from merfish.cells.counts import assign_cells
from merfish.codebook import Codebook
from merfish.config import RunConfig
from merfish.decoding.methods import METHODS, decode_filtered
from merfish.decoding.overlap import same_molecule_pairs
from merfish.imaging.field import register_field
from merfish.imaging.normalize import find_spots, shared_normalization
from merfish.imaging.opening import open_experiment
from merfish.imaging.preprocess import bandpass
from merfish.simulate import Imaging, match_calls
from merfish.simulate.optics import draw_bits, draw_brightness, expose, photons, show_bits

N_PERMUTED = 20
# The molecules as listed, and with those of a gene within 1.5 px of each other merged: the table has 1 to 8 rows, most
# often 5, within that radius where 0.05 are expected by chance, so it lists a molecule in each plane that shows it.
# Then the number of rendered pixels per pixel of the table, at which the brightest cell has 0.03 molecules/px.
SAMPLES = {"as listed": (0.0, 2.25), "planes merged": (1.5, 1.25)}
FIELD, MARGIN = 1024, 16  # px; calls in the margin of a field belong to another field
SEED = 0


# --- real images ------------------------------------------------------------------------------------------------


def real_fields() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decode the bundled raw fields with the real codebook and permuted ones; also returns the bits' error rates."""
    source = open_experiment(datasets.merfish_raw())
    rng = np.random.default_rng(SEED)
    books = [source.codebook]
    while len(books) <= N_PERMUTED:
        order = rng.permutation(source.codebook.n_bits)
        if (order != np.arange(len(order))).any():
            books.append(source.codebook.permuted(order))
    rows, rates = [], []
    for method in METHODS:
        bits = [register_field(source, fov, RunConfig(method=method)).bits for fov in source.fovs]
        scale = shared_normalization([find_spots(field) for field in bits], source.codebook.n_bits)
        for number, book in enumerate(books):
            parts = [decode_filtered(f, book, scale, method=method).assign(fov=k) for k, f in enumerate(bits)]
            found = rate_calls(pd.concat(parts, ignore_index=True), book)
            rows += [{"method": method, "book": number, **counts} for counts in count_fields(found, len(bits))]
            if number == 0:
                word, shown, probability = (found[name].to_numpy() for name in ("barcode_id", "shown", "probability"))
                tally = tally_words(word, shown, probability, np.ones(len(found), bool), book)
                rates.append(bit_error_rates(tally, book).assign(method=method))
    return pd.DataFrame(rows), pd.concat(rates, ignore_index=True)


def count_fields(found: pd.DataFrame, n_fields: int) -> list[dict[str, float]]:
    """Count for each field the calls more likely correct than wrong, and the calls kept at the default rate."""
    kept, likely = keep_calls(found), found[found["probability"] > 0.5]
    rows = []
    for fov in range(n_fields):
        (genes, blanks), (kept_genes, kept_blanks) = (
            np.bincount(calls.loc[calls["fov"] == fov, "is_blank"].astype(int), minlength=2) for calls in (likely, kept)
        )
        rows.append(
            {
                "field": fov,
                "genes": genes,
                "blanks": blanks,
                "ratio": genes / max(blanks, 1),
                "kept_genes": kept_genes,
                "kept_blanks": kept_blanks,
            }
        )
    return rows


def summarise_fields(counts: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and field: the real codebook, and mean and range of the permuted ones."""
    rows = []
    for (method, fov), group in counts.groupby(["method", "field"], sort=False):
        real, permuted = group[group["book"] == 0].iloc[0], group[group["book"] > 0]
        row = {"method": method, "field": fov, **{k: int(real[k]) for k in ("genes", "blanks")}, "ratio": real["ratio"]}
        for name in ("genes", "blanks", "ratio"):
            values = permuted[name]
            row[f"{name}, permuted"] = f"{values.mean():.3g} ({values.min():.3g}-{values.max():.3g})"
        row |= {name: int(real[name]) for name in ("kept_genes", "kept_blanks")}
        rows.append(row)
    return pd.DataFrame(rows)


def summarise_rates(rates: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each bit: 1->0 and 0->1 error rates with intervals, by method."""
    table = pd.DataFrame({"bit": rates["bit"].drop_duplicates().to_list()})
    for method, group in rates.groupby("method", sort=False):
        for kind in ("lost", "gained"):
            columns = (group[kind + end] for end in ("", "_low", "_high"))
            table[f"{method}: {kind}"] = [f"{a:.3f} ({b:.3f}-{c:.3f})" for a, b, c in zip(*columns, strict=True)]
    return table


# --- images of real molecules -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """Return molecules (barcode_id, x, y in rendered pixels), and polygons (cell,) of their cells and nuclei."""

    molecules: pd.DataFrame
    cells: np.ndarray
    nuclei: np.ndarray


def read_sample(path: Path, codebook: Codebook, merge: float, magnification: float, quick: bool) -> Sample:
    """Return the molecules whose gene has a word, magnified; those of a gene within ``merge`` px are merged."""
    import anndata

    table = anndata.read_h5ad(path)
    points = table.uns["points"]
    word = pd.Series(range(codebook.n_words), index=codebook.names).reindex(points["gene"].astype(str)).to_numpy()
    molecules = pd.DataFrame({"barcode_id": word, "x": points["x"].to_numpy(), "y": points["y"].to_numpy()}).dropna()
    molecules["barcode_id"] = molecules["barcode_id"].astype(np.int32)
    corner = molecules[["x", "y"]].min().to_numpy()
    if merge:
        word, x, y = molecules.to_numpy().T
        i, j = same_molecule_pairs(word, x, y, merge)
        links = coo_array((np.ones(len(i)), (i, j)), shape=(len(molecules), len(molecules)))
        molecules = molecules.groupby(connected_components(links, directed=False)[1]).mean()
        molecules["barcode_id"] = molecules["barcode_id"].astype(np.int32)

    def magnify(places: np.ndarray) -> np.ndarray:
        return (places - corner) * magnification

    molecules[["x", "y"]] = magnify(molecules[["x", "y"]].to_numpy())
    if quick:
        middle = magnify(np.array([900.0, 900.0]))
        molecules = molecules[(molecules[["x", "y"]] - middle).abs().max(axis=1) < 400]
    outlines = (
        shapely.transform(shapely.from_wkt(table.obs[name].to_numpy()), magnify)
        for name in ("cell_shape", "nucleus_shape")
    )
    return Sample(molecules.reset_index(drop=True), *outlines)


def render_fields(sample: Sample, codebook: Codebook) -> tuple[np.ndarray, list[np.ndarray]]:
    """Render raw stacks (bit, y, x) uint16 of fields that tile the sample; also returns origins (field, 2) x, y."""
    rng, imaging = np.random.default_rng(SEED), Imaging()
    sigma, peak = draw_bits(imaging, codebook.n_bits, rng)
    molecules = sample.molecules
    shown = show_bits(codebook.words[molecules["barcode_id"]], imaging.lost, imaging.gained, rng)
    _, brightness = draw_brightness(imaging, shown, rng)
    x, y = molecules["x"].to_numpy(), molecules["y"].to_numpy()
    first = (np.array([x.min(), y.min()]) // FIELD * FIELD).astype(int)
    steps = [np.arange(low, high, FIELD) for low, high in zip(first, (x.max(), y.max()), strict=True)]
    origins = np.array([(left - MARGIN, top - MARGIN) for top in steps[1] for left in steps[0]])
    side, stacks = FIELD + 2 * MARGIN, []
    for (left, top), stream in zip(origins, np.random.SeedSequence(SEED).spawn(len(origins)), strict=True):
        near = (np.abs(x - left - side / 2) < side / 2 + 10) & (np.abs(y - top - side / 2) < side / 2 + 10)
        place = y[near] - top, x[near] - left
        light = photons(*place, np.zeros(near.sum()), brightness[near], sigma, peak, (1, side, side), imaging)
        stacks.append(expose(light, imaging, stream)[:, 0])
    return origins, stacks


def decode_fields(origins: np.ndarray, stacks: list[np.ndarray], codebook: Codebook, method: str) -> pd.DataFrame:
    """Return the kept calls of all fields in the sample's pixels, each position in one field only."""
    filters = {"smoothing": METHODS[method].smoothing, "background": METHODS[method].background}
    scale = shared_normalization([find_spots(bandpass(s, **filters)) for s in stacks], codebook.n_bits)
    parts = []
    for fov, ((left, top), stack) in enumerate(zip(origins, stacks, strict=True)):
        calls = decode_filtered(bandpass(stack, **filters), codebook, scale, method=method)
        inner = calls["x"].between(MARGIN, MARGIN + FIELD, "left") & calls["y"].between(MARGIN, MARGIN + FIELD, "left")
        parts.append(calls.assign(fov=fov, x=calls["x"] + left, y=calls["y"] + top)[inner])
    return keep_calls(rate_calls(pd.concat(parts, ignore_index=True), codebook))


def count_cells(table: pd.DataFrame, sample: Sample, n_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the molecules of each word in each cell, (cell, word), and in its nucleus."""
    cell, nucleus = (
        assign_cells(table["x"].to_numpy(), table["y"].to_numpy(), shapes, np.arange(len(shapes)))
        for shapes in (sample.cells, sample.nuclei)
    )
    counts = []
    for inside in (cell >= 0, (cell >= 0) & (nucleus == cell)):
        flat = np.bincount(cell[inside] * n_words + table["barcode_id"].to_numpy()[inside], minlength=0)
        counts.append(np.pad(flat, (0, len(sample.cells) * n_words - len(flat))).reshape(-1, n_words))
    return counts[0], counts[1]


def compare(calls: pd.DataFrame, sample: Sample, codebook: Codebook) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Compare calls with the truth; also returns the arrays for the picture."""
    truth = sample.molecules
    pairs = len(match_calls(calls, truth)[0])
    genes = ~codebook.is_blank
    (called, called_in), (true, true_in) = (count_cells(t, sample, codebook.n_words) for t in (calls, truth))
    called, called_in, true, true_in = (counts[:, genes] for counts in (called, called_in, true, true_in))
    with np.errstate(invalid="ignore"):
        fraction, true_fraction = called_in.sum(0) / called.sum(0), true_in.sum(0) / true.sum(0)
    known = np.isfinite(fraction) & np.isfinite(true_fraction)
    off = (fraction - true_fraction)[known]
    by_cell = [np.corrcoef(a, b)[0, 1] for a, b in zip(called, true, strict=True) if a.any() and b.any()]
    figures = {
        "recall": pairs / len(truth),
        "precision": pairs / len(calls),
        "blanks": float(calls["is_blank"].sum()),
        "r of counts": np.corrcoef(called.ravel(), true.ravel())[0, 1],
        "r of log counts": np.corrcoef(np.log1p(called).ravel(), np.log1p(true).ravel())[0, 1],
        "r in a cell, least": min(by_cell),
        "slope": float((called * true).sum() / (true * true).sum()),
        "r of nuclear fraction": np.corrcoef(fraction[known], true_fraction[known])[0, 1],
        "bias of nuclear fraction": off.mean(),
        "rms of nuclear fraction": float(np.sqrt((off**2).mean())),
    }
    arrays = {"called": called, "true": true, "fraction": fraction[known], "true_fraction": true_fraction[known]}
    return figures, arrays


def recall_by_crowding(calls: pd.DataFrame, sample: Sample) -> pd.DataFrame:
    """Return recall and number of molecules by local density: other molecules within 5 px."""
    truth = sample.molecules
    tree = cKDTree(truth[["x", "y"]])
    density = (tree.query_ball_point(truth[["x", "y"]], 5.0, return_length=True) - 1) / (25 * np.pi)
    found = np.zeros(len(truth), bool)
    found[match_calls(calls, truth)[1]] = True
    table = pd.DataFrame({"density": density, "found": found})
    groups = table.groupby(pd.cut(table["density"], [-1, 0.005, 0.015, 0.03, 0.06, 0.1, np.inf]), observed=True)
    return groups.agg(density=("density", "mean"), molecules=("found", "size"), recall=("found", "mean"))


# --- writing ----------------------------------------------------------------------------------------------------


def draw(counts: pd.DataFrame, shown: dict[str, Any], path: Path) -> None:
    """Plot gene-to-blank ratios against permuted codebooks; counts, nuclear fractions and density against the truth."""
    figure, axes = plots.new_figure(15, 3.8, 4)
    colours = dict(zip(METHODS, plots.CATEGORIES, strict=False))
    ax, fields = axes[0], sorted(counts["field"].unique())
    for place, (field, method) in enumerate((field, method) for field in fields for method in METHODS):
        chosen = counts[(counts["field"] == field) & (counts["method"] == method)]
        permuted = chosen.loc[chosen["book"] > 0, "ratio"]
        ax.plot(np.full(len(permuted), place), permuted, ".", color=plots.MUTED, label=None if place else "permuted")
        real = chosen.loc[chosen["book"] == 0, "ratio"]
        ax.plot([place], real, "D", color=colours[method], label=None if place else "real codebook")
    ax.set_xticks(range(len(fields) * len(METHODS)), [f"{m}\nfield {f}" for f in fields for m in METHODS], fontsize=7)
    ax.set(ylabel="gene calls / blank calls", title="real images")
    ax.legend(fontsize=8, frameon=False)
    true, called = shown["true"].ravel(), shown["called"].ravel()
    axes[1].loglog(true + 1, called + 1, ".", markersize=3, alpha=0.3, color=plots.GENE)
    axes[1].plot([1, true.max() + 1], [1, true.max() + 1], color=plots.MUTED, linewidth=1)
    axes[1].set(xlabel="true molecules of a gene in a cell, + 1", ylabel="called by spots, + 1", title="counts")
    axes[2].plot(shown["true_fraction"], shown["fraction"], ".", color=plots.GENE)
    axes[2].plot([0, 1], [0, 1], color=plots.MUTED, linewidth=1)
    axes[2].set(xlabel="true share of a gene in nuclei", ylabel="called by spots", title="nuclear fraction")
    for method, table in shown["crowding"].items():
        axes[3].plot(table["density"], table["recall"], "o-", color=colours[method], label=method, markersize=4)
    axes[3].set(xlabel="molecules/px around a molecule", ylabel="recall", ylim=(0, 1), title="real crowding")
    axes[3].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def of_molecules(path: Path, codebook: Codebook, name: str, quick: bool) -> tuple[str, dict[str, Any]]:
    """Render one of `SAMPLES`, and decode it with each method; returns text for the page and data for the picture."""
    merge, magnification = SAMPLES[name]
    sample = read_sample(path, codebook, merge, magnification, quick)
    origins, stacks = render_fields(sample, codebook)
    rows, crowding, arrays = [], {}, {}
    for method in METHODS:
        calls = decode_fields(origins, stacks, codebook, method)
        figures, arrays[method] = compare(calls, sample, codebook)
        rows.append({"method": method, "calls": len(calls), **figures})
        crowding[method] = recall_by_crowding(calls, sample)
    by_crowding = crowding["spots"].assign(**{method: table["recall"] for method, table in crowding.items()})
    density = count_cells(sample.molecules, sample, codebook.n_words)[0].sum(axis=1) / shapely.area(sample.cells)
    n_genes = len(np.unique(sample.molecules["barcode_id"]))
    text = f"""### {name.capitalize()}

{len(sample.molecules):,} molecules of {n_genes} genes, {magnification} px per pixel of the table, {len(stacks)} fields
of {FIELD} px: {density.max():.3f} molecules/px in the brightest cell, {np.median(density):.3f} in the median cell.

{as_markdown(pd.DataFrame(rows).set_index("method").T.reset_index(names=""))}

Recall by local density, from the number of other molecules within 5 px:

{as_markdown(by_crowding.drop(columns="recall"))}

"""
    return text, {"crowding": crowding, **arrays["spots"]}


def main(data: Path, quick: bool) -> None:
    """Run all measurements and write the results."""
    needed = [data / "molecules" / "u2os_merfish_sample.h5ad", data / "codebooks" / "L26E1.csv"]
    missing = ", ".join(str(path) for path in needed if not path.is_file())
    if missing:
        sys.exit(f"error: not found: {missing}; pass the folder that contains molecules/ and codebooks/ as --data")
    counts, rates = real_fields()
    codebook = read_codebook(needed[1])
    parts = {name: of_molecules(needed[0], codebook, name, quick) for name in SAMPLES}
    text = f"""Made by `python benchmarks/decode_real.py{" --quick" if quick else ""}`.

## Real images: two fields of 128 x 128 px, 16 bits, 70 genes and 70 blanks

`genes`, `blanks`: calls more likely right than wrong. `permuted`: mean (range) over {N_PERMUTED} codebooks whose bits
were permuted, none of them the identity. `kept`: calls kept at the default rate of 5 %.

{as_markdown(summarise_fields(counts))}

Error rates of each bit from the calls of both fields, with 95 % intervals:

{as_markdown(summarise_rates(rates))}

## Images of real molecules

Molecules of 15 U-2 OS cells at their measured positions, with the words of L26E1 (no molecule has the word of one of
its {int(codebook.is_blank.sum())} blanks; the table's 5 controls have no word and are omitted), optics and errors as in
`benchmarks/decode.py`, all planes of the cells in one image. The table lists a molecule once for each plane that shows
it, most often five times within 1.5 px. If all rows are rendered, several of them are one spot, which can be found only
once; in a second rendering they are therefore merged.

Calls kept at the default rate of 5 %. Counts of each gene in each cell are compared, called
against true; `slope`: of called on true counts. Nuclear fraction: share of a gene's molecules in cells that lie in
nuclei, one value per gene.

{"".join(part for part, _ in parts.values())}"""
    (RESULTS / "decode_real.md").write_text(text)
    draw(counts, parts["planes merged"][1], RESULTS / "decode_real.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(os.environ.get("MERFISH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help=f"folder of data (MERFISH_DATA, or {default})")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.data, options.quick)
