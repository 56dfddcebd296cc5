r"""Differential expression between groups of cells, from the posterior.

The expression of a gene in a group is the mean of its share rho over the cells, corrected by the counts. With the sum X
of its counts over the group and their expectation E under the model,

    log h = log mean rho + log (X + 1/2) / (E + 1/2)

Its variance is the variance of X under the likelihood, divided by E^2, plus the variance over draws of z. For two
groups,

    lfc_g ~ sum_k p_k N(0, s_k^2),   log2 h_1g - log2 h_2g ~ N(lfc_g, v_g)

with weights p on a grid of s that includes 0, estimated from all genes by maximum likelihood (adaptive shrinkage,
Stephens 2017): changes within the counting noise are shrunk to zero. As in scvi-tools::

    proba_de = P(|lfc| >= delta),   bayes_factor = log proba_de - log (1 - proba_de)

and genes are called in order of decreasing proba_de as long as the mean of 1 - proba_de among them, the expected false
discovery rate, is at most the target (Lopez et al. 2018; Boyeau et al. 2019). Unlike in scvi-tools, the change is
between the means of the groups, not between two random cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtr

from spatialvae.errors import InputError
from spatialvae.module import Section, SpatialModule
from spatialvae.posterior import Expansion, expansion, latent_draws
from spatialvae.sampling import expected_counts, shares

Selection = str | Sequence[int] | Sequence[bool] | np.ndarray  # cells: a query of obs, rows or a mask
MODES = ("change", "vanilla")
EPSILON = 1e-8  # added to probabilities in Bayes factors, as in scvi-tools
DRAWS = 30  # of z: the mean of a group varies little between draws
QUANTILE_DRAWS = 1000  # of a change, for its median and extremes
UPDATES = 300  # EM steps for the weights of the prior
NONE_AT_FIRST = 10.0  # pseudo-count of genes without change, so that with few genes not all are called


@dataclass(frozen=True, eq=False)
class Group:
    """Expression of a group, (gene,) each: ``scale``, the mean share; ``log_mean``, log h, and its ``variance``."""

    scale: np.ndarray
    log_mean: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True, eq=False)
class Change:
    """Posterior of the change of each gene, a Gaussian mixture: ``weight``, ``mean`` and ``sd``, (gene, component)."""

    weight: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    def beyond(self, limit: float) -> np.ndarray:
        """P(lfc >= limit), (gene,); for a limit of 0, half of the mass at exactly 0 is included."""
        sd = np.maximum(self.sd, 1e-12)
        return (self.weight * ndtr((self.mean - limit) / sd)).sum(1)

    def draws(self, rng: np.random.Generator) -> np.ndarray:
        """Draws of the change, (draw, gene)."""
        ends = self.weight.cumsum(1)
        chosen = (rng.random((QUANTILE_DRAWS, len(ends), 1)) > ends[:, :-1]).sum(-1)
        gene = np.arange(len(ends))
        return self.mean[gene, chosen] + self.sd[gene, chosen] * rng.standard_normal(chosen.shape)


@torch.no_grad()
def group_mean(
    module: SpatialModule, section: Section, found: Expansion, rows: np.ndarray, seed: int, batch: int | None = None
) -> Group:
    """Expression of ``rows`` of a section, with its expansion ``found``; decoded in ``batch``, or in each cell's own
    batch if None."""
    genes = module.shape.n_genes
    share, expected, spread, counted = *np.zeros((2, DRAWS, genes)), np.zeros(genes), np.zeros(genes)
    theta = module.bounded_log_theta.exp().cpu().double().numpy()
    for part, _, z_cell in latent_draws(module, section, rows, DRAWS, seed, found):
        counted += module.counts(section, part).sum(0).cpu().double().numpy()
        for i, z in enumerate(z_cell):
            mean, zero = (value.cpu().double().numpy() for value in expected_counts(module, section, part, z))
            share[i] += shares(module, section, part, z, batch).sum(0, dtype=float) / len(rows)
            expected[i] += (mean * (1 - zero)).sum(0)
            above = 0.0 if module.shape.likelihood == "poisson" else 1 / theta
            spread += ((1 - zero) * mean * (1 + mean * (above + zero))).sum(0) / DRAWS
    log_mean = np.log(share) + np.log((counted + 0.5) / (expected + 0.5))
    variance = (spread + 0.5) / (expected.mean(0) + 0.5) ** 2 + log_mean.var(0)
    return Group(share.mean(0), log_mean.mean(0), variance)


def shrunk(estimate: np.ndarray, variance: np.ndarray) -> Change:
    """Posterior of changes, from their ``estimate`` and its ``variance`` (gene,), under a prior estimated by EM."""
    most = max(2 * np.sqrt(max(float((estimate**2 - variance).max()), 0)), 1e-2)
    sd = np.append(0, most / np.sqrt(2) ** np.arange(16))
    total = variance[:, None] + sd**2
    log_p = -0.5 * (estimate[:, None] ** 2 / total + np.log(total))
    p, before = np.full(len(sd), 1 / len(sd)), NONE_AT_FIRST * (sd == 0)
    for _ in range(UPDATES):
        weight = np.exp(log_p - log_p.max(1, keepdims=True)) * p
        weight /= weight.sum(1, keepdims=True)
        p = (weight.sum(0) + before) / (len(estimate) + before.sum())
    gain = sd**2 / total
    return Change(weight, gain * estimate[:, None], np.sqrt(gain * variance[:, None]))


def is_de(proba_de: np.ndarray, fdr: float) -> np.ndarray:
    """Which genes to call for an expected false discovery rate of at most ``fdr``, bool (gene,)."""
    order = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[order]) / np.arange(1, len(order) + 1)
    called = np.zeros(len(order), bool)
    called[order[: int((expected <= fdr).sum())]] = True
    return called


def compare(one: Group, two: Group, mode: str, delta: float, fdr: float, seed: int) -> pd.DataFrame:
    """Compare two groups: one row per gene with the columns of scvi-tools, changes in log2."""
    variance = (one.variance + two.variance) / np.log(2) ** 2
    change = shrunk((one.log_mean - two.log_mean) / np.log(2), variance)
    scales = {"scale1": one.scale, "scale2": two.scale}
    if mode == "vanilla":
        higher = change.beyond(0)
        factor = np.log(higher + EPSILON) - np.log(1 - higher + EPSILON)
        return pd.DataFrame({"proba_m1": higher, "proba_m2": 1 - higher, "bayes_factor": factor, **scales})
    differs = np.clip(change.beyond(delta) + 1 - change.beyond(-delta), 0, 1)
    drawn = change.draws(np.random.default_rng(seed))
    mean = (change.weight * change.mean).sum(1)
    second = (change.weight * (change.mean**2 + change.sd**2)).sum(1)
    return pd.DataFrame(
        {
            "proba_de": differs,
            "proba_not_de": 1 - differs,
            "bayes_factor": np.log(differs + EPSILON) - np.log(1 - differs + EPSILON),
            **scales,
            "pseudocounts": 0.0,
            "delta": delta,
            "lfc_mean": mean,
            "lfc_median": np.median(drawn, 0),
            "lfc_std": np.sqrt(np.maximum(second - mean**2, 0)),
            "lfc_min": drawn.min(0),
            "lfc_max": drawn.max(0),
            f"is_de_fdr_{fdr}": is_de(differs, fdr),
        }
    )


@dataclass(frozen=True, eq=False)
class Pair:
    """Two groups of rows, and the columns that describe them."""

    one: np.ndarray
    two: np.ndarray
    labels: dict[str, str]


def pairs(
    obs: pd.DataFrame,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: Selection | None,
    idx2: Selection | None,
    within: str | None,
) -> list[Pair]:
    """The groups to compare, from the arguments of ``SpatialVAE.differential_expression``.

    Raises InputError for keys or groups that do not exist, and for groups without cells.
    """
    found = []
    if idx1 is not None:
        one = _rows(obs, idx1)
        two = np.setdiff1d(np.arange(len(obs)), one) if idx2 is None else _rows(obs, idx2)
        found.append(Pair(one, two, {}))
    else:
        if groupby is None or groupby not in obs:
            raise InputError(f"groupby is {groupby!r}; expected a column of obs, {list(obs)}, or groups as idx1, idx2")
        values = obs[groupby].astype(str).to_numpy()
        if group1 is None:
            names = sorted(set(values[obs[groupby].notna()]))
        else:
            names = [str(name) for name in ([group1] if np.isscalar(group1) else group1)]
        other = "Rest" if group2 is None else str(group2)
        for name in names:
            two = np.flatnonzero(values != name if group2 is None else values == other)
            told: dict[str, str] = {"comparison": f"{name} vs {other}", "group1": name, "group2": other}
            if group2 is None or name != other:
                found.append(Pair(np.flatnonzero(values == name), two, told))
        if not found:
            raise InputError(f"group1 is {group1!r} and group2 {group2!r}; expected two groups of {groupby!r}")
    if within is not None:
        types = obs[within].astype(str).to_numpy()
        found = [
            Pair(pair.one[types[pair.one] == kind], pair.two[types[pair.two] == kind], pair.labels | {within: kind})
            for pair in found
            for kind in sorted(set(types))
        ]
        found = [pair for pair in found if len(pair.one) and len(pair.two)]
        if not found:
            raise InputError(f"no type of obs[{within!r}] has cells in both groups")
    for pair in found:
        if not len(pair.one) or not len(pair.two):
            what = pair.labels.get("comparison", "idx1 vs idx2")
            raise InputError(
                f"{what}: the groups have {len(pair.one)} and {len(pair.two)} cells; expected at least 1 in each"
            )
    return found


def _rows(obs: pd.DataFrame, selection: Selection) -> np.ndarray:
    if isinstance(selection, str):
        try:
            return np.flatnonzero(obs.index.isin(obs.query(selection).index))
        except Exception as error:  # pandas raises many kinds of errors for invalid queries
            raise InputError(f"{selection!r} is not a query of obs: {error}") from error
    rows = np.asarray(selection)
    if rows.dtype == bool:
        if len(rows) != len(obs):
            raise InputError(f"the mask has {len(rows)} values; expected one for each of {len(obs)} cells")
        return np.flatnonzero(rows)
    if len(rows) and not (np.issubdtype(rows.dtype, np.integer) and 0 <= rows.min() <= rows.max() < len(obs)):
        raise InputError(f"the rows of a group must be whole numbers from 0 to {len(obs) - 1}")
    return np.unique(rows.astype(np.int64))


def tables(
    module: SpatialModule,
    section: Section,
    pairs: list[Pair],
    mode: str,
    delta: float,
    fdr: float,
    all_stats: bool,
    batch: int | None,
    seed: int,
) -> pd.DataFrame:
    """Concatenated results of ``compare`` for all ``pairs``, with genes in their order."""
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}; expected one of {MODES}")
    if not (delta >= 0 and 0 < fdr < 1):
        raise InputError(f"delta is {delta} and fdr_target {fdr}; expected delta >= 0 and 0 < fdr_target < 1")
    expanded, found = expansion(module, section, module.sites(section)), []
    for pair in pairs:
        one, two = (group_mean(module, section, expanded, rows, seed, batch) for rows in (pair.one, pair.two))
        frame = compare(one, two, mode, delta, fdr, seed)
        if all_stats:
            frame = frame.assign(**raw_statistics(module, section, pair.one, pair.two))
        found.append(frame.assign(**pair.labels))
    return pd.concat(found, ignore_index=True)


def raw_statistics(module: SpatialModule, section: Section, one: np.ndarray, two: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of the counts of two groups of rows, as in scvi-tools, (gene,) each: mean counts, shares of cells with
    counts, and mean counts scaled to 10,000 per cell."""
    found: dict[str, np.ndarray] = {}
    for i, rows in enumerate((one, two), 1):
        x = np.zeros((3, module.shape.n_genes))
        for part in np.array_split(rows, -(-len(rows) // 1024)):
            counts = module.counts(section, part).cpu().double().numpy()
            size = np.maximum(section.cells.depth[part], 1)[:, None]
            x += np.stack([counts.sum(0), (counts > 0).sum(0), (1e4 * counts / size).sum(0)]) / len(rows)
        names = ("raw_mean", "non_zeros_proportion", "raw_normalized_mean")
        found |= {f"{name}{i}": value for name, value in zip(names, x, strict=True)}
    return found
