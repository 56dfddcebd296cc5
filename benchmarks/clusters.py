"""Clusterings of a latent space (cell, dim), shared by the benchmarks of embeddings; leiden needs [analysis]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

if TYPE_CHECKING:
    import igraph

NEIGHBOURS = 15


def mixture(latent: np.ndarray, k: int, seed: int, covariance: str) -> np.ndarray:
    """Cluster by a Gaussian mixture with one initialisation."""
    ridge = 1e-6 * latent.var(0).mean()
    return GaussianMixture(k, covariance_type=covariance, reg_covar=ridge, random_state=seed).fit_predict(latent)


def neighbour_graph(latent: np.ndarray) -> igraph.Graph:
    """Build the graph of the 15 nearest neighbours in the latent space."""
    import igraph

    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(latent).kneighbors(return_distance=False)
    edges = np.c_[np.repeat(np.arange(len(latent)), NEIGHBOURS), near.ravel()]
    return igraph.Graph(len(latent), edges=edges.tolist()).simplify()


def communities(graph: igraph.Graph, resolution: float, seed: int) -> np.ndarray:
    """Cluster by Leiden."""
    import leidenalg

    kind = leidenalg.RBConfigurationVertexPartition
    found = leidenalg.find_partition(graph, kind, resolution_parameter=resolution, seed=seed, n_iterations=2)
    return np.array(found.membership)


def leiden(latent: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster by Leiden, with the resolution that gives ``k`` clusters, or the nearest number in 14 bisections."""
    graph = neighbour_graph(latent)
    low, high = 0.005, 4.0
    tried: list[tuple[int, np.ndarray]] = []
    for _ in range(14):
        resolution = (low * high) ** 0.5
        labels = communities(graph, resolution, seed)
        clusters = int(labels.max()) + 1
        tried.append((abs(clusters - k), labels))
        if clusters == k:
            break
        low, high = (resolution, high) if clusters < k else (low, resolution)
    return min(tried, key=lambda found: found[0])[1]


CLUSTERERS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "mixture, tied": lambda latent, k, seed: mixture(latent, k, seed, "tied"),
    "mixture, full": lambda latent, k, seed: mixture(latent, k, seed, "full"),
    "leiden": leiden,
}
