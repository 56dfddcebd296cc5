"""Domains found by `SpatialVAE.domains`, before and after training: agreement with known ones, number, and variation
between seeds.

    python benchmarks/domains.py TABLE:LABEL ... [--seeds N] [--simulated N]

TABLE is an AnnData file with counts in X and obsm["spatial"], LABEL a column of obs with known domains. In addition,
tissues are simulated, each with one seed: patches of 3 to 12 domains, which differ in the frequencies of 14 cell types;
and each again as four samples, in which all genes differ in abundance. Writes benchmarks/results/domains.md.
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
import scipy.sparse as sp
from scipy.spatial import cKDTree
from sklearn.metrics import adjusted_rand_score
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE

CELLS, GENES, TYPES = 2000, 120, 14  # of a simulated tissue
PATCHES = 3  # of each domain
SAMPLES = 4  # of a tissue with several
EFFECT = 0.5  # standard deviation of the effect of a sample on log shares of genes

Row = dict[str, str | int | float]


def tissue(k: int, seed: int, samples: int = 1) -> anndata.AnnData:
    """Simulate cells in a square of patches of ``k`` domains, obs["domain"]; negative binomial counts, 60 per cell.

    With several ``samples``, obs["sample"], shares of genes differ between these."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, 100, (CELLS, 2))
    patch = cKDTree(rng.uniform(0, 100, (PATCHES * k, 2))).query(places)[1]
    frequency = rng.dirichlet(np.full(TYPES, 0.3), k)[patch % k]
    kind = (rng.random((CELLS, 1)) > frequency.cumsum(1)).sum(1).clip(0, TYPES - 1)
    share = rng.gamma(0.5, 1, (TYPES, GENES))
    share /= share.sum(1, keepdims=True)
    depth = rng.gamma(4, 60 / 4, CELLS)
    sample = np.arange(CELLS) % samples
    effect = np.exp(EFFECT * (samples > 1) * np.random.default_rng(seed).standard_normal((samples, GENES)))
    expected = share[kind] * effect[sample]
    expected /= expected.sum(1, keepdims=True)
    counts = rng.poisson(depth[:, None] * expected * rng.gamma(3, 1 / 3, (CELLS, GENES)))
    labels = {"domain": (patch % k).astype(str), "sample": sample.astype(str)}
    obs = pd.DataFrame(labels, index=[f"cell{i}" for i in range(CELLS)])
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, obsm={"spatial": places})


def rows_of(name: str, table: anndata.AnnData, label: str, seeds: int) -> Iterator[Row]:
    """Return a row for each seed."""
    table = table[np.asarray(table.X.sum(1)).ravel() > 0].copy()
    truth = table.obs[label].astype(str)
    SpatialVAE.setup_anndata(table, sample_key="sample" if "sample" in table.obs else None)
    for seed in range(seeds):
        # domains do not depend on the encoder of neighbours: that which needs no training
        model = SpatialVAE(table, seed=seed, niche_encoder="field")
        before = model.domains(truth.nunique(), seed=seed)
        model.train(seed=seed, progress=False)
        after = model.domains(truth.nunique(), seed=seed)
        found = len(set(model.domains(seed=seed)))
        stable = table.uns["spatial_domain_number"].set_index("k")
        yield {
            "section": name,
            "true": truth.nunique(),
            "found": found,
            "agreement": stable["agreement"].get(found, np.nan),
            "before": adjusted_rand_score(truth, before),
            "after": adjusted_rand_score(truth, after),
        }


def kind_of(section: str) -> str:
    if not section.startswith("simulated"):
        return "tables"
    return "simulated, four samples" if section.endswith("samples") else "simulated, one sample"


def page(rows: pd.DataFrame, seeds: int, command: str) -> str:
    each = rows.groupby("section", sort=False)
    ranges = {when: (each[when].max() - each[when].min()).where(each.size() > 1) for when in ("before", "after")}
    table = pd.DataFrame(
        {
            "true number": each["true"].first(),
            "found": each["found"].agg(lambda found: ", ".join(map(str, found))),
            "agreement of halves": each["agreement"].mean(),
            "ARI, untrained": each["before"].median(),
            "spread, untrained": ranges["before"],
            "ARI, trained": each["after"].median(),
            "spread, trained": ranges["after"],
        }
    )
    near = (rows["found"] - rows["true"]).abs() <= 2
    good = (near.groupby(rows["section"], sort=False).mean() > 0.5).sum()
    means = table.filter(like="ARI").groupby([kind_of(name) for name in table.index], sort=False).mean()
    return f"""# Domains

Made by `{command}`.

`domains(k)` with the true number k, before and after training with the defaults: adjusted Rand index (ARI) with the
known domains, median over seeds of model and mixture, and its range over seeds ("spread"). Tables: {seeds} seeds;
simulated tissues: one. "found": number found by `domains()` of the trained model without a number, for each seed, and
the agreement of halves for this number. "simulated K": {CELLS:,} cells, patches of K domains; "four samples": the
shares of genes differ between samples, by factors with a standard deviation of the logarithm of {EFFECT}; without a
batch key, trained latents are then not used.

{as_markdown(table.round(3).fillna("").reset_index())}

Means:

{as_markdown(means.round(3).rename_axis("sections").reset_index())}

Number within 2 of the true number: {near.mean():.0%} of all runs; {good} of {len(each)} sections in more than half of
the seeds.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE:LABEL")
    parser.add_argument("--seeds", type=int, default=5, help="of each table")
    parser.add_argument("--simulated", type=int, default=4, help="tissues, of 3 to 12 domains")
    options = parser.parse_args()
    rows: list[Row] = []
    for asked in options.tables:
        path, label = asked.rsplit(":", 1)
        rows += rows_of(Path(path).stem, anndata.read_h5ad(path), label, options.seeds)
        print(*rows[-options.seeds :], sep="\n", flush=True)
    for i, k in enumerate(np.linspace(3, 12, options.simulated).round().astype(int)):
        for samples, suffix in ((1, ""), (SAMPLES, ", four samples")):
            rows += rows_of(f"simulated {k}{suffix}", tissue(k, 100 + i, samples), "domain", 1)
            print(rows[-1], flush=True)
    names = " ".join(f"{Path(asked.rsplit(':', 1)[0]).name}:{asked.rsplit(':', 1)[1]}" for asked in options.tables)
    command = f"python benchmarks/domains.py {names} --seeds {options.seeds} --simulated {options.simulated}"
    text = page(pd.DataFrame(rows), options.seeds, command)
    (RESULTS / "domains.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
