"""Hamiltonian Monte Carlo for the posterior of the latents, started from draws of a Gaussian approximation.

With small counts the posterior is skewed: a count of zero bounds the rate of a gene only from above. Laplace's
approximation is symmetric, so that low expression drawn from it is too high. Hamiltonian Monte Carlo (Duane et al.
1987; Neal 2011) has the posterior as its stationary distribution and moves the draws of the approximation towards it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAPS, STEP = 4, 0.4  # their product is about pi / 2: for a unit Gaussian, end points are independent of the start
TRAJECTORIES = 5


def moved(
    log_density: Callable[[Tensor], Tensor],
    z: Tensor,
    root: Tensor,
    generator: torch.Generator,
    trajectories: int = TRAJECTORIES,
) -> Tensor:
    """``z`` (B, dim) after ``trajectories`` steps of a Markov chain for each row, with the stationary density
    ``log_density``, (B, dim) -> (B,).

    ``root`` (B, dim, dim) is the Cholesky factor of the precision of a Gaussian approximation, which defines the
    coordinates of the chain. Proposals at which the density is not finite are rejected.
    """
    unscaled = torch.linalg.inv(root)
    value, slope = _with_slope(log_density, z)
    for _ in range(trajectories):
        momentum = torch.randn(z.shape, generator=generator).to(z)
        energy = 0.5 * (momentum**2).sum(-1)
        place, height, force = z, value, slope
        for _ in range(LEAPS):
            momentum = momentum + 0.5 * STEP * (unscaled @ force[..., None])[..., 0]
            place = place + STEP * (unscaled.mT @ momentum[..., None])[..., 0]
            height, force = _with_slope(log_density, place)
            momentum = momentum + 0.5 * STEP * (unscaled @ force[..., None])[..., 0]
        gain = height - value + energy - 0.5 * (momentum**2).sum(-1)
        taken = torch.rand(len(z), generator=generator).log().to(z) < gain
        z, slope = (torch.where(taken[:, None], new, old) for new, old in ((place, z), (force, slope)))
        value = torch.where(taken, height, value)
    return z


def _with_slope(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Value (B,) and gradient (B, dim) of ``log_density`` at ``z``."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        value = log_density(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope
