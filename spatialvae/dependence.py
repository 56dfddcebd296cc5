r"""Conditional dependence between genes given all others and given the neighbours, and effects of neighbours on genes.

Conditioning on a gene does not remove the dependence that it mediates if the gene is only known with counting noise.
Each count is therefore thinned into two halves, which are independent given the rate if counts are Poisson (Neufeld et
al. 2024):

    x' ~ Binomial(x, 1/2),  x'' = x - x',     f = log(1 + 2 x' / l),  g = log(1 + 2 x'' / l)

with size factors l of mean one. Covariances between f and g, also of the same gene, estimate those of the expected log
counts without counting noise. The means of f and g over the neighbours of a cell are additional variables. There is an
edge between two genes if their partial correlation, given all other genes of the cell and, optionally, the means of the
neighbours, is not zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import t as student

from spatialvae.errors import InputError
from spatialvae.inference import adjusted, spatial_blocks

LEAST_TRUE = 0.1  # smallest share of an observed variance that is attributed to expression
THINNINGS = 4  # over which moments are averaged
LEAST_EIGENVALUE = 0.02  # of a correlation matrix after removal of the counting noise
HALVES = 50  # random halves of the blocks, in complementary pairs
STABLE = 0.9  # smallest share of halves in which a stable edge is found
NEAR_COMPONENTS = 20  # principal components of the neighbours' expression
FOLDS = 10
BLOCK = 15  # cells of one type in a block
LEAST_BLOCKS = 10
SEARCH = 12  # bisections of the penalty


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the cells of each block: ``cells`` (block,), their number; ``first`` and ``square`` (block, variable),
    of f and f squared; ``second`` (block, variable, variable), of f times g. Variables are the genes of the cell, then
    the means of the neighbours, if given."""

    cells: np.ndarray
    first: np.ndarray
    square: np.ndarray
    second: np.ndarray


