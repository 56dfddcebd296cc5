r"""The measurement model: from molecules to the counts called by a decoder, with missed molecules and wrong calls.

A share e_g of the molecules of gene g is detected, and the wrong calls of gene g are a share beta_g of all calls of a
cell. If the molecules of a cell have shares rho_g, its calls have shares

    pi_g = (1 - sum_h beta_h) e_g rho_g / sum_h e_h rho_h + beta_g

A negative binomial thinned with probability e_g is a negative binomial with the same dispersion. This is assumed to
hold also with the background beta, which adds little to the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spatialvae import _keys
from spatialvae.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

LEAST_EFFICIENCY = 0.01  # lower bound, for genes whose calls are all assumed to be wrong
MOST_WRONG = 0.99  # largest share of wrong calls of a gene, so that its expression is not zero


@dataclass(frozen=True, eq=False)
class Measurement:
    """``efficiency`` e and ``background`` beta, float32 (gene,) each."""

    efficiency: np.ndarray
    background: np.ndarray

    def _signal(self, logits: Tensor) -> Tensor:
        """Log of the share (..., gene) of all calls that are correct calls of each gene."""
        efficiency = torch.from_numpy(self.efficiency).to(logits.device)
        return torch.log_softmax(logits + efficiency.log(), -1) + np.log1p(-float(self.background.sum()))

    def seen(self, logits: Tensor) -> Tensor:
        """log pi (..., gene) from the ``logits`` of rho."""
        return torch.logaddexp(self._signal(logits), torch.from_numpy(self.background).to(logits.device).log())

    def slopes(self, logits: Tensor, slopes: Tensor) -> Tensor:
        """Derivatives of ``seen(logits)``, (cell, gene, dim), from the derivatives ``slopes`` of ``logits``."""
        signal = self._signal(logits)
        right = (signal - self.seen(logits)).exp()
        return right[..., None] * (slopes - torch.softmax(signal, -1)[:, None] @ slopes)

    def there(self, share: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Expected number of molecules (cell,) in cells with ``depth`` (cell,) calls and ``share`` rho (cell, gene)."""
        return depth * (1 - self.background.sum()) / (share @ self.efficiency)

    def share_there(self, share: np.ndarray) -> np.ndarray:
        """rho (gene,) from the ``share`` pi (gene,) of all calls."""
        there = np.maximum(share - self.background, (1 - MOST_WRONG) * share) / self.efficiency
        return there / there.sum()


def read_measurement(adata: AnnData, columns: np.ndarray, share: np.ndarray) -> Measurement:
    """Read the measurement model of the genes in ``columns`` of a table (-1: missing), with ``share`` (gene,) of calls.

    It is read from ``var["detection_efficiency"]`` and ``var["misidentification_rate"]`` (expected share of wrong calls
    among the calls of a gene), as written by ``merfish run``. Genes that were never called have no values and get the
    median efficiency and no background.

    Raises InputError if a column is missing, contains a value outside 0 to 1, or has no efficiency for any gene.
    """
    there, found = columns >= 0, {}
    for key in (_keys.EFFICIENCY, _keys.WRONG):
        if key not in adata.var:
            raise InputError(f"no column {key!r} in var, which measurement=True needs; it has {', '.join(adata.var)}")
        values = np.full(len(columns), np.nan)
        values[there] = adata.var[key].to_numpy(float)[columns[there]]
        wrong = np.flatnonzero((values < 0) | (values > 1))
        if len(wrong):
            name = adata.var_names[columns[wrong[0]]]
            raise InputError(f"var[{key!r}] of {name!r} is {values[wrong[0]]:g}; expected a share from 0 to 1")
        found[key] = values
    efficiency = found[_keys.EFFICIENCY]
    if np.isnan(efficiency).all():
        raise InputError(f"var[{_keys.EFFICIENCY!r}] is NaN for all genes; train without measurement=True")
    efficiency = np.where(np.isnan(efficiency), np.nanmedian(efficiency), efficiency).clip(LEAST_EFFICIENCY)
    background = share * np.nan_to_num(found[_keys.WRONG]).clip(max=MOST_WRONG)
    return Measurement(efficiency.astype(np.float32), background.astype(np.float32))
