"""AdamW over the parameters of one model: the schedule of its learning rate, its bound of the gradient, its state.

Knows no losses. With several processes all of them must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.distributed.tensor import DTensor

from poise.learner.config import OptimizerConfig
from poise.learner.distributed.fsdp import kept, part_of, whole
from poise.learner.distributed.process_group import World

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Of named parameters, which it moves in place."""

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
        """What it moves."""
        return list(self._parameters.values())

    def learning_rate(self, update: int) -> float:
        """Return that of an update by its number, from 0."""
        settings = self._settings
        if update < settings.warmup_updates:
            return settings.learning_rate * (update + 1) / settings.warmup_updates
        return settings.learning_rate

    def clear(self) -> None:
        """Forget the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Bound the norm of the gradient; return what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._settings.gradient_clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, update: int) -> None:
        """Follow the gradient, as the update of this number."""
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(update)
        self.adam.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return parameters and moments by kind and name, `model.…` and `exp_avg.…`. Not copies.

        Empty tensors on all processes but the first.
        """
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"model.{name}"] = kept(whole(parameter), self._world)
            # A parameter that never had a gradient has no state.
            moments = self.adam.state.get(parameter, {})
            tensors |= {f"{kind}.{name}": kept(whole(value), self._world) for kind, value in moments.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: a parameter is missing. The optimizer is then half restored.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(part_of(parameter, tensors[f"model.{name}"]))
            self.adam.state.pop(parameter, None)
            if f"{_ADAM_STATE[0]}.{name}" in tensors:
                step, *moments = (tensors[f"{kind}.{name}"] for kind in _ADAM_STATE)
                values = [step.to(parameter.device, copy=True), *(part_of(parameter, moment) for moment in moments)]
                self.adam.state[parameter] = dict(zip(_ADAM_STATE, values, strict=True))
