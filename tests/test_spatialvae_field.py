from __future__ import annotations

import numpy as np
import pytest

import reference
from spatialvae import field, graph
from spatialvae.field import ROUGH_RANGE, Field


@pytest.fixture(scope="module")
def section():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(0, 10, (150, 2))
    near = graph.symmetrised(graph.knn_graph(xyz, 6), xyz)
    return xyz, graph.knn_graph(xyz, 15).adjacency(), field.laplacian_of(near.adjacency())


def test_smooth_part__matches_dense_algebra(section):
    _, _, laplacian = section
    rng = np.random.default_rng(1)
    y = rng.normal(size=(150, 3))
    smooth, rough, noise = np.array([[20, 5.0, 0.5], [0.2, 0.1, 0.4], [0.3, 0.5, 0.1]])
    one = Field(np.eye(3), 9.0, smooth, rough, noise, *np.zeros((3, 3)))
    expected = reference.smooth_part(laplacian.toarray(), y, 9.0, ROUGH_RANGE, smooth, rough, noise)
    np.testing.assert_allclose(one.smooth_part(laplacian, y), expected, atol=2e-3)


def test_fit_field__finds_the_maximum_of_the_dense_likelihood(section):
    xyz, neighbours, laplacian = section
    rng = np.random.default_rng(2)
    wave = np.sin(xyz[:, 0])[:, None] * [1.0, 0.5, 0, 0] + rng.normal(size=(150, 4)) * [0.5, 1, 1, 1]
    y = wave - wave.mean(0)
    found = field.fit_field(y, neighbours, laplacian, 4)
    one = y @ found.directions[:, 0]

    def at(smooth, rough, noise):
        return reference.field_log_likelihood(laplacian.toarray(), one, found.range, ROUGH_RANGE, smooth, rough, noise)

    best = at(found.smooth[0], found.rough[0], found.noise[0])
    assert best - at(1e-9, *_best_without(at)) == pytest.approx(found.gain[0], rel=0.15)
    for factor in (0.5, 2):
        assert at(found.smooth[0] * factor, found.rough[0], found.noise[0]) < best + 0.1
        assert at(found.smooth[0], found.rough[0], found.noise[0] * factor) < best + 0.1


def _best_without(at):
    grid = np.geomspace(0.01, 2, 25)
    return max(((g, e) for g in grid for e in grid), key=lambda pair: at(1e-9, *pair))


def test_niche__weighs_field_and_neighbourhood_by_their_variances(section):
    xyz, neighbours, laplacian = section
    rng = np.random.default_rng(4)
    y = np.sin(xyz[:, :1]) * [1.0, 0.4, 0] + rng.normal(size=(150, 3))
    found = field.fit_field(y - y.mean(0), neighbours, laplacian, 3)
    dense = np.eye(150) + found.range * laplacian.toarray()
    smooth = found.smooth[0] * np.linalg.inv(dense)
    rest = found.rough[0] * np.linalg.inv(np.eye(150) + ROUGH_RANGE * laplacian.toarray()) + found.noise[0] * np.eye(
        150
    )
    doubt = np.trace(smooth - smooth @ np.linalg.solve(smooth + rest, smooth)) / 150
    assert found.doubt[0] == pytest.approx(doubt, rel=0.1)
    assert found.own[0] == pytest.approx(np.trace(rest) / 150, rel=0.05)
    mean = np.stack([y[np.append(np.flatnonzero(neighbours[[i]].toarray()), i)].mean(0) for i in range(150)])
    field_part, weight = found.smooth_part(laplacian, y), found.doubt / (found.doubt + found.own / 16)
    expected = weight * (mean @ found.directions) + (1 - weight) * field_part
    np.testing.assert_allclose(found.niche(laplacian, neighbours, y), expected, atol=1e-4)


def test_fit_field__keeps_few_directions_of_pure_noise(section):
    _, neighbours, laplacian = section
    noise = np.random.default_rng(3).normal(size=(150, 20))
    assert field.fit_field(noise - noise.mean(0), neighbours, laplacian, 20).n_directions <= 5


def test_smooth_part__of_a_pure_field_is_an_average_that_keeps_constants(section):
    """Rows of the filter sum to one when the smooth part dominates: the special case is an average of neighbours."""
    _, _, laplacian = section
    one = Field(np.eye(1), 9.0, np.array([1e5]), np.array([1e-8]), np.array([1.0]), *np.zeros((3, 1)))
    np.testing.assert_allclose(one.smooth_part(laplacian, np.ones((150, 1))), 1, atol=5e-3)


def test_spectral_means__match_dense(section):
    _, _, laplacian = section
    root = np.eye(150) + 5 * laplacian.toarray()
    log_det, spread = field.spectral_means(laplacian, 5.0)
    assert log_det == pytest.approx(np.linalg.slogdet(root)[1] / 150, rel=0.02)
    assert spread == pytest.approx(np.trace(np.linalg.inv(root)) / 150, rel=0.1)
