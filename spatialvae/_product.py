"""Large matrix products by oneDNN.

On the CPU, PyTorch uses MKL, which takes twice as long as oneDNN on processors not made by Intel (AMD EPYC with
AVX-512: 85 against 190 GFLOP/s per core).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """``nn.Linear`` computed by ``product``."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, with its three products, one forward and two backward, computed by oneDNN if it is available."""
    if x.numel() and x.device.type == "cpu" and x.dtype == torch.float32 and _has_onednn():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        by_x = _times_transposed(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        if x.shape[1] < gradient.shape[1]:  # the product transposes its first factor, which should be the narrow one
            return by_x, _times_transposed(x.t(), gradient.t(), None).t(), gradient.sum(0)
        return by_x, _times_transposed(gradient.t(), x.t(), None), gradient.sum(0)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _times_transposed(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b' + bias, with a (m, k) and b (n, k)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
