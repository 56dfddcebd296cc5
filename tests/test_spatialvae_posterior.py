from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spatialvae import evidence, posterior
from spatialvae.celltypes import Types
from spatialvae.counts import read_counts
from spatialvae.data import Cells
from spatialvae.decoder import Decoder
from spatialvae.linear import LinearStart
from spatialvae.module import Shape as Sizes
from spatialvae.module import SpatialModule
from spatialvae.sampling import expected_counts


def linear_start(encode, decode):
    """Initial values for one batch without coordinates; all genes are equally frequent."""
    genes, dim = decode.shape
    share, shift, effect = np.full(genes, 1 / genes), np.zeros((1, dim)), np.zeros((1, genes))
    return LinearStart(1.0, np.zeros(genes), encode, decode, shift, np.ones(dim), 1.0, share, None, effect)


def decoder(hidden=5, genes=7, dim=3, batches=2):
    generator = torch.Generator().manual_seed(0)
    made = Decoder(
        torch.randn(genes, dim, generator=generator),
        torch.randn(batches, genes, generator=generator),
        torch.zeros(genes),
        hidden,
        True,
    )
    for parameter in (*made.parameters(), made.origin):
        parameter.data.normal_(generator=generator)
    return made


@pytest.mark.parametrize("hidden", [5, None])
def test_slopes__are_the_derivatives_of_logits(hidden):
    made = decoder(hidden)
    z, batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0])
    for i, found in enumerate(made.slopes(z, batch)):
        expected = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda v, i=i, b=b: made(v[None], b[None])[i][0], row)
                for row, b in zip(z, batch, strict=True)
            ]
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_expanded__has_the_gradient_of_the_likelihood():
    """For ZINB; a gene that was not measured contributes nothing."""
    start = linear_start(np.eye(5), np.eye(5))
    module = SpatialModule(Sizes(5, 1, 5, 0, 4, "zinb"), start).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.decoder.parameters():
        parameter.data.normal_(generator=generator)
    places, rows = np.zeros(6, np.int64), np.arange(6)
    x = np.random.default_rng(0).poisson(2, (6, 5)) * [1, 1, 1, 1, 0]
    missing = np.arange(5) == 4
    cells = Cells(read_counts(x, np.arange(5), "X"), tuple("abcde"), missing, None, places, places, ("",))
    section, z = module.section(cells, None), torch.randn(6, 5, generator=generator).requires_grad_()
    expected = torch.autograd.grad(module.log_likelihood(section, rows, torch.tensor(x).float(), z).sum(), z)[0]
    with torch.no_grad():
        information, linear = posterior.expanded(module, section, rows, z)
    torch.testing.assert_close((linear - (information @ z[..., None])[..., 0]), expected, rtol=1e-3, atol=1e-3)
    assert (torch.linalg.eigvalsh(information) > -1e-4).all()


@pytest.fixture(params=[False, True], ids=["gaussian", "types"])
def two_genes(request):
    """12 cells without coordinates, the last without counts, with one latent dimension and a linear decoder, so that
    integrals can be computed on a grid."""
    shape = Sizes(2, 1, 1, 0, 4, "nb")
    loading = np.array([[0.8], [-0.8]])
    start = linear_start(loading, loading)
    torch.manual_seed(0)
    module = SpatialModule(shape, start).eval()
    module.log_theta.data.fill_(5.0)
    if request.param:
        two = torch.tensor([[-1.5], [1.0]])
        module.set_types(
            Types(torch.tensor(0.9), torch.tensor([0.0, 1.0]), torch.zeros(2, 0), two, torch.ones(2, 1) / 4)
        )
    x = np.random.default_rng(0).poisson(20, (12, 2))
    x[-1] = 0
    places = np.zeros(12, np.int64)
    cells = Cells(read_counts(x, np.arange(2), "X"), ("a", "b"), np.zeros(2, bool), None, places, places, ("",))
    return module, module.section(cells, None)


def log_joint(module, section, i, grid):
    """log p(x_i, z) at each z of ``grid``."""
    rows = np.full(len(grid), i)
    with torch.no_grad():
        likelihood = module.log_likelihood(section, rows, module.counts(section, rows), grid[:, None])
        prior = module.cells_around(*module.unknown_niche(1)).log_density(grid[None, :, None])[0]
    return likelihood + prior


