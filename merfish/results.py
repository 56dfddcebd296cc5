"""Results of a run: names of its files, and its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merfish._files import Packed, read_json_packed
from merfish.errors import InputError

TRANSCRIPTS = "transcripts.parquet"
ALL_TRANSCRIPTS = "transcripts_all.parquet"
SEQUENTIAL = "sequential.parquet"  # molecules of genes imaged one by one, if there are any
CELLS = "cells.parquet"
CELL_BY_GENE = "cell_by_gene.h5ad"
RUN = "run.json"
REPORT = "report.html"
LOG = "merfish.log"
FIELDS = "fovs"
IMAGES = "images"
DOMAIN, LATENT, LATENT_NAMES = "spatial_domain", "X_spatialvae", "X_spatialvae_names"  # of the table: obs, obsm, uns


def field_folder(out: Path, fov: int) -> Path:
    """Folder of the intermediate results of a field, complete or absent."""
    return out / FIELDS / f"fov_{fov:04d}"


def read_run(out: Path) -> dict[str, Any]:
    """Read the record of a finished run; its values of fields are `Packed`. Raises InputError if there is none."""
    path = out / RUN
    if not path.is_file():
        raise InputError(f"{out}: no {RUN} in it; expected the folder of a finished run")
    record = read_json_packed(path, "fields")
    whole = isinstance(record, dict) and {"figures", "fields", "failed", "bits"} <= record.keys()
    if not whole or not isinstance(record["fields"], Packed):
        raise InputError(f"{path}: not the record of a whole run")
    return record


def mosaic_origin(record: Mapping[str, Any]) -> np.ndarray:
    """Centre (x, y) of the first pixel of mosaics of a run's fields (of all fields if none was decoded), micrometre."""
    positions = np.array(record["stage"]["positions"], float)
    return np.asarray(positions[sorted(map(int, record["fields"])) or slice(None)].min(axis=0))
