"""AdamW for the parameters of one model: learning-rate schedule, gradient clipping and durable state.

Every rank must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.distributed.tensor import DTensor

from poise.learner.config import OptimizerConfig
from poise.learner.distributed.fsdp import full_tensor, on_rank_zero, shard_like
from poise.learner.distributed.process_group import World

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Updates named parameters in place."""

    def __init__(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig, world: World
    ) -> None:
        self._parameters = dict(parameters)
        self._settings = settings
        self._world = world
        self.adam = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters."""
        return list(self._parameters.values())

    def learning_rate(self, update: int) -> float:
        """Return the learning rate of an update by its number, from 0."""
        settings = self._settings
        if update < settings.warmup_updates:
            return settings.learning_rate * (update + 1) / settings.warmup_updates
        return settings.learning_rate

    def zero_grad(self) -> None:
        """Delete the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip the norm of the gradient; return the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._settings.gradient_clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, update: int) -> None:
        """Update the parameters with the learning rate of this update number."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(update)
        self.adam.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return parameters and moments as `model.<name>`, `exp_avg.<name>`, …. Not copies; empty except on rank 0."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"model.{name}"] = on_rank_zero(full_tensor(parameter), self._world)
            # A parameter that never had a gradient has no moments.
            moments = self.adam.state.get(parameter, {})
            tensors |= {f"{key}.{name}": on_rank_zero(full_tensor(t), self._world) for key, t in moments.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError: a parameter is missing. The optimizer is then unusable.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(shard_like(parameter, tensors[f"model.{name}"]))
            self.adam.state.pop(parameter, None)
            if f"{_ADAM_STATE[0]}.{name}" in tensors:
                step, *moments = (tensors[f"{key}.{name}"] for key in _ADAM_STATE)
                values = [step.to(parameter.device, copy=True), *(shard_like(parameter, t) for t in moments)]
                self.adam.state[parameter] = dict(zip(_ADAM_STATE, values, strict=True))
