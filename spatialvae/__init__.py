"""SpatialVAE: embeddings of cells and of the neighbourhoods they sit in.

``SpatialVAE`` is imported when it is first asked for, so that ``import spatialvae`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from spatialvae.model import SpatialVAE

__all__ = ["InputError", "SpatialVAE"]


def __getattr__(name: str) -> Any:
    if name == "SpatialVAE":
        from spatialvae.model import SpatialVAE

        return SpatialVAE
    raise AttributeError(f"module 'spatialvae' has no attribute {name!r}")
