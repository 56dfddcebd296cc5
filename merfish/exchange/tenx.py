"""10x Genomics' feature-barcode matrices in HDF5, as written for Xenium and Visium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from merfish.errors import InputError
from merfish.exchange._reading import names_of

_CONTROLS = "control|blank|unassigned|deprecated"  # parts of the feature types that are not genes


def read_10x_h5(path: Path) -> tuple[pd.Index, pd.DataFrame, csr_matrix]:
    """Read barcodes, features and counts as CSR (barcode, feature) int32 from ``*_feature_bc_matrix.h5``.

    Features are indexed by unique names, with gene_id, feature_type and is_blank. Raises InputError for other files,
    and for a matrix with inconsistent parts.
    """
    try:
        with h5py.File(path) as file:
            matrix = file.get("matrix")
            if not isinstance(matrix, h5py.Group):
                raise InputError(f"{path}: no group 'matrix'; expected a feature-barcode matrix of 10x Genomics")
            parts = {name: matrix[name][()] for name in ("data", "indices", "indptr", "shape", "barcodes")}
            features = {name: matrix["features"][name][()] for name in ("id", "name", "feature_type")}
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a feature-barcode matrix of 10x Genomics: {error}") from error
    n_features, n_barcodes = map(int, parts["shape"])
    if {len(values) for values in features.values()} != {n_features} or len(parts["barcodes"]) != n_barcodes:
        raise InputError(
            f"{path}: the matrix is {n_features} features x {n_barcodes} barcodes, but the numbers of its names differ"
        )
    try:
        # columns of a CSC matrix (feature, barcode) are rows of a CSR matrix (barcode, feature)
        counts = csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=(n_barcodes, n_features))
        counts.check_format(full_check=True)
    except ValueError as error:
        raise InputError(f"{path}: matrix: {error}") from error
    kind = pd.Series(_text(features["feature_type"]))
    var = pd.DataFrame({"gene_id": _text(features["id"]), "feature_type": kind})
    var["is_blank"] = kind.str.lower().str.contains(_CONTROLS)
    var.index = unique(pd.Index(_text(features["name"]), name="gene"))
    return names_of(path, parts["barcodes"], "barcode"), var, counts.astype(np.int32)


def _text(values: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def unique(names: pd.Index) -> pd.Index:
    """Make names unique by appending numbers: two genes may share a symbol.

    >>> list(unique(pd.Index(["A", "B", "A"])))
    ['A', 'B', 'A-1']
    """
    again = pd.Series(names).groupby(names.to_numpy()).cumcount().to_numpy()
    made = [f"{name}-{k}" if k else name for name, k in zip(names, again, strict=True)]
    return pd.Index(made, name=names.name)
