from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from spatialvae import InputError, data, graph


def cells(n, seed, axes=2):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, (n, axes)).astype(float), rng.integers(0, 3, n)  # coinciding cells on purpose


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 50), st.sampled_from([2, 3]))
def test_knn_graph__matches_brute_force_within_samples(n, k, seed, axes):
    xyz, samples = cells(n, seed, axes)
    found = graph.knn_graph(xyz, k, samples)
    for i, expected in enumerate(reference.nearest_neighbours(xyz, samples, k)):
        near = found.index[i][found.index[i] >= 0]
        assert i not in near
        assert len(set(near)) == len(near)
        assert (samples[near] == samples[i]).all()
        np.testing.assert_allclose(found.distance[i][: len(near)], expected, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(xyz[near] - xyz[i], axis=1), expected)


def test_radius_graph__matches_brute_force():
    xyz, samples = cells(60, 3)
    found = graph.radius_graph(xyz, 2.5, samples)
    for i in range(60):
        far = np.linalg.norm(xyz - xyz[i], axis=1)
        expected = {j for j in range(60) if j != i and samples[j] == samples[i] and far[j] <= 2.5}
        assert set(found.index[i][found.index[i] >= 0]) == expected


def test_radius_graph__refuses_radius_in_wrong_unit():
    xyz = np.random.default_rng(0).uniform(0, 1000, (500, 2))
    with pytest.raises(InputError, match="same unit"):
        graph.radius_graph(xyz, 50_000)


def test_delaunay_graph__square_with_centre():
    xyz = np.array([[0, 0], [2, 0], [2, 2], [0, 2], [1, 1.0]])
    found = graph.delaunay_graph(np.concatenate([xyz, xyz]), np.repeat([0, 1], 5))
    assert set(found.index[4][found.index[4] >= 0]) == {0, 1, 2, 3}
    assert set(found.index[9][found.index[9] >= 0]) == {5, 6, 7, 8}


def test_symmetrised__has_each_edge_twice():
    xyz, samples = cells(50, 1)
    both = graph.symmetrised(graph.knn_graph(xyz, 4, samples), xyz).adjacency().toarray()
    one = graph.knn_graph(xyz, 4, samples).adjacency().toarray()
    np.testing.assert_array_equal(both, np.maximum(one, one.T))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_knn_graph__rejects_coordinates_that_are_not_finite(bad):
    with pytest.raises(InputError, match="not finite"):
        graph.knn_graph(np.array([[0, 0], [1, bad]]), 1)


def test_minibatches__see_every_row_once():
    rows = np.arange(203)
    assert np.concatenate(list(data.minibatches(rows, 20))).tolist() == rows.tolist()
    shuffled = list(data.minibatches(rows, 20, np.random.default_rng(0)))
    assert sorted(np.concatenate(shuffled)) == rows.tolist()
    assert [len(piece) for piece in shuffled] == [20] * 10 + [3]
