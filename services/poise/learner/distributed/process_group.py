"""The process group of a learner: one process, or the ranks that torchrun started.

Each rank has a shard of every parameter (FSDP2) and computes its share of a batch. Every collective has a timeout,
`rank_timeout_s`, and `rank_health` watches the ranks.
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
"""Maximum wait for the other ranks at the start. torchrun starts ranks once all hosts have joined."""
_COMMAND_TIMEOUT = timedelta(hours=1)
"""Maximum wait of followers for a command. Rank 0 sends one every few seconds unless it is writing to disk."""


@dataclass(frozen=True)
class World:
    """This process's rank, and the groups it belongs to."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """The gloo group for small exchanges in host memory; None without torchrun."""
    commands: Any = None
    """The gloo group in which rank 0 sends commands to the followers; None without torchrun."""
    health: RankHealth | None = None
    """Watches the other ranks; None without any."""

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded: always under torchrun, even with one rank, whose shard is then everything."""
        return self.control is not None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks; with one rank, the tensor itself."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's small tensor, in host memory, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(values, gathered, group=self.control)
        return gathered or []

    def scatter(self, values: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Return this rank's item of rank 0's small tensors, all shaped like `like`."""
        if self.size == 1:
            return values[0]
        own = torch.empty_like(like)
        dist.scatter(own, [value.contiguous() for value in values] if self.rank == 0 else None, group=self.control)
        return own


def world_size() -> int:
    """Return the number of ranks; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank. Rank 0 serves gRPC."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: str, timeout_s: float) -> World:
    """Join the other ranks in torchrun's environment, if any; return once all have joined.

    Args:
        device: a torch device.
        timeout_s: timeout of every collective, and of a rank's heartbeat.

    Raises:
        RankLost: not all ranks joined within a minute, or the others already run without this one.
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
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
