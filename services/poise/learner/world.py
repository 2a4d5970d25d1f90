"""The processes that hold the policy together: one, or as many as torchrun started.

Owns the process group. With several, each holds a part of every parameter (FSDP2), computes its share of a batch, and
what is summed here is summed over all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=30)
"""How long the others wait for the first to tell them something: as long as it has nothing to train on."""


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """The group in which the first tells the others what to do; None without torchrun."""

    @property
    def is_sharded(self) -> bool:
        """Whether parameters lie in parts: under torchrun, even with one process, whose part is then all."""
        return self.control is not None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes; alone, the tensor itself."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return every process's small tensor, in the host's memory, on the first; nothing on the others."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(values, gathered, group=self.control)
        return gathered or []

    def scatter(self, values: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Return this process's of the small tensors that the first has, all of the shape of `like`."""
        if self.size == 1:
            return values[0]
        own = torch.empty_like(like)
        dist.scatter(own, [value.contiguous() for value in values] if self.rank == 0 else None, group=self.control)
        return own


def world_size() -> int:
    """Return how many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this one is: the first, 0, speaks gRPC."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return which of its host's processes this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: str) -> World:
    """Meet the other processes, if there are any, as torchrun's environment tells. Blocks until all are there."""
    if world_size() == 1 and not dist.is_torchelastic_launched():
        return World(torch.device(device))
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", local_rank())
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    return World(own, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
