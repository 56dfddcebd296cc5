"""Mixtures of Gaussians with diagonal covariances, one for each cell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """``log_weight`` (B, component), normalised; ``mean`` and ``variance`` (B, component, dim)."""

    log_weight: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def gaussian(cls, mean: Tensor, variance: Tensor) -> Self:
        """A single component with ``mean`` and ``variance`` (B, dim)."""
        return cls(mean.new_zeros(len(mean), 1), mean[:, None], variance.expand_as(mean)[:, None])

    def log_density(self, z: Tensor) -> Tensor:
        """Log density at points ``z`` (B, point, dim): (B, point), in nats."""
        return torch.logsumexp(self.log_parts(z), -1)

    def log_parts(self, z: Tensor) -> Tensor:
        """Log of weight times density of each component at points ``z`` (B, point, dim): (B, point, component)."""
        precision = self.variance.reciprocal()
        energy = z**2 @ precision.mT - 2 * z @ (self.mean * precision).mT
        constant = (self.mean**2 * precision + self.variance.log() + math.log(2 * math.pi)).sum(-1)
        return self.log_weight[:, None] - 0.5 * (energy + constant[:, None])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (B, dim) each."""
        weight = self.log_weight.exp()[..., None]
        mean = (weight * self.mean).sum(1)
        return mean, (weight * (self.variance + (self.mean - mean[:, None]) ** 2)).sum(1)

    def draw(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draws (sample, B, dim), on the CPU."""
        weight, mean, variance = (value.cpu() for value in (self.log_weight.exp(), self.mean, self.variance))
        part = torch.multinomial(weight, n_samples, replacement=True, generator=generator).T
        rows = torch.arange(len(mean))
        noise = torch.randn(*part.shape, mean.shape[-1], generator=generator)
        return mean[rows, part] + variance[rows, part].sqrt() * noise
