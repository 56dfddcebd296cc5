"""Clusters of an embedding: domains, and their number."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MIXTURE_STARTS = 20  # the likelihood has several maxima: with 5, seeds disagreed on one section of two
NUMBER_STARTS = 2  # when only the likelihood is wanted
MOST_DOMAINS = 20  # tried when no number is given


def choose_number(latent: np.ndarray, overlap: float = 1.0, seed: int = 0) -> int:
    """The number of mixture components, 1 to 20, with the best Bayesian information criterion (Schwarz 1978).

    ``overlap``: number of rows of ``latent`` (cell, dim) that carry the same information. Niches of cells with common
    neighbours are not independent observations; n cells count as n / overlap of them, in the likelihood and in the
    penalty. With overlap 1 the criterion for niches decreases without a minimum.
    """
    latent = np.asarray(latent, float)
    n, dim = latent.shape
    worth = max(n / overlap, 2.0)

    def criterion(k: int) -> float:
        parameters = k * dim + k - 1 + dim * (dim + 1) / 2
        return -2 * worth * float(_mixture(latent, k, seed, NUMBER_STARTS).score(latent)) + parameters * np.log(worth)

    return min(range(1, min(MOST_DOMAINS, n - 1) + 1), key=criterion)


def find_domains(latent: np.ndarray, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian mixture of ``k`` components with one common covariance.

    Parameters
    ----------
    latent : float (cell, dim)

    Returns
    -------
    label : int64 (cell,), 0 the largest domain
    probability : float64 (cell, k), in the order of labels
    """
    if not 1 <= k <= len(latent):
        raise InputError(f"domains: expected 1 to {len(latent)}, the number of cells, got {k}")
    latent = np.asarray(latent, float)
    mixture = _mixture(latent, k, seed, MIXTURE_STARTS)
    probability = mixture.predict_proba(latent)
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=k), kind="stable")
    probability = probability[:, order]
    return probability.argmax(1), probability


def _mixture(latent: np.ndarray, k: int, seed: int, starts: int) -> GaussianMixture:
    from sklearn.mixture import GaussianMixture

    rounding = float(np.finfo(np.float32).eps * np.abs(latent).max())  # rows that differ by less are equal
    ridge = max(1e-6 * float(latent.var(0).mean()), rounding**2, np.finfo(float).tiny)
    mixture = GaussianMixture(
        k, covariance_type="tied", n_init=starts, reg_covar=ridge, random_state=seed, max_iter=300
    )
    with equal_rows_allowed():
        return mixture.fit(latent)


@contextmanager
def equal_rows_allowed() -> Iterator[None]:
    """Suppress scikit-learn's warning about fewer distinct rows than clusters: cells can be equal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        yield