def partial_correlations(
    counts: np.ndarray,
    blocks: np.ndarray,
    neighbours: sp.csr_array | None = None,
    size: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    max_false: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Find edges between genes by the graphical lasso (Friedman, Hastie & Tibshirani 2008) with stability selection.

    The penalty is chosen such that q = sqrt((2 pi - 1) P max_false) of the P pairs of genes have an edge in the whole
    table. Stable edges are those found in a share of at least pi = 0.9 of 50 halves of the tissue. At most
    ``max_false`` wrong edges are then expected if all wrong edges are equally likely (Meinshausen & Buhlmann 2010).
    They are not equally likely if errors differ between pairs; stable edges are therefore kept only if their p-value,
    from a jackknife over blocks, is at most max_false / P. Halves and jackknife leave out whole blocks, since adjacent
    cells are similar.

    Parameters
    ----------
    counts : (cell, gene), non-negative integers
    blocks : int (cell,), from 0, as of ``inference.spatial_blocks``; at least 4
    neighbours : sparse (cell, cell), adjacency of ones with a zero diagonal. If given, edges are conditional on the
        means of the neighbours
    size : float (cell,), size factors; the total counts if None
    names : names of the genes; their numbers if None
    max_false : largest expected number of wrong edges

    Returns
    -------
    DataFrame with one row per edge, strongest first: ``gene``, ``other``, ``partial_correlation`` given all genes with
    an edge to either, its ``error`` and ``p_value``, and ``frequency``, the share of halves

    Raises
    ------
    InputError : for shapes that do not match, invalid counts, genes without counts, or too few genes or blocks
    """
    from sklearn.covariance import graphical_lasso
    from sklearn.exceptions import ConvergenceWarning

    counts = np.asarray(counts, float)
    n_genes = counts.shape[1]
    names = [str(g) for g in range(n_genes)] if names is None else list(names)
    _check(counts, blocks, names)
    rng = np.random.default_rng(seed)
    moments = _moments(counts, counts.sum(1) if size is None else np.asarray(size, float), blocks, neighbours, rng)
    above = np.triu_indices(n_genes, 1)

    def joined(correlation: np.ndarray, penalty: float) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the edges converge long before the dual gap
            precision = graphical_lasso(correlation, penalty, max_iter=50, tol=1e-3)[1]
        return np.abs(precision[above]) > 1e-8

    n_blocks = len(moments.cells)
    whole = _correlation(moments, np.arange(n_blocks), n_genes)
    wanted = max(np.sqrt((2 * STABLE - 1) * len(above[0]) * max_false), 1)
    low, high = 0.01, float(np.abs(whole[above]).max())
    for _ in range(SEARCH):
        penalty = np.sqrt(low * high)
        low, high = (penalty, high) if joined(whole, penalty).sum() > wanted else (low, penalty)
    frequency = np.zeros(len(above[0]))
    for _ in range(HALVES // 2):
        order = rng.permutation(n_blocks)
        for half in (order[: n_blocks // 2], order[n_blocks // 2 :]):
            frequency += joined(_correlation(moments, half, n_genes), high) / HALVES
    stable = np.zeros((n_genes, n_genes), bool)
    stable[above] = frequency >= STABLE - 1e-9
    stable |= stable.T
    a, b = np.nonzero(np.triu(stable))
    value = _given_joined(whole, stable, a, b)
    without = [np.delete(np.arange(n_blocks), block) for block in range(n_blocks)]
    others = np.array([_given_joined(_correlation(moments, kept, n_genes), stable, a, b) for kept in without])
    error = np.sqrt((n_blocks - 1) * others.var(0))
    found = pd.DataFrame(
        {
            "gene": np.array(names)[a],
            "other": np.array(names)[b],
            "partial_correlation": value,
            "error": error,
            "p_value": 2 * student.sf(np.abs(value) / np.maximum(error, 1e-12), n_blocks - 1),
            "frequency": frequency[stable[above]],
        }
    )
    found = found[found["p_value"] <= max_false / len(above[0])]
    return found.sort_values("partial_correlation", key=np.abs, ascending=False, ignore_index=True)


def _check(counts: np.ndarray, blocks: np.ndarray, names: Sequence[str]) -> None:
    if counts.ndim != 2 or len(names) != counts.shape[1] or len(blocks) != len(counts):
        raise InputError(
            f"counts have shape {counts.shape}, with {len(names)} names and {len(blocks)} blocks; expected "
            "(cell, gene), a name for each gene and a block for each cell"
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise InputError("counts are negative or not finite; expected non-negative integers")
    empty = np.flatnonzero(counts.sum(0) == 0)
    if len(empty):
        raise InputError(f"gene {names[empty[0]]!r} has no counts ({len(empty)} such genes); leave them out")
    if counts.shape[1] < 3 or blocks.max() < 3:
        raise InputError(f"{counts.shape[1]} genes and {blocks.max() + 1} blocks; expected at least 3 and 4")


def _moments(
    counts: np.ndarray, size: np.ndarray, blocks: np.ndarray, neighbours: sp.csr_array | None, rng: np.random.Generator
) -> Moments:
    there = size > 0
    factor = np.where(there, 2 * size.mean() / np.where(there, size, 1), 0)[:, None]
    share = None
    if neighbours is not None:
        degree = np.asarray(neighbours.sum(1)).ravel()
        there &= degree > 0
        share = sp.diags_array(1 / np.maximum(degree, 1)) @ neighbours
    rows_of = [np.flatnonzero((blocks == block) & there) for block in range(int(blocks.max()) + 1)]
    width = counts.shape[1] * (1 if share is None else 2)
    first, square = np.zeros((2, len(rows_of), width))
    second = np.zeros((len(rows_of), width, width))
    for _ in range(THINNINGS):
        half = rng.binomial(counts.astype(np.int64), 0.5)
        f, g = np.log1p(factor * half), np.log1p(factor * (counts - half))
        if share is not None:
            f, g = np.hstack([f, share @ f]), np.hstack([g, share @ g])
        for block, rows in enumerate(rows_of):
            product = f[rows].T @ g[rows]
            first[block] += (f[rows] + g[rows]).sum(0) / (2 * THINNINGS)
            square[block] += (f[rows] ** 2 + g[rows] ** 2).sum(0) / (2 * THINNINGS)
            second[block] += (product + product.T) / (2 * THINNINGS)
    return Moments(np.array([len(rows) for rows in rows_of]), first, square, second)


def _correlation(moments: Moments, blocks: np.ndarray, n_genes: int) -> np.ndarray:
    """Correlation matrix (gene, gene) of expected log counts from some of the blocks, conditional on the means of the
    neighbours if the moments contain these."""
    n = moments.cells[blocks].sum()
    mean = moments.first[blocks].sum(0) / n
    covariance = moments.second[blocks].sum(0) / n - np.outer(mean, mean)
    noisy = moments.square[blocks].sum(0) / n - mean**2
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), LEAST_TRUE * noisy))
    joint = _positive(covariance)
    across = joint[:n_genes, n_genes:]
    return _positive(joint[:n_genes, :n_genes] - across @ np.linalg.solve(joint[n_genes:, n_genes:], across.T))


def _positive(covariance: np.ndarray) -> np.ndarray:
    """The correlation matrix of ``covariance``, with eigenvalues of at least ``LEAST_EIGENVALUE``."""
    sd = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    values, vectors = np.linalg.eigh(covariance / np.outer(sd, sd))
    raised = (vectors * np.maximum(values, LEAST_EIGENVALUE)) @ vectors.T
    sd = np.sqrt(np.diag(raised))
    return raised / np.outer(sd, sd)


def _given_joined(correlation: np.ndarray, joined: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Partial correlations (edge,) of genes ``first`` and ``second`` given all genes with an edge to either."""
    found = np.empty(len(first))
    for edge, (a, b) in enumerate(zip(first, second, strict=True)):
        given = joined[a] | joined[b]
        given[[a, b]] = False
        rows = np.r_[a, b, np.flatnonzero(given)]
        precision = np.linalg.inv(correlation[np.ix_(rows, rows)])
        found[edge] = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    return found


def log_expression(counts: np.ndarray, typical: float | None = None) -> np.ndarray:
    """log(1 + x / l), float64 (cell, gene), with l the total count of the cell over ``typical``, by default the median
    of these cells; 0 without counts."""
    depth = counts.sum(1, keepdims=True, dtype=float)
    if typical is None:
        typical = float(np.median(depth[depth > 0]))
    return np.log1p(counts * (typical / np.where(depth > 0, depth, np.inf)))


def most_variable(counts: np.ndarray, number: int) -> np.ndarray:
    """Columns of ``counts`` (cell, gene) with the highest variance of log expression, ``number`` at most, ascending."""
    variance = log_expression(counts).var(0)
    chosen = np.argsort(-variance, kind="stable")[:number]
    return np.sort(chosen[variance[chosen] > 0])


def variance_shares(
    expression: np.ndarray,
    types: np.ndarray,
    niche: np.ndarray,
    neighbours: sp.csr_array,
    blocks: np.ndarray,
    genes: Sequence[str],
) -> pd.DataFrame:
    """Share of each gene's variance that is explained by the cell's type, then its niche, then its neighbours.

    Ridge regressions on the type, on type and niche, and on both with the first 20 principal components of the mean
    expression of the neighbours are compared. They predict blocks of the tissue that they were not fitted to, so that
    more regressors do not increase a share by themselves. A share is the increase of the explained variance, or 0. The
    rest is counting noise and variation specific to the cell.

    Parameters
    ----------
    expression : float (cell, gene), log counts
    types : int (cell,), from 0
    niche : float (cell, dim)
    neighbours : sparse (cell, cell), adjacency of ones
    blocks : int (cell,), from 0
    genes : names of the genes

    Returns
    -------
    DataFrame with one row per gene: ``gene``, ``type``, ``niche``, ``neighbours``, ``rest``; the shares sum to 1
    """
    share = sp.diags_array(1 / np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)) @ neighbours
    near = share @ (expression - expression.mean(0))
    left, values, _ = np.linalg.svd(near - near.mean(0), full_matrices=False)
    near = (left * values)[:, :NEAR_COMPONENTS]
    kinds = np.eye(int(types.max()) + 1)[types]
    folds = blocks % FOLDS
    total = ((expression - expression.mean(0)) ** 2).sum(0)
    explained = [
        1 - _left_out_errors(np.hstack(parts), expression, folds) / np.maximum(total, 1e-12)
        for parts in ([kinds], [kinds, niche], [kinds, niche, near])
    ]
    steps = np.maximum(np.diff(np.maximum.accumulate(np.maximum(explained, 0)), axis=0, prepend=0), 0)
    return pd.DataFrame(
        {"gene": list(genes), "type": steps[0], "niche": steps[1], "neighbours": steps[2], "rest": 1 - steps.sum(0)}
    )


