r"""Units of the latents, chosen after training.

The model stays the same if a dimension of z_niche and z_cell is multiplied by a constant and encoder, decoder and
priors are changed accordingly. After training, dimensions that hardly change expression vary about as much as those
that distinguish cell types, and distances between cells are mostly noise. Here dimension d is multiplied by s_d,

    s_d^2 = c mean over cells of sum_g p_g (d log p_g / d z_d)^2

with p_g the share of gene g, and c such that the variance of z_cell over cells is 1 on average over dimensions. One
molecule then has the same Fisher information about each dimension, on average over cells. Squared distances between
similar cells are proportional to squared Hellinger distances of their expected expression, except for products of
different dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spatialvae.module import Section, SpatialModule
from spatialvae.posterior import blocks

MOST_CELLS = 1000  # over which information is averaged
LEAST = 0.01  # smallest s_d relative to the largest: the decoder may ignore a dimension


@torch.no_grad()
def information(module: SpatialModule, section: Section, rows: np.ndarray, z: Tensor) -> Tensor:
    """Fisher information of one molecule about each dimension of z_cell, (dim,), on average over ``rows``, whose z_cell
    is ``z`` (row, dim)."""
    total, device = torch.zeros(module.shape.n_cell, dtype=torch.float64), module.mean.device
    for part in blocks(module, np.arange(len(rows))):
        here, batch = z[torch.from_numpy(part)].to(device), section.batch[torch.from_numpy(rows[part])].to(device)
        share = torch.softmax(module.decoder(here, batch)[0], -1)[..., None]
        slope = module.decoder.slopes(here, batch)[0]
        slope = slope - (share * slope).sum(1, keepdim=True)
        total += (share * slope**2).sum((0, 1)).double().cpu()
    return total / len(rows)


@torch.no_grad()
def fit(module: SpatialModule, section: Section, seed: int = 0) -> None:
    """Choose the units of the latents of ``module``, in place."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(section.cells.depth > 0))[:MOST_CELLS]
    z = module.means(section)[1][torch.from_numpy(rows)]
    scale = information(module, section, rows, z).sqrt()
    scale = scale.clamp(min=LEAST * float(scale.max()))
    variance = (scale**2 * z.double().var(0, correction=0)).mean()
    module.rescale((scale / variance.sqrt()).float().to(module.mean.device))