def test_posterior__matches_integration_over_one_latent(two_genes):
    module, section = two_genes
    mean, variance = posterior.posterior(module, section, module.sites(section))[1]
    grid, ratio = torch.linspace(-5, 5, 2001), []
    for i in range(12):
        weight = torch.softmax(log_joint(module, section, i, grid), 0)
        expected = (weight * grid).sum()
        assert mean[i, 0].item() == pytest.approx(expected.item(), abs=0.08)
        ratio.append(variance[i, 0].item() / (weight * (grid - expected) ** 2).sum().item())
    tolerance = 0.35 if module.shape.n_types else 0.15  # the posterior of a cell that may be of two types is bimodal
    np.testing.assert_allclose(ratio, 1, atol=tolerance)
    assert np.mean(ratio) == pytest.approx(1, abs=tolerance / 2)


def test_evidence_and_bound__are_those_of_integration_over_one_latent(two_genes):
    module, section = two_genes
    grid, rows = torch.linspace(-6, 6, 2001), np.arange(11)
    exact = np.array([torch.logsumexp(log_joint(module, section, i, grid), 0).item() for i in rows]) + np.log(12 / 2000)
    found, error = evidence.log_evidence(module, section, rows, 3000)
    np.testing.assert_allclose(found, exact, atol=0.03)
    assert error.max() < 0.02
    generator, niche = torch.Generator().manual_seed(0), module.solve(None, module.sites(section))
    with torch.no_grad():
        terms = [module.terms(section, rows, niche, module.noise(11, generator)).elbo() for _ in range(400)]
    bound = torch.stack(terms).mean(0).numpy()
    assert (bound < exact + 0.1).all()
    assert bound.mean() > exact.mean() - 1


def test_covers__what_the_model_has_drawn():
    """One strong latent, a nonlinear decoder and few counts: Laplace's approximation at the mode alone would fail."""
    module = decoder_of_few_counts()
    truth = torch.randn(3000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        share = torch.softmax(module.decoder(truth, torch.zeros(3000, dtype=torch.int64))[0], 1).numpy()
    x = np.random.default_rng(2).poisson(12 * share)
    x[x.sum(1) == 0, 0] = 1
    places = np.zeros(3000, np.int64)
    cells = Cells(read_counts(x, np.arange(8), "X"), tuple("abcdefgh"), np.zeros(8, bool), None, places, places, ("",))
    section = module.section(cells, None)
    mean, variance = posterior.posterior(module, section, module.sites(section))[1]
    inside = ((truth - mean).abs() < 1.645 * variance.sqrt()).float().mean()
    assert 0.84 < inside < 0.93


def decoder_of_few_counts():
    rng = np.random.default_rng(0)
    loading = rng.normal(size=(8, 2))
    start = linear_start(loading / 8, loading)
    torch.manual_seed(0)
    module = SpatialModule(Sizes(8, 1, 2, 0, 16, "poisson"), start).eval()
    module.decoder.out.weight.data[:, 2:] = 0.4 * torch.randn(8, 16)
    return module


def test_latent_draws__match_integration_where_the_posterior_is_skewed(two_genes):
    module, section = two_genes
    kinds, copies = 5, 2000
    x = np.repeat(np.random.default_rng(1).poisson(0.7, (kinds, 2)), copies, 0)
    places = np.zeros(len(x), np.int64)
    cells = replace(section.cells, counts=read_counts(x, np.arange(2), "X"), samples=places, batches=places)
    section = module.section(cells, None)
    module.decoder.loadings.data.mul_(3)
    drawn = torch.cat([z[0] for _, _, z in posterior.latent_draws(module, section, np.arange(len(x)), 1)])
    grid = torch.linspace(-6, 6, 2001)
    for i, found in enumerate(drawn.reshape(kinds, copies)):
        weight = torch.softmax(log_joint(module, section, i * copies, grid), 0)
        expected = (weight * grid).sum()
        assert found.mean().item() == pytest.approx(expected.item(), abs=0.08)
        assert found.var().item() == pytest.approx((weight * (grid - expected) ** 2).sum().item(), rel=0.12)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_expected_counts__add_up_to_the_total(likelihood):
    start = linear_start(np.eye(5), np.eye(5))
    module = SpatialModule(Sizes(5, 1, 5, 0, 4, likelihood), start).eval()
    for parameter in module.decoder.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    places = np.zeros(6, np.int64)
    x = np.random.default_rng(0).poisson(4, (6, 5)) + 1
    cells = Cells(read_counts(x, np.arange(5), "X"), tuple("abcde"), np.zeros(5, bool), None, places, places, ("",))
    mean, zero = expected_counts(module, module.section(cells, None), np.arange(6), torch.randn(6, 5))
    np.testing.assert_allclose((mean * (1 - zero)).sum(1), x.sum(1), rtol=1e-5)
