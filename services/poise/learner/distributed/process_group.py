"""The process group of a learner: one process, or as many as torchrun started.

With several, each holds a part of every parameter (FSDP2) and computes its share of a batch; what is summed here is
summed over all. Every collective has a time limit, `rank_timeout_s`, and `rank_health` watches the processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from poise.learner.distributed.rank_health import RankHealth

_JOIN_TIMEOUT = timedelta(minutes=1)
"""How long the processes wait for each other. torchrun starts them once all hosts are there."""
_COMMAND_TIMEOUT = timedelta(hours=1)
"""How long the others wait for a command. The first process sends one every few seconds unless it writes to disk."""


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """The gloo group for small exchanges on the host; None without torchrun."""
    commands: Any = None
    """The gloo group in which the first process sends commands, and the others wait for them; None without torchrun."""
    health: RankHealth | None = None
    """Watches the other processes; None where there are none."""

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


def join(device: str, timeout_s: float) -> World:
    """Join the other processes that torchrun's environment names, if any; return once all are there.

    Args:
        device: a torch device.
        timeout_s: limit of every collective, and of the silence of a process.

    Raises:
        RankLost: not all came within a minute, or the others already run without this process.
    """
    if world_size() == 1 and not dist.is_torchelastic_launched():
        return World(torch.device(device))
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", local_rank())
        torch.cuda.set_device(own)
    health, timeout = None, timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        if size > 1:
            health = RankHealth(store.clone(), rank, size, timeout_s)
            health.join(_JOIN_TIMEOUT.total_seconds())
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    own_rank = dist.get_rank()
    return World(
        own,
        own_rank,
        dist.get_world_size(),
        control=dist.new_group(backend="gloo", timeout=timeout),
        commands=dist.new_group(backend="gloo", timeout=timeout if own_rank == 0 else _COMMAND_TIMEOUT),
        health=health,
    )


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
