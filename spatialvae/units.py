r"""Units of the latents, chosen after training.

The model stays the same if a dimension of z_niche and z_cell is multiplied by a constant and encoder, decoder and
priors are changed accordingly. As trained, all dimensions vary by about 1: those that distinguish cell types and those
that hardly change expression. Distances between cells then are mostly noise. Here dimension d is multiplied by s_d,

    s_d^2 = c mean over cells of sum_g p_g (d log p_g / d z_d)^2

with p_g the share of gene g, and c such that the mean of s_d^2 is 1: the Fisher information of one molecule about each
dimension then is the same, on average over cells. Squared distances between similar cells are proportional to squared
Hellinger distances of their expected expression, except for products of different dimensions.
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
def information(module: SpatialModule, section: Section, rows: np.ndarray) -> Tensor:
    """Fisher information of one molecule about each dimension of z_cell, (dim,), on average over ``rows``."""
    sites = module.sites(section)
    z = module.cells_given(sites, module.solve(section.space, sites))[0]
    total = torch.zeros(module.shape.n_cell, dtype=torch.float64)
    for part in blocks(module, rows):
        index = torch.from_numpy(part)
        here, batch = z[index].to(module.mean.device), section.batch[index].to(module.mean.device)
        share = torch.softmax(module.decoder(here, batch)[0], -1)[..., None]
        slope = module.decoder.slopes(here, batch)[0]
        slope = slope - (share * slope).sum(1, keepdim=True)
        total += (share * slope**2).sum((0, 1)).double().cpu()
    return total / len(rows)


def fit(module: SpatialModule, section: Section, seed: int = 0) -> None:
    """Choose the units of the latents of ``module``, in place."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(section.cells.depth > 0))[:MOST_CELLS]
    scale = information(module, section, np.sort(rows)).sqrt()
    scale = scale.clamp(min=LEAST * float(scale.max()))
    module.rescale((scale / (scale**2).mean().sqrt()).float().to(module.mean.device))
