"""Data-parallel training by several processes: ``torchrun --nproc-per-node 2 -m spatialvae.cli train ...``.

Each process holds the whole section and computes a part of every minibatch; gradients are summed. This is equivalent to
DistributedDataParallel, and simpler because the gradient is one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Team:
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agree(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor.detach(), 0)


@contextmanager
def team_of_processes() -> Iterator[Team]:
    """The processes started by ``torchrun``, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that reports progress and writes files."""
    return int(os.environ.get("RANK", "0")) == 0
