r"""The prior of z_niche, fitted again after training.

While encoder and decoder are trained, the field keeps the variances and the range of the linear scores, but the latents
change. The mean of z_niche over a section drifts, since the field hardly penalises a constant, and its variance becomes
several times that of the prior; new tissue, and single cells without neighbours, are then far from those of the table.
Here the mean, which is moved into encoder and decoder, v, r and S maximise the likelihood of the encoder's targets t by
EM. With posterior means m_d of z_niche and covariances P_d^-1,

    mean_d = mean of m_d,    v_d = (E z'z + r_d E z'L z) / n,    r_d = argmax [ -n log v_d + log det(1 + r L) ],
    S_d = mean E (z_cell - z_niche)^2

for n cells, with traces as in ``SpatialModule.solve``. For d > D only S_d is fitted.
"""

from __future__ import annotations

import numpy as np
import torch

from spatialvae.field import RANGES, solve
from spatialvae.module import Section, SpatialModule

STEPS = 30  # of EM
FINE_RANGES = np.geomspace(RANGES[0], RANGES[-1], 8 * len(RANGES))  # steps of EM are smaller than those of RANGES


@torch.no_grad()
def fit(module: SpatialModule, section: Section) -> Section:
    """Fit the prior in place, and return the section for the module as it then is."""
    space, d = section.space, module.shape.n_niche
    if space is None:
        return section
    sites = module.sites(section)
    target, precision = sites.target.double().numpy(), sites.log_precision.double().exp().numpy()
    own = module.log_residual.double().exp().cpu().numpy()
    v, r = (value.double().cpu().numpy() for value in (module.smooth_variance, module.range))
    nodes, shares = space.measure
    log_det = np.log1p(np.outer(FINE_RANGES, nodes)) @ shares
    mean, moved = np.zeros((len(target), d)), np.zeros(target.shape[1])
    for _ in range(STEPS):
        weight = 1 / (own[:d] + 1 / precision[:, :d])
        mean = solve(space.laplacian, r, v * weight, v * weight * target[:, :d], mean)
        variances = 1 / ((1 + np.outer(nodes, r)) / v + weight.mean(0))  # (node, D)
        own = _residual(target, precision, own, mean, shares @ variances)
        centre = mean.mean(0)
        mean, target[:, :d], moved[:d] = mean - centre, target[:, :d] - centre, moved[:d] + centre
        square = (mean**2).mean(0) + shares @ variances
        rough = (mean * (space.laplacian @ mean)).mean(0) + (shares * nodes) @ variances
        each = square + FINE_RANGES[:, None] * rough  # v for each range
        best = (log_det[:, None] - np.log(each)).argmax(0)
        r, v = FINE_RANGES[best], each[best, np.arange(d)]
    module.recentre(torch.tensor(moved, dtype=torch.float32, device=module.mean.device))
    module.log_residual.copy_(torch.tensor(np.log(own)))
    spread = shares @ (1 / (1 + np.outer(nodes, r)))
    for buffer, value in ((module.range, r), (module.smooth_variance, v), (module.spread, spread)):
        buffer.copy_(torch.tensor(value))
    return module.section(section.cells, section.graphs)


def _residual(
    target: np.ndarray, precision: np.ndarray, own: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """Mean of E (z_cell - z_niche)^2 over cells, (dim,), given ``mean`` (cell, D) and ``variance`` (D,) of z_niche."""
    d = mean.shape[1]
    gain = precision / (precision + 1 / own)
    off = target.copy()
    off[:, :d] -= mean
    square = off**2
    square[:, :d] += variance
    return (gain**2 * square + gain * (1 / precision)).mean(0)