def _left_out_errors(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Sum of squared errors (gene,) of a ridge regression of ``y`` on ``x``, in cross-validation over ``folds``."""
    x = np.c_[np.ones(len(x)), (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)]
    penalty = np.diag(np.r_[0, np.ones(x.shape[1] - 1)])  # weak: the weight of a single observation
    errors = np.zeros(y.shape[1])
    for fold in np.unique(folds):
        out = folds == fold
        weight = np.linalg.solve(x[~out].T @ x[~out] + penalty, x[~out].T @ y[~out])
        errors += ((y[out] - x[out] @ weight) ** 2).sum(0)
    return errors


def neighbour_effects(
    expression: np.ndarray,
    types: np.ndarray,
    neighbours: sp.csr_array,
    coordinates: np.ndarray,
    names: Sequence[str],
    genes: Sequence[str],
    samples: np.ndarray | None = None,
) -> pd.DataFrame:
    """Test which genes of a cell type change with the number of neighbours of another type.

    Cells of one type are compared within blocks of about 15 nearby cells of that type. With n the number of neighbours
    of type u and e the expression of a gene, both less their means over the block, and S_b the sum of n e over block b,

        effect = sum_b S_b / sum n^2,        t = mean_b S_b / (sd_b S_b / sqrt(B))

    Gradients wider than a block cancel. The standard error is estimated from the B blocks, with B - 1 degrees of
    freedom, so that cells within a block need not be independent. (Permuting cells within blocks would assume that they
    are, and would find effects of smooth expression.) The false discovery rate (Benjamini & Hochberg 1995) is over all
    tests: types of neighbours whose number varies in an effective number of at least 10 blocks, and genes expressed in
    a tenth of the cells of the type.

    The numbers of neighbours of all types sum to about the same for every cell, so that an effect of one type appears
    with the opposite sign for the others. For each gene, the type with the largest absolute t is therefore tested
    alone, and the others conditional on it, after regression of n and e on its number of neighbours. Expression is
    relative to the total count of the cell: a large increase of one gene lowers all others slightly.

    Molecules of a neighbour that were assigned to the cell appear as an effect: be cautious if ``mean_neighbour``, the
    mean expression in the neighbour's type, is much higher than ``mean``, that in the type itself.

    Parameters
    ----------
    expression : float (cell, gene), log counts
    types : int (cell,), indices into ``names``
    neighbours : sparse (cell, cell), adjacency of ones
    coordinates : float (cell, axis)
    names, genes : names of the types and of the genes
    samples : (cell,), the sample of each cell; one if None

    Returns
    -------
    DataFrame in order of ``p_value``: ``type``, ``neighbour``, ``gene``, ``effect`` in log counts per neighbour, ``t``,
    ``p_value``, ``fdr``, ``mean``, ``mean_neighbour``

    Raises
    ------
    InputError : if no two types are neighbours often enough
    """
    kinds = np.eye(len(names))[types]
    near, means = neighbours @ kinds, (kinds.T @ expression) / np.maximum(kinds.sum(0), 1)[:, None]
    tables = []
    for own in range(len(names)):
        rows = np.flatnonzero(types == own)
        expressed = np.flatnonzero((expression[rows] > 0).sum(0) >= max(len(rows) / 10, LEAST_BLOCKS))
        if len(rows) < LEAST_BLOCKS * BLOCK or not len(expressed):
            continue
        of = None if samples is None else np.asarray(samples)[rows]
        blocks = spatial_blocks(coordinates[rows], len(rows) // BLOCK, of)
        n, e = _less_block_mean(near[rows], blocks), _less_block_mean(expression[np.ix_(rows, expressed)], blocks)
        spread = np.array([np.bincount(blocks, column) for column in n.T**2])  # (type, block)
        met = np.flatnonzero(spread.sum(1) ** 2 >= LEAST_BLOCKS * (spread**2).sum(1) + 1e-12)
        if not len(met):
            continue
        effect, t = _given_the_largest(n[:, met], e, blocks)
        pairs, genes_of = np.repeat(met, len(expressed)), np.tile(expressed, len(met))
        tables.append(
            pd.DataFrame(
                {
                    "type": names[own],
                    "neighbour": np.array(names)[pairs],
                    "gene": np.array(genes)[genes_of],
                    "effect": effect.ravel(),
                    "t": t.ravel(),
                    "p_value": 2 * student.sf(np.abs(t.ravel()), blocks.max()),
                    "mean": means[own, genes_of],
                    "mean_neighbour": means[np.ix_(met, expressed)].ravel(),
                }
            )
        )
    if not tables:
        raise InputError(f"no two types are neighbours in at least {LEAST_BLOCKS} blocks of {BLOCK} cells")
    table = pd.concat(tables, ignore_index=True)
    table.insert(6, "fdr", adjusted(table["p_value"].to_numpy()))
    return table.sort_values("p_value", kind="stable", ignore_index=True)


def _less_block_mean(x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    to_block = sp.csr_array((np.ones(len(blocks)), (blocks, np.arange(len(blocks)))))
    return x - ((to_block @ x) / np.bincount(blocks)[:, None])[blocks]


def _studentised(n: np.ndarray, e: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effects and their t statistics, (type, gene) each, from ``n`` (cell, type) and ``e`` (cell, gene)."""
    to_block = sp.csr_array((np.ones(len(blocks)), (blocks, np.arange(len(blocks)))))
    sums = np.stack([to_block @ (each[:, None] * e) for each in n.T])  # (type, block, gene)
    total = sums.sum(1)
    error = np.sqrt(sums.shape[1] * sums.var(1, ddof=1))
    return total / np.maximum((n**2).sum(0), 1e-12)[:, None], total / np.maximum(error, 1e-12)


def _given_the_largest(n: np.ndarray, e: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``_studentised``, but for each gene conditional on the type with the largest absolute t, which is tested
    alone."""
    effect, t = _studentised(n, e, blocks)
    largest = np.abs(t).argmax(0)
    for kind in np.unique(largest):
        genes, others = np.flatnonzero(largest == kind), np.delete(np.arange(len(t)), kind)
        if not len(others):  # there is only one type of neighbour
            break
        both = np.hstack([n[:, others], e[:, genes]])
        left = both - np.outer(n[:, kind], n[:, kind] @ both / (n[:, kind] @ n[:, kind]))
        rest_n, rest_e = np.split(left, [len(others)], axis=1)
        place = np.ix_(others, genes)
        effect[place], t[place] = _studentised(rest_n, rest_e, blocks)
    return effect, t
