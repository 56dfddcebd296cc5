from __future__ import annotations

import numpy as np
import torch
from scipy.special import digamma, polygamma

from spatialvae.hamiltonian import moved


def test_moved__turns_a_gaussian_into_skewed_posteriors():
    """exp(z) ~ Gamma(a), rotated: started from Laplace's approximation, draws have the exact mean and variance."""
    shape, n = torch.tensor([1.0, 3.0, 20.0]), 40_000
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]

    def log_density(z):
        u = z @ turn
        return (shape * u - u.exp()).sum(-1)

    root = torch.linalg.cholesky(turn @ shape.diag() @ turn.T).expand(n, 3, 3)
    generator = torch.Generator().manual_seed(1)
    start = (shape.log() + torch.randn(n, 3, generator=generator) / shape.sqrt()) @ turn.T
    found = (moved(log_density, start, root, generator) @ turn).double().numpy()
    np.testing.assert_allclose(found.mean(0), digamma(shape.numpy()), atol=0.05)
    np.testing.assert_allclose(found.var(0), polygamma(1, shape.numpy()), rtol=0.05)
    assert ((start @ turn).mean(0)[0] - digamma(1.0)).abs() > 0.5


def test_moved__stays_where_the_density_is_finite():
    def log_density(z):
        return torch.where(z < 0, torch.nan, -z).sum(-1)

    start = torch.full((1000, 1), 1.0)
    found = moved(log_density, start, torch.ones(1000, 1, 1), torch.Generator().manual_seed(0), trajectories=50)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.mean(), 1, atol=0.15)
