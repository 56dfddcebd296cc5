"""AnnData in, checked arrays and minibatches out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvae import _keys
from spatialvae.counts import Counts, read_counts
from spatialvae.errors import InputError
from spatialvae.graph import NeighbourGraph, checked_coordinates, knn_graph, symmetrised

if TYPE_CHECKING:
    from anndata import AnnData

ATTENTION_NEIGHBOURS = 15
FIELD_NEIGHBOURS = 6  # in the plane, about the cells that touch


@dataclass(frozen=True)
class Setup:
    """Where things stand in an AnnData."""

    layer: str | None = None
    spatial_key: str | None = "spatial"
    sample_key: str | None = None
    batch_key: str | None = None

    def write(self, adata: AnnData) -> None:
        adata.uns[_keys.SETUP] = {name: value or "" for name, value in asdict(self).items()}

    @classmethod
    def read(cls, adata: AnnData) -> Setup:
        if _keys.SETUP not in adata.uns:
            raise InputError("this AnnData was not set up: call SpatialVAE.setup_anndata(adata, ...) first")
        return cls(**{name: str(value) or None for name, value in adata.uns[_keys.SETUP].items()})


@dataclass(frozen=True, eq=False)
class Cells:
    """What the model reads of a table. ``coordinates`` float64 (cell, axis) or None; ``samples`` and ``batches`` int64
    (cell,); ``batch_names`` in the order of their codes; ``depth`` float32 (cell,), the total counts."""

    counts: Counts
    genes: tuple[str, ...]
    coordinates: np.ndarray | None
    samples: np.ndarray
    batches: np.ndarray
    batch_names: tuple[str, ...]

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def depth(self) -> np.ndarray:
        return self.counts.depth


@dataclass(frozen=True, eq=False)
class Graphs:
    """``wide``: the neighbourhood that attention sees; ``near``: symmetric, the edges of the spatial prior."""

    wide: NeighbourGraph
    near: NeighbourGraph


def check_table(adata: AnnData, setup: Setup) -> None:
    """Check all of ``adata`` that the model reads, but the counts: those are read once, by ``read_cells``.

    Raises InputError for missing keys, duplicated names, coordinates that are not finite, missing samples or batches.
    """
    _check_names(adata)
    _counts(adata, setup.layer)
    _coordinates(adata, setup.spatial_key)
    for key in (setup.sample_key, setup.batch_key):
        _check_key(adata, key)


def read_cells(
    adata: AnnData,
    setup: Setup,
    genes: tuple[str, ...] | None = None,
    batch_names: tuple[str, ...] | None = None,
) -> Cells:
    """Check ``adata`` against ``setup`` and take out what the model reads.

    ``genes`` and ``batch_names`` are those of a trained model, when there is one: genes are then matched by name.
    Genes that ``var["is_blank"]`` marks are left out.

    Raises InputError as ``check_table`` does, and for counts that are not non-negative integers, cells without counts,
    genes or batches that the model does not know.
    """
    _check_names(adata)
    matrix, where = _counts(adata, setup.layer)
    coordinates = _coordinates(adata, setup.spatial_key)
    samples = _codes(adata, setup.sample_key)[0]
    batches, names = _codes(adata, setup.batch_key)
    columns = _columns(adata, genes)
    if batch_names is not None and setup.batch_key is not None:
        unknown = [name for name in names if name not in batch_names]
        if unknown:
            raise InputError(f"obs[{setup.batch_key!r}] has batch {unknown[0]!r}; the model knows {list(batch_names)}")
        batches = np.array([batch_names.index(name) for name in names])[batches]
        names = batch_names
    counts = read_counts(matrix, columns, where)
    return Cells(counts, tuple(adata.var_names[columns]), coordinates, samples, batches, names)


def build_graphs(cells: Cells) -> Graphs | None:
    """Neighbours within each sample; None without coordinates."""
    if cells.coordinates is None:
        return None
    wide = knn_graph(cells.coordinates, ATTENTION_NEIGHBOURS, cells.samples)
    near = NeighbourGraph(wide.index[:, :FIELD_NEIGHBOURS], wide.distance[:, :FIELD_NEIGHBOURS])
    return Graphs(wide, symmetrised(near, cells.coordinates))


def along_curve(coordinates: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Order of cells along a Z-order curve through each sample: neighbours in it are neighbours in space."""
    low = coordinates.min(0)
    span = max(float((coordinates.max(0) - low).max()), 1e-12)
    cell = ((coordinates - low) / span * 65535).astype(np.uint64)
    code = np.zeros(len(cell), np.uint64)
    axes = cell.shape[1]
    for bit in range(16):
        for axis in range(axes):
            code |= ((cell[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(bit * axes + axis)
    return np.lexsort((code, samples))


def minibatches(rows: np.ndarray, size: int, patch: int, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Cut ``rows`` (in the order of a space-filling curve) into minibatches of ``size`` cells.

    Each is made of patches of ``patch`` consecutive cells, drawn in random order, so that neighbourhoods overlap
    inside a patch while a minibatch still sees the whole section. Every row comes exactly once. Without ``rng`` the
    order is that of ``rows``.
    """
    if rng is not None and patch == 1:
        rows = rng.permutation(rows)
    elif rng is not None:
        start = int(rng.integers(patch))
        patches = [piece for piece in np.split(rows, range(start, len(rows), patch)) if len(piece)]
        rng.shuffle(patches)
        rows = np.concatenate(patches)
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def with_neighbours(rows: np.ndarray, neighbours: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``rows`` followed by those of their ``neighbours`` (cell, slot) that are not among them, each once; and where in
    this list each row's neighbours stand, int32 (row, slot), -1 where there is none.

    ``scratch`` int32 (cell,) must hold -1, and does again afterwards.
    """
    from spatialvae import _kernels

    nodes = np.empty(len(rows) * (1 + neighbours.shape[1]), np.int64)
    slots = np.empty((len(rows), neighbours.shape[1]), np.int32)
    return nodes[: _kernels.with_neighbours(rows, neighbours, scratch, nodes, slots)], slots


def _check_names(adata: AnnData) -> None:
    for what, names in (("cell", adata.obs_names), ("gene", adata.var_names)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise InputError(f"{what} names are not unique: {twice!r} occurs more than once")
    if adata.n_obs < 2 or adata.n_vars < 2:
        raise InputError(f"the table has {adata.n_obs} cells and {adata.n_vars} genes; expected 2 of each at least")


def _counts(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    if layer is None:
        if adata.X is None:
            raise InputError("the table has no X; name a layer with counts")
        return adata.X, "X"
    if layer not in adata.layers:
        raise InputError(f"the table has no layer {layer!r}; it has {sorted(adata.layers)}")
    return adata.layers[layer], f"layer {layer!r}"


def _columns(adata: AnnData, genes: tuple[str, ...] | None) -> np.ndarray:
    if genes is None:
        if _keys.IS_BLANK in adata.var:
            return np.flatnonzero(~adata.var[_keys.IS_BLANK].to_numpy(bool))
        return np.arange(adata.n_vars)
    columns = adata.var_names.get_indexer(list(genes))
    missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
    if missing:
        raise InputError(
            f"the table lacks {len(missing)} of the {len(genes)} genes that the model was trained on, "
            f"first {missing[:3]}"
        )
    return columns


def _coordinates(adata: AnnData, key: str | None) -> np.ndarray | None:
    if key is None:
        return None
    if key not in adata.obsm:
        raise InputError(f"obsm has no {key!r}; it has {sorted(adata.obsm)}")
    return checked_coordinates(adata.obsm[key], f"obsm[{key!r}]", adata.obs_names)


def _check_key(adata: AnnData, key: str | None) -> None:
    if key is None:
        return
    if key not in adata.obs:
        raise InputError(f"obs has no {key!r}; it has {sorted(adata.obs)}")
    if adata.obs[key].isna().any():
        raise InputError(f"obs[{key!r}] is missing for {int(adata.obs[key].isna().sum())} cells")


def _codes(adata: AnnData, key: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if key is None:
        return np.zeros(adata.n_obs, np.int64), ("",)
    _check_key(adata, key)
    names, codes = np.unique(adata.obs[key].astype(str).to_numpy().astype(str), return_inverse=True)
    return codes.astype(np.int64), tuple(str(name) for name in names)
