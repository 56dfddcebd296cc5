"""Neighbour graphs of cells: coordinates in, lists of bounded degree out, never across samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.spatial import Delaunay, cKDTree

from spatialvae.errors import InputError

MAX_DEGREE = 64  # of a radius graph; more means that the radius is in another unit than the coordinates


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

    def adjacency(self, symmetric: bool = False) -> sp.csr_array:
        """Rows of ones, float32 (cell, cell); ``symmetric``: i ~ j if either lists the other."""
        there = self.index >= 0
        ends, columns = np.append(0, np.cumsum(there.sum(1))), self.index[there]
        matrix = sp.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(self.n_cells, self.n_cells))
        matrix.sort_indices()
        return sp.csr_array(matrix.maximum(matrix.T)) if symmetric else matrix


def knn_graph(coordinates: np.ndarray, k: int, samples: np.ndarray | None = None) -> NeighbourGraph:
    """The ``k`` nearest cells of the same sample, without the cell itself.

    Parameters
    ----------
    coordinates : float (cell, axis), 2 or 3 axes, any one unit
    k : neighbours of each cell; a sample of n cells gives n - 1 at most
    samples : int or str (cell,); one sample if not given
    """
    coordinates = checked_coordinates(coordinates)
    if k < 1:
        raise InputError(f"number of neighbours is {k}; expected at least 1")
    index = np.full((len(coordinates), k), -1, np.int32)
    distance = np.full((len(coordinates), k), np.inf, np.float32)
    for rows in _rows_of_samples(len(coordinates), samples):
        degree = min(k, len(rows) - 1)
        if degree == 0:
            continue
        tree = cKDTree(coordinates[rows])
        order = tree.indices  # of its leaves: queries that follow each other meet the same nodes
        far, near = tree.query(tree.data[order], degree + 1, workers=-1)
        far, near = _without_self(far, near, order)
        index[rows[order], :degree] = rows[near]
        distance[rows[order], :degree] = far
    return NeighbourGraph(index, distance)


def radius_graph(
    coordinates: np.ndarray, radius: float, samples: np.ndarray | None = None, max_degree: int = MAX_DEGREE
) -> NeighbourGraph:
    """All cells of the same sample within ``radius``. Cells may have no neighbour.

    Raises InputError, before anything large is made, if a cell would have more than ``max_degree`` neighbours.
    """
    coordinates = checked_coordinates(coordinates)
    if not radius > 0:
        raise InputError(f"radius is {radius}; expected a positive length in the unit of the coordinates")
    groups = _rows_of_samples(len(coordinates), samples)
    trees = [cKDTree(coordinates[rows]) for rows in groups]
    counts = [
        tree.query_ball_point(coordinates[rows], radius, return_length=True, workers=-1) - 1
        for tree, rows in zip(trees, groups, strict=True)
    ]
    most = max((int(c.max()) for c in counts), default=0)
    if most > max_degree:
        spacing = np.median(knn_graph(coordinates, 1, samples).distance)
        raise InputError(
            f"radius {radius:g} gives up to {most} neighbours a cell (at most {max_degree} expected): the median "
            f"distance to the nearest cell is {spacing:.3g}; are radius and coordinates in the same unit?"
        )
    index = np.full((len(coordinates), max(most, 1)), -1, np.int32)
    distance = np.full(index.shape, np.inf, np.float32)
    for tree, rows in zip(trees, groups, strict=True):
        pairs = tree.query_pairs(radius, output_type="ndarray")
        _fill(index, distance, coordinates, rows[np.concatenate([pairs, pairs[:, ::-1]])])
    return NeighbourGraph(index, distance)


def delaunay_graph(coordinates: np.ndarray, samples: np.ndarray | None = None) -> NeighbourGraph:
    """Cells that share an edge of the Delaunay triangulation of their sample.

    Samples with too few cells, or with all cells on a line, have none.
    """
    coordinates = checked_coordinates(coordinates)
    edges = [np.empty((0, 2), np.int64)]
    for rows in _rows_of_samples(len(coordinates), samples):
        if len(rows) <= coordinates.shape[1] + 1 or np.linalg.matrix_rank(np.ptp(coordinates[rows], 0)) == 0:
            continue
        simplices = Delaunay(coordinates[rows], qhull_options="QJ").simplices
        corners = simplices.shape[1]
        pairs = [simplices[:, [a, b]] for a in range(corners) for b in range(corners) if a != b]
        edges.append(rows[np.unique(np.concatenate(pairs), axis=0)])
    pairs_all = np.concatenate(edges)
    most = int(np.bincount(pairs_all[:, 0], minlength=1).max())
    index = np.full((len(coordinates), max(most, 1)), -1, np.int32)
    distance = np.full(index.shape, np.inf, np.float32)
    _fill(index, distance, coordinates, pairs_all)
    return NeighbourGraph(index, distance)


def symmetrised(graph: NeighbourGraph, coordinates: np.ndarray) -> NeighbourGraph:
    """The same graph with every edge in both directions."""
    matrix = graph.adjacency(symmetric=True).tocoo()
    most = int(np.bincount(matrix.row, minlength=1).max()) if matrix.nnz else 1
    index = np.full((graph.n_cells, most), -1, np.int32)
    distance = np.full(index.shape, np.inf, np.float32)
    _fill(index, distance, np.asarray(coordinates, float), np.stack([matrix.row, matrix.col], 1))
    return NeighbourGraph(index, distance)


def checked_coordinates(
    coordinates: np.ndarray, where: str = "the array of coordinates", names: Sequence[str] | None = None
) -> np.ndarray:
    """``coordinates`` as float64 (cell, 2 or 3), all finite.

    Raises InputError that calls them ``where`` and the first bad cell by its name among ``names``, or by its row.
    """
    coordinates = np.asarray(coordinates, float)
    if coordinates.ndim != 2 or coordinates.shape[1] not in (2, 3):
        raise InputError(f"{where} has shape {coordinates.shape}; expected (cell, 2) or (cell, 3)")
    bad = np.flatnonzero(~np.isfinite(coordinates).all(1))
    if len(bad):
        first = f"in row {bad[0]}" if names is None else repr(names[bad[0]])
        raise InputError(f"{where} is not finite for {len(bad)} cells, the first {first}")
    return coordinates


def _rows_of_samples(n: int, samples: np.ndarray | None) -> list[np.ndarray]:
    if samples is None:
        return [np.arange(n)] if n else []
    samples = np.asarray(samples)
    if len(samples) != n:
        raise InputError(f"{len(samples)} sample names for {n} cells; expected one each")
    code = np.unique(samples, return_inverse=True)[1]
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if n else []


def _without_self(far: np.ndarray, near: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own ``number``; where cells coincide it need not come first, or come at all."""
    own = near == number[:, None]
    own[~own.any(1), -1] = True
    keep = ~own
    shape = (len(near), near.shape[1] - 1)
    return far[keep].reshape(shape), near[keep].reshape(shape)


def _fill(index: np.ndarray, distance: np.ndarray, coordinates: np.ndarray, pairs: np.ndarray) -> None:
    """Write directed ``pairs`` (edge, 2) into the slots of their first cell, nearest first."""
    far = np.linalg.norm(coordinates[pairs[:, 0]] - coordinates[pairs[:, 1]], axis=1)
    matrix = sp.csr_array((far, pairs.T), shape=(len(index), len(index)))  # sorts by counting
    rows = np.repeat(np.arange(len(index)), np.diff(matrix.indptr))
    slot = np.arange(len(rows)) - matrix.indptr[rows]
    index[rows, slot], distance[rows, slot] = matrix.indices, matrix.data
    order = np.argsort(distance, axis=1, kind="stable")
    index[:], distance[:] = np.take_along_axis(index, order, 1), np.take_along_axis(distance, order, 1)
