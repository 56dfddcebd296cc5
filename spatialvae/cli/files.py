"""Reading and writing of the files of commands."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure


def read_table(path: Path) -> AnnData:
    """Open a table, leaving counts, layers and arrays of obsm in the file.

    Raises InputError if the file does not exist or cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an AnnData table (.h5ad)")
    import anndata
    import h5py
    from anndata.io import read_elem, sparse_dataset

    def lazy(item: Any) -> Any:
        return sparse_dataset(item) if isinstance(item, h5py.Group) else item

    try:
        file = h5py.File(path)
        if "encoding-type" not in file.attrs:  # before AnnData 0.8
            return anndata.read_h5ad(path)
        layers, obsm = (file.get(name, {}) for name in ("layers", "obsm"))
        frames = [name for name, item in obsm.items() if item.attrs.get("encoding-type") == "dataframe"]
        return anndata.AnnData(
            lazy(file["X"]) if "X" in file else None,
            read_elem(file["obs"]),
            read_elem(file["var"]),
            obsm={name: item for name, item in obsm.items() if isinstance(item, h5py.Dataset)}
            | {name: read_elem(obsm[name]) for name in frames},
            layers={name: lazy(item) for name, item in layers.items()},
        )
    except Exception as error:  # h5py and anndata raise many kinds of errors for invalid files
        raise InputError(f"{path}: cannot be read as an AnnData file: {error}") from error


def model_folder(path: Path) -> Path:
    return path / "model" if (path / "model").is_dir() else path


def write_table(adata: AnnData, table: Path, path: Path) -> None:
    """Write a copy of the file ``table`` to ``path``, with the results in ``adata`` added."""
    import h5py
    from anndata.io import write_elem

    from spatialvae import _keys
    from spatialvae._files import whole

    with whole(path) as part:
        shutil.copyfile(table, part)
        with h5py.File(part, "r+") as file:
            for kind, names in _keys.WRITTEN.items():
                group, found = file.require_group(kind), getattr(adata, kind)
                for name in names:
                    if name in found:
                        write_elem(group, name, found[name], dataset_kwargs={"compression": "gzip"})
            if _keys.DOMAIN in adata.obs:
                write_elem(file, "obs", adata.obs)


def latent_names(table: Path, size: int) -> list[str]:
    """Names of the ``size`` columns of the embedding in the file ``table``; all "niche" if they are not stored."""
    import h5py
    from anndata.io import read_elem

    from spatialvae import _keys

    with h5py.File(table) as file:
        uns = file.get("uns", {})
        names = [str(name) for name in read_elem(uns[_keys.LATENT_NAMES])] if _keys.LATENT_NAMES in uns else []
    return names if len(names) == size else ["niche"] * size


def write_csv(frame: Any, path: Path) -> None:
    from spatialvae._files import whole

    with whole(path) as part:
        frame.to_csv(part, index=False)


def write_figure(figure: Figure, path: Path) -> None:
    from spatialvae._files import whole

    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise InputError(f"{path}: unknown figure format; use .png, .pdf or .svg")
    with whole(path) as part:
        figure.savefig(part)


def status(text: str) -> AbstractContextManager[object]:
    """Show ``text`` with a spinner on a terminal while the block runs."""
    from rich.console import Console

    return Console(stderr=True).status(text)
