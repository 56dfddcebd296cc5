"""The files of a model: ``model.safetensors`` with its tensors, ``model.json`` with everything else, and optionally its
table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spatialvae._files import whole
from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 12
FILES = ("model.json", "model.safetensors")
TABLE = "adata.h5ad"

About = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def write(folder: Path, about: About, tensors: Tensors, table: AnnData | None, overwrite: bool) -> None:
    """Write the files of a model; see ``SpatialVAE.save``.

    Raises InputError if ``folder`` is not a folder, or if a file exists, unless ``overwrite``.
    """
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one for the files of the model")
    there = [name for name in (*FILES, *([] if table is None else [TABLE])) if (folder / name).exists()]
    if there and not overwrite:
        raise InputError(f"{folder} already contains {there[0]}; pass overwrite=True to replace it")
    contiguous = torch.contiguous_format
    # save_file refuses tensors that share memory, as parameters of a user's module may
    tensors = {name: value.detach().cpu().clone(memory_format=contiguous) for name, value in tensors.items()}
    with whole(folder / "model.safetensors") as part:
        save_file(tensors, part)
        digest = _digest(part)
    with whole(folder / "model.json") as part:
        part.write_text(json.dumps({"format": FORMAT} | about | {"sha256": digest}, indent=1))
    if table is not None:
        with whole(folder / TABLE) as part:
            table.to_memory().write_h5ad(part)


def read(folder: Path) -> tuple[About, Tensors]:
    """Read the files of a model. Raises InputError if ``folder`` is not a complete model of this version."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a saved model: it has no {name}")
    try:
        about = json.loads((folder / "model.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(
            f"{folder}/model.json is not of format {FORMAT}, the one that this version reads; train the model again"
        )
    if about.get("sha256") != _digest(folder / "model.safetensors"):
        raise InputError(f"{folder}: model.safetensors does not match its checksum in model.json; save the model again")
    return about, tensors


def read_table(folder: Path) -> AnnData:
    """Read the table saved with a model. Raises InputError if there is none, or if it cannot be read."""
    import anndata

    paths = [folder / TABLE, folder.parent / "table.h5ad"]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise InputError(f"{folder} has no {TABLE}: pass the table as adata, or save with save_anndata=True")
    try:
        return anndata.read_h5ad(there[0])
    except Exception as error:  # h5py and anndata raise many kinds of errors for invalid files
        raise InputError(f"{there[0]} cannot be read as an AnnData file: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
