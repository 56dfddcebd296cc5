"""What is asked of an embedding."""

from __future__ import annotations

import numpy as np

from spatialvae.errors import InputError

MIXTURE_STARTS = 5


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
    from sklearn.mixture import GaussianMixture

    if not 1 <= k <= len(latent):
        raise InputError(f"{k} domains asked of {len(latent)} cells; expected between 1 and the number of cells")
    latent = np.asarray(latent, float)
    ridge = 1e-6 * max(float(latent.var(0).mean()), 1e-12)
    mixture = GaussianMixture(
        k, covariance_type="tied", n_init=MIXTURE_STARTS, reg_covar=ridge, random_state=seed, max_iter=300
    ).fit(latent)
    probability = mixture.predict_proba(latent)
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=k), kind="stable")
    probability = probability[:, order]
    return probability.argmax(1), probability
