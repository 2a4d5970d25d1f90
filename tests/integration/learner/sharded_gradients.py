"""Writes the gradients of a mini-batch for every loss, computed by ranks under torchrun.

Usage: torchrun ... sharded_gradients.py MODEL STATE_DIR FILE, with the repository on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.unit.learner.batches import make_batch, make_config
from tests.unit.learner.gradients import LOSSES, GradientTrainer
from torch.distributed.tensor import DTensor

SETTINGS = {"mini_batch_prompts": 100, "micro_batch_tokens": 24}
"""Rows that do not divide by two."""


def gradients_of_all(trainer: GradientTrainer) -> dict[str, torch.Tensor]:
    """Return the gradients by loss and parameter."""
    rollouts = make_batch(0, num_prompts=5).rollouts
    return {
        f"{loss}/{name}": gradient
        for loss, settings in LOSSES.items()
        for name, gradient in trainer.gradients(rollouts, settings).items()
    }


if __name__ == "__main__":
    model, state_dir, file = sys.argv[1:]
    trainer = GradientTrainer(make_config(Path(model), Path(state_dir), **SETTINGS))
    world = trainer.load()
    assert world.size == 2
    reference = trainer.reference
    assert reference is not None
    for forward in (trainer.policy.logprobs, reference):
        assert all(isinstance(parameter, DTensor) for parameter in forward.parameters()), "it is not sharded"
    trainer.leave_the_reference()
    gradients = gradients_of_all(trainer)
    if world.rank == 0:
        save_file(gradients, file)
    trainer.close()
