"""Interpretation of a model: gene programs of dimensions and domains, gene sets, and the range of the niche."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import hypergeom, norm, rankdata

from spatialvae.errors import InputError
from spatialvae.inference import adjusted

if TYPE_CHECKING:
    from spatialvae.model import SpatialVAE

CELLS_DECODED = 2000  # over which derivatives are averaged
SMALLEST_SET, LARGEST_SET = 3, 500  # genes of a set that are in the table
FOLDS = 5


def latent_programs(model: SpatialVAE, seed: int = 0) -> pd.DataFrame:
    """Change of each gene's log share per unit of each dimension of z_cell, float64 (gene, dimension).

    This is the mean over at most 2,000 random cells of d log rho_g / d z_d = J_gd - sum_h rho_h J_hd, with J the
    Jacobian of the decoder's logits. A value of 0.7 is a doubling per unit; the standard deviation over cells is about
    1 unit. z_niche is the smooth part of the first dimensions and has the same programs. For a linear decoder, programs
    are its loadings up to a constant for each dimension.
    """
    import torch

    z = model.get_latent_representation(which="cell")
    rows = np.sort(np.random.default_rng(seed).permutation(len(z))[:CELLS_DECODED])
    batch = model._read(None).batch[torch.from_numpy(rows)].to(model.device)
    latent = torch.from_numpy(z[rows]).to(model.device)
    total = np.zeros((len(model.genes), z.shape[1]))
    with torch.no_grad():
        for first in range(0, len(rows), 100):
            part = slice(first, first + 100)
            slopes, _ = model.module.decoder.slopes(latent[part], batch[part])
            share = torch.softmax(model.module.decoder(latent[part], batch[part])[0], -1)
            slopes = slopes - torch.einsum("ig,igd->id", share, slopes)[:, None]
            total += slopes.sum(0).cpu().numpy()
    names = [name for name in model.latent_names if name.startswith("cell")]
    return pd.DataFrame(total / len(rows), index=list(model.genes), columns=names)


def domain_programs(expression: Iterable[np.ndarray], labels: np.ndarray, genes: list[str]) -> pd.DataFrame:
    """Difference of the mean expression of each gene between each domain and all other cells, in standard deviations.

    ``expression`` yields log counts of consecutive cells, float64 (cell, gene) each, so that a large table is never
    dense; ``labels`` (cell,). Returns a DataFrame (gene, domain).
    """
    labels = np.asarray(labels).astype(str)
    names = sorted(set(labels), key=lambda name: (len(name), name))
    within = np.array(names) == labels[:, None]
    total, square, first = np.zeros((len(names), len(genes))), np.zeros(len(genes)), 0
    for block in expression:
        total += within[first : first + len(block)].T @ block
        square += (block**2).sum(0)
        first += len(block)
    size, everything = within.sum(0)[:, None], total.sum(0)
    mean = everything / len(labels)
    spread = np.sqrt(np.maximum(square / len(labels) - mean**2, 1e-18))
    if len(names) == 1:
        return pd.DataFrame(index=genes)
    found = (total / size - (everything - total) / (len(labels) - size)) / spread
    return pd.DataFrame(found.T, index=genes, columns=names)


def top_genes(programs: pd.DataFrame, number: int = 8) -> pd.DataFrame:
    """The ``number`` genes that increase and decrease most in each column of ``programs`` (gene, program).

    Returns a DataFrame with the columns ``program``, ``up`` and ``down``.
    """
    rows = []
    for name, column in programs.items():
        order = column.sort_values(ascending=False)
        up, down = order.head(number), order.tail(number)[::-1]
        rows.append((name, ", ".join(up[up > 0].index), ", ".join(down[down < 0].index)))
    return pd.DataFrame(rows, columns=["program", "up", "down"])


def read_gmt(path: str | os.PathLike[str]) -> dict[str, frozenset[str]]:
    """Read gene sets from a GMT file, with one tab-separated line per set: name, description, genes.

    Raises InputError if the file does not exist or has another format.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected gene sets (GMT)")
    sets: dict[str, frozenset[str]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file: {error}") from error
    for number, line in enumerate(lines, 1):
        fields = line.rstrip().split("\t")
        if len(fields) == 1 and not fields[0]:
            continue
        if len(fields) < 3:
            raise InputError(
                f"{path}, line {number}: {len(fields)} fields; expected name, description and genes, separated by tabs"
            )
        sets[fields[0]] = frozenset(gene for gene in fields[2:] if gene)
    return sets


def ranked_enrichment(scores: pd.Series, sets: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """Test whether the genes of each set rank high or low among ``scores`` (gene,), by Wilcoxon's rank-sum test.

    The test, with correction for ties, assumes independent genes. Genes of a set are rarely independent, so that
    p-values are too small and only their order is meaningful (Wu & Smyth 2012). Sets with fewer than 3 or more than 500
    genes in the table are left out. Returns a DataFrame with ``set``, ``genes`` (number in the table), ``auc`` (0.5 if
    the set does not differ from other genes), ``p_value`` and ``fdr``, in order of ``p_value``.
    """
    ranks, n = pd.Series(rankdata(scores), index=scores.index), len(scores)
    ties = np.unique(scores, return_counts=True)[1].astype(float)
    rows = []
    for name, members in sets.items():
        inside = scores.index.isin(list(members))
        m = int(inside.sum())
        if not SMALLEST_SET <= m <= min(LARGEST_SET, n - 1):
            continue
        over = ranks[inside].sum() - m * (m + 1) / 2
        variance = m * (n - m) / 12 * (n + 1 - (ties**3 - ties).sum() / (n * (n - 1)))
        z = (over - m * (n - m) / 2) / np.sqrt(max(variance, 1e-12))
        rows.append((name, m, over / (m * (n - m)), 2 * norm.sf(abs(z))))
    return _ordered(pd.DataFrame(rows, columns=["set", "genes", "auc", "p_value"]))


def over_representation(
    chosen: Collection[str], universe: Collection[str], sets: Mapping[str, Collection[str]]
) -> pd.DataFrame:
    """Test whether ``chosen`` genes are over-represented in each set, by the hypergeometric test.

    ``universe`` are all genes that could have been chosen, the panel. Returns a DataFrame with ``set``, ``genes``
    (number of genes of the set in the universe), ``chosen``, ``expected``, ``p_value`` and ``fdr``, in order of
    ``p_value``.
    """
    everything = set(universe)
    picked = set(chosen) & everything
    rows = []
    for name, members in sets.items():
        inside = set(members) & everything
        if not SMALLEST_SET <= len(inside) <= LARGEST_SET:
            continue
        both = len(inside & picked)
        p = float(hypergeom.sf(both - 1, len(everything), len(inside), len(picked)))
        rows.append((name, len(inside), both, len(inside) * len(picked) / len(everything), p))
    return _ordered(pd.DataFrame(rows, columns=["set", "genes", "chosen", "expected", "p_value"]))


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    table["fdr"] = adjusted(table["p_value"].to_numpy(float))
    return table.sort_values("p_value", kind="stable", ignore_index=True)


def neighbour_reach(model: SpatialVAE) -> pd.DataFrame:
    """Share of the niche and its correlation length, for each dimension that varies in space, from the fitted field.

    Returns a DataFrame with ``dimension``; ``niche_share``, the share of z_niche in the prior variance of z_cell; and
    ``range``, the correlation length in the unit of the coordinates. A field with precision 1 + r L in the plane has
    the correlation length sqrt(r d a^2 / 4), with d the mean number of neighbours and a their median distance; the
    median is used because some edges cross holes in the tissue.

    Raises InputError for a model without coordinates, or with one cell in each section.
    """
    section = model._read(None)
    if section.graphs is None or not section.graphs.near.nnz:
        raise InputError("the model has no niches: it was set up without spatial_key, or no cell has neighbours")
    graphs, d = section.graphs, model.module.shape.n_niche
    reach = graphs.spacing * np.sqrt(model.module.range.cpu().numpy() * graphs.mean_degree / 4)
    smooth = (model.module.smooth_variance * model.module.spread).cpu().numpy()[:d]
    own = model.module.log_residual.detach().exp().cpu().numpy()[:d]
    names = [name for name in model.latent_names if name.startswith("niche")]
    return pd.DataFrame({"dimension": names, "niche_share": smooth / (smooth + own), "range": reach})


def disentanglement(
    niche: np.ndarray, cell: np.ndarray, answers: Mapping[str, np.ndarray], blocks: np.ndarray
) -> pd.DataFrame:
    """Balanced accuracy of predicting labels from z_niche, z_cell and both, in held-out blocks of the tissue.

    The classifier is multinomial logistic regression; ``chance`` is one over the number of classes. The gain of both
    over one of them is the information that only the other contains.

    Parameters
    ----------
    niche, cell : float (cell, dim)
    answers : maps a name, such as "region" or "type", to labels (cell,)
    blocks : int (cell,), as of ``inference.spatial_blocks``; the cells of a block are held out together

    Returns
    -------
    DataFrame with one row per entry of ``answers``: ``asked``, ``niche``, ``cell``, ``both``, ``chance``
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    given = {"niche": niche, "cell": cell, "both": np.hstack([niche, cell])}
    rows = []
    for asked, labels in answers.items():
        truth = np.asarray(labels).astype(str)
        row: dict[str, str | float] = {"asked": asked}
        for name, x in given.items():
            told = np.empty(truth.shape, truth.dtype)
            for train, test in GroupKFold(min(FOLDS, len(np.unique(blocks)))).split(x, groups=blocks):
                if len(set(truth[train])) == 1:  # there is nothing to fit
                    told[test] = truth[train[0]]
                    continue
                fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight="balanced"))
                told[test] = fit.fit(x[train], truth[train]).predict(x[test])
            row[name] = float(recall_score(truth, told, average="macro", zero_division=0))
        rows.append(row | {"chance": 1 / len(set(truth))})
    return pd.DataFrame(rows)
