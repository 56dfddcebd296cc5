"""From AnnData to checked arrays and minibatches."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvae import _keys
from spatialvae.counts import Counts, read_counts
from spatialvae.errors import InputError
from spatialvae.graph import NeighbourGraph, knn_graph
from spatialvae.setup import Setup, check_key, read_codes, read_coordinates

if TYPE_CHECKING:
    import scipy.sparse as sp
    from anndata import AnnData

    from spatialvae.measurement import Measurement

WIDE_NEIGHBOURS = 15
FIELD_NEIGHBOURS = 6  # about the number of cells adjacent to a cell in the plane


@dataclass(frozen=True, eq=False)
class Cells:
    """The data of a table that the model uses.

    ``coordinates`` float64 (cell, axis) or None; ``samples`` and ``batches`` int64 (cell,), codes; ``batch_names`` in
    the order of their codes; ``depth`` float32 (cell,), the total counts; ``missing`` bool (gene,), genes of the model
    that the table lacks, whose columns of ``counts`` are empty; ``measurement`` if ``Setup.measurement`` is True.
    """

    counts: Counts
    genes: tuple[str, ...]
    missing: np.ndarray
    coordinates: np.ndarray | None
    samples: np.ndarray
    batches: np.ndarray
    batch_names: tuple[str, ...]
    measurement: Measurement | None = None

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def depth(self) -> np.ndarray:
        return self.counts.depth


@dataclass(frozen=True, eq=False)
class Graphs:
    """``wide``: the 15 nearest neighbours; ``near``: the symmetric adjacency matrix (cell, cell) of the 6 nearest, for
    the field. ``near`` has no slots for neighbours: if many cells have the same position, some have many."""

    wide: NeighbourGraph
    near: sp.csr_array

    @property
    def spacing(self) -> float:
        """Median distance of the 6 nearest neighbours, in the unit of the coordinates."""
        near = self.wide.nearest(FIELD_NEIGHBOURS)
        return float(np.median(near.distance[near.index >= 0]))

    @property
    def mean_degree(self) -> float:
        """Mean number of neighbours in ``near``."""
        return self.near.nnz / self.near.shape[0]


def check_table(adata: AnnData, setup: Setup) -> None:
    """Check the data of ``adata`` that the model uses, except the counts, which ``read_cells`` checks.

    Raises InputError for missing keys, duplicate names, coordinates that are not finite, and missing values of samples,
    batches or labels.
    """
    _check_names(adata)
    _counts(adata, setup.layer)
    read_coordinates(adata, setup.spatial_key)
    for key in (setup.sample_key, setup.batch_key, setup.labels_key):
        check_key(adata, key)


def read_cells(
    adata: AnnData,
    setup: Setup,
    genes: tuple[str, ...] | None = None,
    batch_names: tuple[str, ...] | None = None,
) -> Cells:
    """Check ``adata`` against ``setup`` and extract what the model uses.

    ``genes`` and ``batch_names`` are those of a trained model, if any; genes are then matched by name. Genes marked in
    ``var["is_blank"]`` are left out. Warns if the table lacks genes of the model, and if cells have no counts.

    Raises InputError as ``check_table``, and also for counts that are not non-negative integers, a damaged table, a
    table with fewer than 2 genes of the model, and batches that the model was not trained on.
    """
    _check_names(adata)
    matrix, where = _counts(adata, setup.layer)
    coordinates = read_coordinates(adata, setup.spatial_key)
    samples = read_codes(adata, setup.sample_key)[0]
    batches, names = read_codes(adata, setup.batch_key)
    columns, missing = _columns(adata, genes)
    if batch_names is not None and setup.batch_key is not None:
        unknown = [name for name in names if name not in batch_names]
        if unknown:
            raise InputError(
                f"obs[{setup.batch_key!r}] has batch {unknown[0]!r}; the model has the batches {list(batch_names)}"
            )
        batches = np.array([batch_names.index(name) for name in names])[batches]
        names = batch_names
    counts = read_counts(matrix, columns[~missing], where)
    if missing.any():
        counts = counts.spread_over(np.flatnonzero(~missing), len(missing))
    empty = np.flatnonzero(counts.depth == 0)
    if len(empty):
        known = "their neighbours" if coordinates is not None else "the average cell"
        warnings.warn(
            f"{len(empty)} cell{'' if len(empty) == 1 else 's'} without counts in {where}, the first is "
            f"{adata.obs_names[empty[0]]!r}: their embedding is computed from {known}",
            stacklevel=2,
        )
    measurement = None
    if setup.measurement:
        from spatialvae.measurement import read_measurement

        calls = counts.of_genes()
        measurement = read_measurement(adata, columns, calls / calls.sum())
    names_of_genes = tuple(adata.var_names[columns]) if genes is None else genes
    return Cells(counts, names_of_genes, missing, coordinates, samples, batches, names, measurement)


def fingerprint(adata: AnnData, setup: Setup) -> int:
    """A checksum of everything that ``read_cells`` reads from a table in memory; for data in a file, of their
    description."""
    matrix = _counts(adata, setup.layer)[0]
    parts = [getattr(matrix, name) for name in ("data", "indices", "indptr")] if hasattr(matrix, "indptr") else [matrix]
    if setup.spatial_key is not None:
        parts.append(read_coordinates(adata, setup.spatial_key))
    parts += [read_codes(adata, key)[0] for key in (setup.sample_key, setup.batch_key)]
    if setup.measurement:
        parts += [adata.var[key].to_numpy(float) for key in (_keys.EFFICIENCY, _keys.WRONG) if key in adata.var]
    value = 0
    for part in parts:
        value = zlib.crc32(
            np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else str(part).encode(), value
        )
    return value


def build_graphs(cells: Cells) -> Graphs | None:
    """Neighbour graphs within each sample; None without coordinates."""
    return None if cells.coordinates is None else graphs_of(cells.coordinates, cells.samples)


def graphs_of(coordinates: np.ndarray, samples: np.ndarray) -> Graphs:
    """Neighbour graphs of cells at ``coordinates`` (cell, axis), within ``samples`` (cell,)."""
    wide = knn_graph(coordinates, WIDE_NEIGHBOURS, samples)
    return Graphs(wide, wide.nearest(FIELD_NEIGHBOURS).adjacency(symmetric=True))


def minibatches(rows: np.ndarray, size: int, rng: np.random.Generator | None = None) -> Iterator[np.ndarray]:
    """``rows`` in minibatches of ``size``, shuffled if ``rng`` is given. Every row occurs once."""
    if rng is not None:
        rows = rng.permutation(rows)
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _check_names(adata: AnnData) -> None:
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise InputError(
            f"expected an AnnData with counts and obsm['spatial'], got {type(adata).__name__}; read one with "
            "anndata.read_h5ad"
        )
    for what, names in (("cell", adata.obs_names), ("gene", adata.var_names)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise InputError(f"{what} names are not unique: {twice!r} occurs more than once")
    if adata.n_obs < 2 or adata.n_vars < 2:
        raise InputError(f"the table has {adata.n_obs} cells and {adata.n_vars} genes; expected at least 2 of each")


def _counts(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    if layer is None:
        if adata.X is None:
            raise InputError("the table has no X; name the layer with counts")
        return adata.X, "X"
    if layer not in adata.layers:
        raise InputError(f"no layer {layer!r} in the table; it has {', '.join(sorted(adata.layers)) or 'no layers'}")
    return adata.layers[layer], f"layer {layer!r}"


def _columns(adata: AnnData, genes: tuple[str, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Column of each gene of the model, -1 if the table lacks it, and whether the table lacks it, (gene,) each."""
    if genes is None:
        columns = np.arange(adata.n_vars)
        if _keys.IS_BLANK in adata.var:
            blank = adata.var[_keys.IS_BLANK]
            odd = np.flatnonzero(~blank.isin([True, False]))
            if len(odd):
                raise InputError(
                    f"var[{_keys.IS_BLANK!r}] is {blank.iloc[odd[0]]!r} for gene {blank.index[odd[0]]!r} "
                    f"({len(odd)} such genes); expected True or False"
                )
            columns = np.flatnonzero(~blank.to_numpy(bool))
        return columns, np.zeros(len(columns), bool)
    columns = adata.var_names.get_indexer(list(genes))
    missing = columns < 0
    names = [gene for gene, absent in zip(genes, missing, strict=True) if absent]
    if missing.sum() > len(genes) - 2:
        raise InputError(
            f"the table has {len(genes) - len(names)} of the {len(genes)} genes that the model was trained on, "
            f"expected at least 2; it lacks {', '.join(names[:3])}, ...; check that both use the same gene names"
        )
    if names:
        warnings.warn(
            f"the table lacks {len(names)} of the {len(genes)} genes of the model, {', '.join(names[:3])}, ...: "
            "they are treated as not measured",
            stacklevel=3,
        )
    return columns, missing
