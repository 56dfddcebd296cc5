"""What is asked of an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MIXTURE_STARTS = 5
MOST_DOMAINS = 20  # tried when no number is given


def choose_number(latent: np.ndarray, seed: int = 0) -> int:
    """The number of mixture components, 1 to 20, with the best Bayesian information criterion (Schwarz 1978)."""
    tried = range(1, min(MOST_DOMAINS, len(latent) - 1) + 1)
    criteria = [_mixture(np.asarray(latent, float), k, seed, 1).bic(np.asarray(latent, float)) for k in tried]
    return tried[int(np.argmin(criteria))]


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
        raise InputError(f"{k} domains asked of {len(latent)} cells; expected between 1 and the number of cells")
    latent = np.asarray(latent, float)
    mixture = _mixture(latent, k, seed, MIXTURE_STARTS)
    probability = mixture.predict_proba(latent)
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=k), kind="stable")
    probability = probability[:, order]
    return probability.argmax(1), probability


def _mixture(latent: np.ndarray, k: int, seed: int, starts: int) -> GaussianMixture:
    from sklearn.mixture import GaussianMixture

    ridge = 1e-6 * max(float(latent.var(0).mean()), 1e-12)
    return GaussianMixture(
        k, covariance_type="tied", n_init=starts, reg_covar=ridge, random_state=seed, max_iter=300
    ).fit(latent)
