from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from spatialvae import InputError, SpatialVAE, data, graph


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


def test_symmetric_adjacency__has_each_edge_twice():
    xyz, samples = cells(50, 1)
    found = graph.knn_graph(xyz, 4, samples)
    one = found.adjacency().toarray()
    np.testing.assert_array_equal(found.adjacency(symmetric=True).toarray(), np.maximum(one, one.T))


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_data__takes_the_graph_to_pytorch_geometric_and_back():
    from torch_geometric.data import Data
    from torch_geometric.nn import SimpleConv

    xyz, samples = cells(40, 2)
    adata = anndata.AnnData(np.ones((40, 2), np.float32), obsm={"spatial": xyz})
    adata.obs["section"] = [f"s{i}" for i in samples]
    with pytest.raises(InputError, match="setup_anndata"):
        graph.to_data(adata)
    SpatialVAE.setup_anndata(adata, sample_key="section")
    made = graph.to_data(adata, k=4)
    expected = graph.knn_graph(xyz, 4, samples)
    found = graph.from_data(made)
    np.testing.assert_array_equal(found.distance, expected.distance)
    np.testing.assert_array_equal(found.index >= 0, expected.index >= 0)
    means = SimpleConv(aggr="mean")(made.pos, made.edge_index)
    for i in (0, 7):
        near = expected.index[i][expected.index[i] >= 0]
        np.testing.assert_allclose(means[i], xyz[near].mean(0) if len(near) else [0, 0], rtol=1e-5)
    with pytest.raises(InputError, match="refers to cell 99"):
        graph.from_data(Data(edge_index=torch.tensor([[99], [0]]), pos=made.pos))
    with pytest.raises(InputError, match="neither edge_attr nor pos"):
        graph.from_data(Data(edge_index=made.edge_index, num_nodes=40))
