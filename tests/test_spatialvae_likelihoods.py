from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from spatialvae import likelihoods


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.poisson(3, (6, 5)), dtype=torch.float64)
    x[0, 0], x[1, 1], x[2, :] = 1000, 256, 0
    return x, torch.randn(6, 5, dtype=torch.float64), torch.tensor([-2, 0, 1, 3, 6.0], dtype=torch.float64)


def test_negative_binomial__matches_scipy(counts):
    x, log_mu, log_theta = counts
    t, mu = log_theta.exp().numpy(), log_mu.exp().numpy()
    expected = stats.nbinom.logpmf(x.numpy(), t, t / (t + mu)).sum(1)
    np.testing.assert_allclose(likelihoods.negative_binomial(x, log_mu, log_theta).numpy(), expected, rtol=1e-8)


def test_negative_binomial__gradients(counts):
    x, log_mu, log_theta = counts
    inputs = log_mu.requires_grad_(), log_theta.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, t: likelihoods.negative_binomial(x, m, t), inputs)


def test_zero_inflated__matches_mixture(counts):
    x, log_mu, log_theta = counts
    logit = torch.full_like(x, -0.7)
    pi = torch.sigmoid(logit)
    t, mu = log_theta.exp().numpy(), log_mu.exp().numpy()
    nb = stats.nbinom.pmf(x.numpy(), t, t / (t + mu))
    expected = np.log(pi.numpy() * (x.numpy() == 0) + (1 - pi.numpy()) * nb).sum(1)
    found = likelihoods.zero_inflated_negative_binomial(x, log_mu, log_theta, logit)
    np.testing.assert_allclose(found.numpy()[2:], expected[2:], rtol=1e-8)


def test_poisson__matches_scipy(counts):
    x, log_mu, _ = counts
    expected = stats.poisson.logpmf(x.numpy(), log_mu.exp().numpy()).sum(1)
    np.testing.assert_allclose(likelihoods.poisson(x, log_mu).numpy(), expected, rtol=1e-8)
