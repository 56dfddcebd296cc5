"""Clustering of an embedding: spatial domains and their number."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialvae.errors import InputError, check_count

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MIXTURE_STARTS = 20  # the likelihood has several maxima: with 5 starts, seeds disagreed on one of two sections
MOST_DOMAINS = 20  # largest number tried if none is given
HALVINGS = 10  # random halvings of the cells for each number
HALVING_STARTS = 2
MOST_HALVED = 10_000  # cells
LEAST_AGREEMENT = 0.5  # adjusted Rand index; if no number of domains reaches it, there is one domain


def stability(latent: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Stability of Gaussian mixture clusters of ``latent`` (cell, dim) for each number of clusters.

    Mixtures are fitted to two random halves of the cells, and their labels of all cells are compared (Lange, Roth,
    Braun & Buhmann 2004). At most 10,000 cells are used.

    Returns one row for each number ``k`` of components, 2 to 20, with the mean ``agreement`` over halvings, an adjusted
    Rand index, and its standard deviation, ``spread``.
    """
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    latent = np.asarray(latent, float)[rng.permutation(len(latent))[:MOST_HALVED]]
    middle, rows = len(latent) // 2, []
    for k in range(2, min(MOST_DOMAINS, middle) + 1):
        found = []
        for i in range(HALVINGS):
            order = rng.permutation(len(latent))
            halves = (_mixture(latent[half], k, seed + i, HALVING_STARTS) for half in np.split(order, [middle]))
            found.append(adjusted_rand_score(*(mixture.predict(latent) for mixture in halves)))
        rows.append((k, float(np.mean(found)), float(np.std(found))))
    return pd.DataFrame(rows, columns=["k", "agreement", "spread"])


def most_stable(found: pd.DataFrame) -> int:
    """The number of clusters from the table of ``stability``: the largest with an agreement within one standard
    deviation of the highest (Breiman, Friedman, Olshen & Stone 1984); 1 if no agreement reaches 0.5."""
    k, agreement, spread = found[["k", "agreement", "spread"]].to_numpy().T
    if not len(k) or agreement.max() < LEAST_AGREEMENT:
        return 1
    best = agreement.argmax()
    return int(k[agreement >= agreement[best] - spread[best]].max())


def find_domains(latent: np.ndarray, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cluster cells by a Gaussian mixture of ``k`` components with one common covariance.

    Parameters
    ----------
    latent : float (cell, dim)
    k : number of domains, 1 to the number of cells

    Returns
    -------
    label : int64 (cell,), in order of decreasing size from 0
    probability : float64 (cell, k), columns in the order of labels

    Raises
    ------
    InputError : if ``k`` is not in 1 to the number of cells
    """
    check_count("the number of domains", k)
    if k > len(latent):
        raise InputError(f"the number of domains is {k}; expected at most {len(latent)}, the number of cells")
    latent = np.asarray(latent, float)
    mixture = _mixture(latent, k, seed, MIXTURE_STARTS)
    probability = mixture.predict_proba(latent)
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=k), kind="stable")
    probability = probability[:, order]
    return probability.argmax(1), probability


def _mixture(latent: np.ndarray, k: int, seed: int, starts: int) -> GaussianMixture:
    from sklearn.mixture import GaussianMixture

    rounding = float(np.finfo(np.float32).eps * np.abs(latent).max())  # rows that differ by less count as equal
    ridge = max(1e-6 * float(latent.var(0).mean()), rounding**2, np.finfo(float).tiny)
    mixture = GaussianMixture(
        k, covariance_type="tied", n_init=starts, reg_covar=ridge, random_state=seed, max_iter=300
    )
    with equal_rows_allowed(), warnings.catch_warnings():
        # with few cells the likelihood is flat: labels converge long before it does
        warnings.filterwarnings("ignore", message="Best performing initialization did not converge")
        return mixture.fit(latent)


@contextmanager
def equal_rows_allowed() -> Iterator[None]:
    """Suppress scikit-learn's warning about fewer distinct rows than clusters: cells can be equal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        yield
