"""Transcript table: its columns, reading and writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish._files import whole_file
from merfish.codebook import Codebook
from merfish.errors import InputError

# Units: x, y pixel in the field, centre of the first pixel = 0; z plane index; global_* micrometre in the stage
# frame; intensity relative to the spot of a typical molecule; area pixels; distance between unit vectors; shown: the
# bits that were detected as on, the first least significant.
COLUMNS: dict[str, str] = {
    "transcript_id": "int64",
    "barcode_id": "int32",
    "gene": "string",
    "is_blank": "bool",
    "fov": "int32",
    "x": "float32",
    "y": "float32",
    "z": "float32",
    "global_x": "float64",
    "global_y": "float64",
    "global_z": "float64",
    "hamming_distance": "int8",
    "probability": "float32",
    "intensity": "float32",
    "area": "int16",
    "cell_id": "int64",
    "distance": "float32",
    "shown": "uint64",
}


def transcript_table(codebook: Codebook, word: np.ndarray, **columns: Any) -> pd.DataFrame:
    """Build a transcript table: one row per molecule, with the columns and dtypes of `COLUMNS`.

    word: (molecule,) row of the codebook. columns: arrays (molecule,) or scalars for any other column; x, y,
    hamming_distance and intensity are required. Defaults: fov, z and area 0, cell_id -1, NaN for global coordinates,
    probability and distance, transcript_id by row, and shown equal to the word.
    """
    word = np.asarray(word, dtype=np.int32)
    n = len(word)
    given: dict[str, Any] = {
        "transcript_id": np.arange(n),
        "barcode_id": word,
        "gene": np.array(codebook.names, dtype=object)[word],
        "is_blank": codebook.is_blank[word],
        "fov": 0,
        "z": 0,
        "global_x": np.nan,
        "global_y": np.nan,
        "global_z": np.nan,
        "probability": np.nan,
        "area": 0,
        "cell_id": -1,
        "distance": np.nan,
        "shown": codebook.codes[word],
        **columns,
    }
    given["area"] = np.minimum(given["area"], np.iinfo(np.int16).max)
    gene = pd.array(given.pop("gene"), dtype="string")
    columns = {name: np.broadcast_to(given[name], n).astype(COLUMNS[name]) for name in COLUMNS if name != "gene"}
    return pd.DataFrame({name: gene if name == "gene" else columns[name] for name in COLUMNS})


def write_transcripts(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a transcript table as Parquet, atomically."""
    with whole_file(path) as part:
        table.to_parquet(part, index=False)


def read_transcripts(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a transcript table and check its columns. Raises InputError if it is missing, damaged or another table."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a transcript table (Parquet)")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet table: {error}") from error
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise InputError(f"{path}: columns {', '.join(missing)} are missing from the transcript table")
    return table.astype(COLUMNS)
