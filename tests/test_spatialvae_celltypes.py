from __future__ import annotations

import numpy as np
import pytest
import torch

from spatialvae import celltypes
from spatialvae.celltypes import Observed, Types


@pytest.fixture(scope="module")
def planted():
    """Two types in two dimensions; the first is rare for low and frequent for high values of the niche. A tenth of the
    cells have no type."""
    slope = torch.tensor([[2.0], [-2.0]])
    mean, variance = torch.tensor([[3.0, 0.0], [-1.0, 2.0]]), torch.tensor([[0.3, 0.2], [0.1, 0.4]])
    return Types(torch.tensor(0.9), torch.tensor([0.5, -0.5]), slope, mean, variance)


OWN = torch.tensor([0.5, 1.0])
UNKNOWN = torch.zeros(1, 1), torch.full((1, 1), 0.6)


def cells_of(types, n, seed):
    """Cells with known z, in niches that are known almost exactly."""
    generator = torch.Generator().manual_seed(seed)
    niche = UNKNOWN[1].sqrt() * torch.randn(n, 1, generator=generator)
    sure = torch.full((n, 1), 1e-4)
    z = types.around((niche, sure), OWN).draw(1, generator)[0]
    return Observed(z[:, None], torch.zeros(n, 1), ((niche, sure), UNKNOWN))


def test_around__an_unknown_niche_is_the_average_over_niches(planted):
    cells = cells_of(planted, 50_000, 0)
    each = planted.around(cells.niches[0], OWN).log_density(cells.z[None, :200, 0].expand(50_000, -1, -1))
    expected = each.exp().mean(0)
    found = planted.around(UNKNOWN, OWN).log_density(cells.z[None, :200, 0])[0].exp()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.002)
    moments = planted.around(UNKNOWN, OWN).moments()
    torch.testing.assert_close(moments[0][0], cells.z[:, 0].mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(moments[1][0], cells.z[:, 0].var(0), atol=0, rtol=0.08)


def test_fit__explains_new_cells_as_the_truth_does(planted):
    cells, judged, new = (cells_of(planted, n, seed) for n, seed in ((2000, 1), (300, 2), (2000, 3)))
    found = celltypes.fit(cells, judged, OWN, 0)
    truth, none = (new.log_p(new.parts(types, OWN)) for types in (planted, Types.of_sizes(0, 1, 2)))
    assert new.log_p(new.parts(found, OWN)) > truth - 0.05
    assert truth > none + 0.5
    right, left = found.log_frequency(torch.tensor([[1.0], [-1.0]])).exp()
    near = (found.mean - planted.mean[0]).abs().sum(1) < 1.5
    assert right[near].sum() > 0.8 > 0.2 > left[near].sum()


def test_fit__finds_no_types_where_there_are_none():
    none = Types.of_sizes(0, 1, 2)
    cells, judged = cells_of(none, 400, 1), cells_of(none, 2000, 2)
    assert not len(celltypes.fit(cells, judged, OWN, 0).bias)


def test_each_step__raises_the_penalised_likelihood_of_frequencies(planted):
    cells = cells_of(planted, 500, 4)
    now = Types.of_sizes(2, 1, 2)
    now = Types(torch.tensor(0.5), now.bias, now.slope, planted.mean, planted.variance)
    values = []
    for _ in range(10):
        parts = cells.parts(now, OWN)
        values.append(cells.log_p(parts))
        shares = [cells.shares(part)[..., 1:].sum(1) for part in parts]
        bias, slope = celltypes._ascended(cells.niches, now, shares)
        now = Types(now.share, bias, slope, now.mean, now.variance)
    assert (np.diff(values) > -1e-4).all()
    assert values[-1] > values[0] + 0.05


def test_types__are_on_the_device_of_the_draws():
    meta = torch.device("meta")  # computes shapes only, but refuses tensors of the CPU as a GPU does
    niches = tuple((torch.empty(n, 2, device=meta), torch.empty(n, 2, device=meta)) for n in (50, 1))
    draws = Observed(torch.empty(50, 4, 5, device=meta), torch.empty(50, 4, device=meta), niches)
    for n_types in (0, 3):
        types = Types.of_sizes(n_types, 2, 5, meta)
        parts = draws.parts(types, torch.empty(5, device=meta))
        assert {(part.device, part.shape) for part in parts} == {(meta, (50, 4, 1 + n_types))}
