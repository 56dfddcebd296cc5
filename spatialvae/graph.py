"""Neighbour graphs of cells from coordinates, within samples and of bounded degree, and their conversion from and to
``torch_geometric.data.Data``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from spatialvae import _keys
from spatialvae.errors import InputError, check_count
from spatialvae.setup import Setup, checked_coordinates, read_places

if TYPE_CHECKING:
    from anndata import AnnData
    from torch_geometric.data import Data


@dataclass(frozen=True, eq=False)
class NeighbourGraph:
    """Neighbours of each cell, nearest first.

    Attributes
    ----------
    index : int32 (cell, slot); -1 where a cell has fewer neighbours than slots
    distance : float32 (cell, slot), in the unit of the coordinates; inf in empty slots
    """

    index: np.ndarray
    distance: np.ndarray

    @property
    def n_cells(self) -> int:
        return len(self.index)

    @property
    def degree(self) -> np.ndarray:
        """Number of neighbours, int64 (cell,)."""
        return (self.index >= 0).sum(1)

    def nearest(self, k: int) -> NeighbourGraph:
        """The graph of the ``k`` nearest of these neighbours."""
        return NeighbourGraph(self.index[:, :k], self.distance[:, :k])

    def adjacency(self, symmetric: bool = False) -> sp.csr_array:
        """Adjacency matrix of ones, float32 (cell, cell); ``symmetric``: i ~ j if one is a neighbour of the other."""
        there = self.index >= 0
        ends, columns = np.append(0, np.cumsum(there.sum(1))), self.index[there]
        matrix = sp.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(self.n_cells, self.n_cells))
        matrix.sort_indices()
        return sp.csr_array(matrix.maximum(matrix.T)) if symmetric else matrix


def knn_graph(coordinates: np.ndarray, k: int, samples: np.ndarray | None = None) -> NeighbourGraph:
    """Find the ``k`` nearest cells of each cell within its sample, without the cell itself.

    Parameters
    ----------
    coordinates : float (cell, axis), 2 or 3 axes in the same unit
    k : number of neighbours; cells have fewer in samples of at most ``k`` cells
    samples : int or str (cell,); one sample if None

    Raises
    ------
    InputError : for coordinates of another shape or that are not finite, an invalid ``k``, or ``samples`` of another
        length
    """
    coordinates = checked_coordinates(coordinates)
    check_count("the number of neighbours", k)
    index = np.full((len(coordinates), k), -1, np.int32)
    distance = np.full((len(coordinates), k), np.inf, np.float32)
    for rows in _rows_of_samples(len(coordinates), samples):
        degree = min(k, len(rows) - 1)
        if degree == 0:
            continue
        tree = cKDTree(coordinates[rows])
        order = tree.indices  # order of the leaves, so that consecutive queries visit the same nodes
        far, near = tree.query(tree.data[order], degree + 1, workers=-1)
        far, near = without_own(far, near, order)
        index[rows[order], :degree] = rows[near]
        distance[rows[order], :degree] = far
    return NeighbourGraph(index, distance)


def to_data(adata: AnnData, k: int = 15) -> Data:
    """Convert a table prepared by ``SpatialVAE.setup_anndata`` to a ``torch_geometric.data.Data``.

    ``pos`` float32 (cell, axis); ``edge_index`` int64 (2, edge), from the ``k`` nearest cells of the same sample to
    each cell, in order of the target cell, nearest first; ``edge_attr`` float32 (edge, 1), distances in the unit of the
    coordinates; ``x`` float32 (cell, dim), ``obsm["X_spatialvae"]`` if it exists.

    Raises InputError if the table was not set up or has no coordinates.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by the import, about torch.jit.script
        from torch_geometric.data import Data

    setup = Setup.read(adata)
    if setup.spatial_key is None:
        raise InputError("the table was set up without spatial_key: a graph needs coordinates")
    coordinates, samples = read_places(adata, setup)
    graph = knn_graph(coordinates, k, samples)
    target, slot = np.nonzero(graph.index >= 0)
    edges = np.stack([graph.index[target, slot], target]).astype(np.int64)
    data = Data(
        pos=torch.from_numpy(coordinates.astype(np.float32)),
        edge_index=torch.from_numpy(edges),
        edge_attr=torch.from_numpy(graph.distance[target, slot][:, None]),
        num_nodes=adata.n_obs,
    )
    if _keys.LATENT in adata.obsm:
        data.x = torch.from_numpy(np.asarray(adata.obsm[_keys.LATENT], np.float32))
    return data


def from_data(data: Data) -> NeighbourGraph:
    """Convert ``data.edge_index`` (2, edge), from neighbour to cell, to a ``NeighbourGraph``.

    Distances are ``data.edge_attr``, (edge,) or (edge, 1), or else those between the positions ``data.pos``.

    Raises InputError if an edge refers to a cell that does not exist, if the number of distances differs from that of
    edges, or if there are neither distances nor positions.
    """
    edges = np.asarray(data.edge_index.cpu())
    n = int(data.num_nodes)
    if edges.size and not 0 <= edges.min() <= edges.max() < n:
        raise InputError(f"edge_index refers to cell {edges.max()} (or to a negative one); there are {n} cells")
    if data.edge_attr is not None:
        far = np.asarray(data.edge_attr.cpu(), np.float32).reshape(-1)
        if len(far) != edges.shape[1]:
            raise InputError(f"edge_attr has {len(far)} values for {edges.shape[1]} edges; expected one distance each")
    elif data.pos is not None:
        places = np.asarray(data.pos.cpu(), np.float32)
        far = np.linalg.norm(places[edges[0]] - places[edges[1]], axis=1)
    else:
        raise InputError("data has neither edge_attr nor pos; distances to neighbours need one of them")
    order = np.lexsort((far, edges[1]))
    source, target, far = edges[0][order], edges[1][order], far[order]
    degree = np.bincount(target, minlength=n)
    slot = np.arange(len(target)) - np.repeat(np.cumsum(degree) - degree, degree)
    index = np.full((n, max(int(degree.max(initial=0)), 1)), -1, np.int32)
    distance = np.full(index.shape, np.inf, np.float32)
    index[target, slot], distance[target, slot] = source, far
    return NeighbourGraph(index, distance)


def _rows_of_samples(n: int, samples: np.ndarray | None) -> list[np.ndarray]:
    if samples is None:
        return [np.arange(n)] if n else []
    samples = np.asarray(samples)
    if len(samples) != n:
        raise InputError(f"{len(samples)} sample names for {n} cells; expected one for each")
    code = np.unique(samples, return_inverse=True)[1]
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if n else []


def without_own(far: np.ndarray, near: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove from each row its own ``number``, which may not be first if cells coincide; the last if it is missing."""
    own = near == number[:, None]
    own[~own.any(1), -1] = True
    keep = ~own
    shape = (len(near), near.shape[1] - 1)
    return far[keep].reshape(shape), near[keep].reshape(shape)
