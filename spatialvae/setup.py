"""The keys of the data in an AnnData, and functions that read and check coordinates, samples and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvae import _keys
from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Setup:
    """The keys of the data in an AnnData, and whether detection is modelled (``measurement``)."""

    layer: str | None = None
    spatial_key: str | None = "spatial"
    sample_key: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    measurement: bool = False

    @property
    def keys(self) -> dict[str, str | None]:
        """All fields except ``measurement``."""
        return {name: value for name, value in asdict(self).items() if name != "measurement"}

    def write(self, adata: AnnData) -> None:
        adata.uns[_keys.SETUP] = {name: value or "" for name, value in self.keys.items()}

    @classmethod
    def read(cls, adata: AnnData) -> Setup:
        if _keys.SETUP not in adata.uns:
            raise InputError("this AnnData was not set up: call SpatialVAE.setup_anndata(adata, ...) first")
        found: dict[str, Any] = {name: str(value) or None for name, value in adata.uns[_keys.SETUP].items()}
        return cls(**found)


def read_places(adata: AnnData, setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float64 (cell, axis) and sample names str (cell,) of a table with coordinates."""
    coordinates = read_coordinates(adata, setup.spatial_key)
    assert coordinates is not None
    codes, names = read_codes(adata, setup.sample_key)
    return coordinates, np.array(names)[codes]


def read_coordinates(adata: AnnData, key: str | None) -> np.ndarray | None:
    if key is None:
        return None
    if key not in adata.obsm:
        raise InputError(f"no {key!r} in obsm; it has {', '.join(sorted(adata.obsm)) or 'no arrays'}")
    return checked_coordinates(adata.obsm[key], f"obsm[{key!r}]", adata.obs_names)


def check_key(adata: AnnData, key: str | None) -> None:
    if key is None:
        return
    if not isinstance(key, str) or key not in adata.obs:
        raise InputError(f"no column {key!r} in obs; it has {', '.join(sorted(adata.obs)) or 'no columns'}")
    if adata.obs[key].isna().any():
        raise InputError(f"obs[{key!r}] is missing for {int(adata.obs[key].isna().sum())} cells")


def read_codes(adata: AnnData, key: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if key is None:
        return np.zeros(adata.n_obs, np.int64), ("",)
    check_key(adata, key)
    names, codes = np.unique(adata.obs[key].astype(str).to_numpy().astype(str), return_inverse=True)
    return codes.astype(np.int64), tuple(str(name) for name in names)


def checked_coordinates(
    coordinates: np.ndarray, where: str = "the array of coordinates", names: Sequence[str] | None = None
) -> np.ndarray:
    """``coordinates`` as float64 (cell, 2 or 3), checked to be finite.

    Raises InputError, naming ``where`` and the first invalid cell, by its name in ``names`` or by its row.
    """
    try:
        coordinates = np.asarray(coordinates, float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is not an array of numbers: {error}") from error
    if coordinates.ndim != 2 or coordinates.shape[1] not in (2, 3):
        raise InputError(f"{where} has shape {coordinates.shape}; expected (cell, 2) or (cell, 3)")
    bad = np.flatnonzero(~np.isfinite(coordinates).all(1))
    if len(bad):
        first = f"in row {bad[0]}" if names is None else repr(names[bad[0]])
        raise InputError(f"{where} is not finite for {len(bad)} cells, the first is {first}")
    return coordinates
