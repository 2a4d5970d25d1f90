"""The state of every process's random numbers: after a restart dropout draws what it would have drawn without one.

Rank r's is `rng.cpu.r` and, where it computes on a GPU, `rng.cuda.r`, uint8. With several processes all of them must
make the same calls.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from poise.learner.distributed.process_group import World

logger = logging.getLogger(__name__)

PREFIX = "rng."


def random_state(world: World) -> dict[str, torch.Tensor]:
    """Return the states of all processes on the first; nothing on the others."""
    return {
        f"{PREFIX}{kind}.{rank}": state
        for kind, own in _own(world).items()
        for rank, state in enumerate(world.gather(own))
    }


def restore_random_state(tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Take over what `random_state` gave. The values are the first process's; the names are known to all."""
    for kind, own in _own(world).items():
        names = [f"{PREFIX}{kind}.{rank}" for rank in range(world.size)]
        if not tensors.keys() >= set(names):
            logger.info(
                "the checkpoint has no random numbers of %d processes on %s: the seed's go on", world.size, kind
            )
            continue
        state = world.scatter([tensors[name] for name in names] if world.rank == 0 else [], own)
        if kind == "cuda":
            torch.cuda.set_rng_state(state, world.device)
        else:
            torch.set_rng_state(state)


def _own(world: World) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return states
