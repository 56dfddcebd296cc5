"""SpatialVAE: a variational autoencoder that embeds cells and their spatial neighbourhoods.

``SpatialVAE`` is imported on first use, so that ``import spatialvae`` is fast.
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
