from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from spatialvae import likelihoods, loss
from spatialvae._product import Linear


@pytest.fixture
def counts():
    torch.manual_seed(0)
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
    x, log_mu = x[2:], log_mu[2:]  # the probability of a count of 1000 underflows
    logit = torch.full_like(x, -0.7)
    pi = torch.sigmoid(logit)
    t, mu = log_theta.exp().numpy(), log_mu.exp().numpy()
    nb = stats.nbinom.pmf(x.numpy(), t, t / (t + mu))
    expected = np.log(pi.numpy() * (x.numpy() == 0) + (1 - pi.numpy()) * nb).sum(1)
    found = likelihoods.zero_inflated_negative_binomial(x, log_mu, log_theta, logit)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)


def test_poisson__matches_scipy(counts):
    x, log_mu, _ = counts
    expected = stats.poisson.logpmf(x.numpy(), log_mu.exp().numpy()).sum(1)
    np.testing.assert_allclose(likelihoods.poisson(x, log_mu).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("inflated", [False, True])
def test_negative_binomial_of_logits__matches_the_slow_way(counts, inflated):
    x, logits, log_theta = counts
    zeros = [4 * torch.randn(logits.shape, dtype=torch.float64)] if inflated else []
    x[0, 1:], x[3, 0] = torch.tensor([1, 4, 5, 17]), 16
    depth = x.sum(-1) + 1
    found = []
    for dtype in (torch.float32, torch.float64):  # only the first has a kernel
        inputs = [t.detach().to(dtype).requires_grad_() for t in (logits, log_theta, *zeros)]
        value = likelihoods.negative_binomial_of_logits(x.to(dtype), inputs[0], depth.to(dtype), *inputs[1:])
        weight = torch.arange(1, len(x) + 1, dtype=dtype)
        found.append([value.detach(), *torch.autograd.grad((weight * value).sum(), inputs)])
    for fast, slow in zip(*found, strict=True):
        np.testing.assert_allclose(fast.numpy(), slow.numpy(), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("inflated", [False, True])
def test_negative_binomial_of_logits__of_large_counts(inflated):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(10), 40)
    for size in (1e3, 1e6):
        x = rng.poisson(size * share * rng.gamma(3, 1 / 3, share.shape))
        arguments = x, np.log(share), x.sum(1), np.full(10, np.log(3)), *([np.full(share.shape, -2.0)] * inflated)
        values = [
            likelihoods.negative_binomial_of_logits(*(torch.tensor(a, dtype=dtype) for a in arguments))
            for dtype in (torch.float32, torch.float64)
        ]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-3)  # nats
    alone = [torch.tensor(a, dtype=torch.float32) for a in ([[1000, 1]], [[-200, 0]], [1001], [1, 1])]
    assert torch.isfinite(likelihoods.negative_binomial_of_logits(*alone)).all()


def test_draw_cell__kernel_matches_tensor_operations():
    generator = torch.Generator().manual_seed(1)
    mean, log_variance, prior_mean, noise = torch.randn(4, 9, 5, generator=generator)
    given = [mean, log_variance - 1, prior_mean, torch.randn(5, generator=generator)]
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [value.to(dtype, copy=True).requires_grad_() for value in given]
        z, kl = loss.draw_cell(*inputs, noise.to(dtype))
        ((z**2).sum() + (kl * torch.arange(9)).sum()).backward()
        found.append([z.detach(), kl.detach(), *(value.grad for value in inputs)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast.double(), slow.double(), rtol=1e-4, atol=1e-4)


def test_linear__matches_a_plain_product():
    torch.manual_seed(2)
    layer, x = Linear(7, 5), torch.randn(11, 7, requires_grad=True)
    pull = torch.randn(11, 5)
    found = torch.autograd.grad((pull * layer(x)).sum(), [x, *layer.parameters()])
    expected = pull @ layer.weight, pull.T @ x, pull.sum(0)
    np.testing.assert_allclose(layer(x).detach(), (x @ layer.weight.T + layer.bias).detach(), rtol=1e-5, atol=1e-5)
    for fast, slow in zip(found, expected, strict=True):
        np.testing.assert_allclose(fast, slow.detach(), rtol=1e-5, atol=1e-5)
