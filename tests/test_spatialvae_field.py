from __future__ import annotations

import numpy as np
import pytest

import reference
from spatialvae import field, graph
from spatialvae.field import ROUGH_RANGE


@pytest.fixture(scope="module")
def section():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(0, 10, (150, 2))
    near = graph.knn_graph(xyz, 6).adjacency(symmetric=True)
    return xyz, graph.knn_graph(xyz, 15).adjacency(), field.laplacian_of(near)


def test_solve__gives_the_posterior_mean_of_dense_algebra(section):
    _, _, laplacian = section
    y = np.random.default_rng(1).normal(size=(150, 3))
    smooth, noise = np.array([20, 5.0, 0.5]), np.array([0.3, 0.5, 0.1])
    weight = np.broadcast_to(smooth / noise, y.shape)
    expected = reference.smooth_part(laplacian.toarray(), y, 9.0, 1.0, smooth, 0 * smooth, noise)
    found = field.solve(laplacian, np.full(3, 9.0), weight, weight * y)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    again = field.solve(laplacian, np.full(3, 9.0), weight, weight * y, start=found)
    np.testing.assert_allclose(again, expected, atol=1e-3)


def test_posterior_covariance__has_the_diagonal_of_the_dense_inverse(section):
    _, _, laplacian = section
    rng = np.random.default_rng(2)
    weight = rng.gamma(1, 2, (150, 2)) * (rng.random((150, 1)) < 0.8)  # some cells have no information
    blocks = field.posterior_covariance(laplacian, np.full(2, 9.0), weight[..., None] * np.eye(2), rng, 200)
    found = np.einsum("idd->id", blocks)
    for d in range(2):
        exact = np.linalg.inv(np.eye(150) + 9 * laplacian.toarray() + np.diag(weight[:, d])).diagonal()
        np.testing.assert_allclose(found[:, d], exact, rtol=0.3)
        assert found[:, d].mean() == pytest.approx(exact.mean(), rel=0.03)


def test_solve_and_draws__join_dimensions_as_dense_algebra_does(section):
    _, _, laplacian = section
    rng = np.random.default_rng(5)
    root = rng.normal(size=(150, 2, 2))
    weight, target = root @ root.transpose(0, 2, 1), rng.normal(size=(150, 2))
    r = np.array([4.0, 9.0])
    dense = np.eye(300) + np.kron(laplacian.toarray(), np.diag(r))
    for i, own in enumerate(weight):
        dense[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] += own
    inverse = np.linalg.inv(dense)
    np.testing.assert_allclose(
        field.solve(laplacian, r, weight, target), (inverse @ target.ravel()).reshape(150, 2), atol=1e-3
    )
    found = field.posterior_covariance(laplacian, r, weight, rng, 400)
    exact = np.einsum("idie->ide", inverse.reshape(150, 2, 150, 2))
    np.testing.assert_allclose(found, exact, rtol=0.25, atol=0.02)


def test_fit_field__finds_the_maximum_of_the_dense_likelihood(section):
    xyz, neighbours, laplacian = section
    rng = np.random.default_rng(2)
    wave = np.sin(xyz[:, 0])[:, None] * [1.0, 0.5, 0, 0] + rng.normal(size=(150, 4)) * [0.5, 1, 1, 1]
    y = wave - wave.mean(0)
    y = y @ field.spatial_directions(y, neighbours)
    found = field.fit_field(y, laplacian, 4)
    assert found.chosen[0] == 0

    def at(smooth, rough, noise):
        dense = laplacian.toarray()
        return reference.field_log_likelihood(dense, y[:, 0], found.range, ROUGH_RANGE, smooth, rough, noise)

    best = at(found.smooth[0], found.rough[0], found.noise[0])
    assert best - at(1e-9, *_best_without(at)) == pytest.approx(found.gain[0], rel=0.15)
    for factor in (0.5, 2):
        assert at(found.smooth[0] * factor, found.rough[0], found.noise[0]) < best + 0.1
        assert at(found.smooth[0], found.rough[0], found.noise[0] * factor) < best + 0.1


def _best_without(at):
    grid = np.geomspace(0.01, 2, 25)
    return max(((g, e) for g in grid for e in grid), key=lambda pair: at(1e-9, *pair))


def test_spatial_directions__are_uncorrelated_and_ordered_by_what_neighbours_share(section):
    xyz, neighbours, _ = section
    rng = np.random.default_rng(4)
    scores = np.sin(xyz[:, :1]) * [1.0, 0.4, 0] + rng.normal(size=(150, 3))
    scores -= scores.mean(0)
    y = scores @ field.spatial_directions(scores, neighbours)
    np.testing.assert_allclose(y.T @ y / 150, np.eye(3), atol=1e-4)
    means = np.stack([y[neighbours[[i]].indices].mean(0) for i in range(150)])
    shared = (y * means).mean(0)
    assert (np.diff(shared) < 0).all()


def test_fit_field__keeps_few_directions_of_pure_noise(section):
    _, neighbours, laplacian = section
    noise = np.random.default_rng(3).normal(size=(150, 20))
    noise -= noise.mean(0)
    found = field.fit_field(noise @ field.spatial_directions(noise, neighbours), laplacian, 20)
    assert len(found.chosen) <= 5


@pytest.mark.parametrize("exact", [True, False])
def test_trace_measure__integrates_as_the_dense_matrix_does(section, exact, monkeypatch):
    _, _, laplacian = section
    monkeypatch.setattr(field, "EXACT", 1000 if exact else 10)
    nodes, weights = field.trace_measure(laplacian)
    root = np.eye(150) + 5 * laplacian.toarray()
    tolerance = 0.001 if exact else 0.02
    assert weights @ np.log1p(5 * nodes) == pytest.approx(np.linalg.slogdet(root)[1] / 150, rel=tolerance)
    assert weights @ (1 / (1 + 5 * nodes)) == pytest.approx(np.trace(np.linalg.inv(root)) / 150, rel=5 * tolerance)
