"""Small real data sets included in the package; source and licence are in the folder of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

_DATA = Path(__file__).parent / "data"


def merfish_raw() -> Path:
    """A raw MERFISH experiment: 2 fields of 128 x 128 px, 8 rounds, 16 bits, 140 words, beads, stains."""
    return _DATA / "merfish_raw"


def osmfish() -> AnnData:
    """osmFISH of mouse somatosensory cortex: 4,839 cells x 33 genes, ``obs["Region"]`` holds 11 annotated regions."""
    import anndata

    return anndata.read_h5ad(_DATA / "osmfish" / "osmfish_cortex.h5ad")


def codebooks() -> dict[str, Path]:
    """Published codebooks, name -> file, in their original formats."""
    return {path.stem: path for path in sorted((_DATA / "codebooks").iterdir()) if path.suffix in (".csv", ".txt")}
