"""The states of all ranks' random number generators, so that dropout draws the same numbers after a restart.

Rank r's state is `rng.cpu.r` and, if it computes on a GPU, `rng.cuda.r`; both uint8. Every rank must make the same
calls.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from poise.learner.distributed.process_group import World

logger = logging.getLogger(__name__)


def random_state(world: World) -> dict[str, torch.Tensor]:
    """Return the states of all ranks on rank 0, and nothing on the others."""
    return {
        f"rng.{kind}.{rank}": state for kind, own in _own(world).items() for rank, state in enumerate(world.gather(own))
    }


def restore_random_state(tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Restore what `random_state` returned. Every rank needs the names, only rank 0 the values."""
    for kind, own in _own(world).items():
        names = [f"rng.{kind}.{rank}" for rank in range(world.size)]
        if not tensors.keys() >= set(names):
            logger.info(
                "the checkpoint has no %s random states for %d ranks; generators start from the seed", kind, world.size
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
