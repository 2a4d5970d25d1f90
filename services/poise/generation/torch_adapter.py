"""A low-rank adapter beside the linear modules of a model in transformers: y + (α / r)·B·A·x, never merged.

Shapes: r the adapter's rank; a linear module's weight is [out, in], its A [r, in], its B [out, r].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from poise.generation.adapters import DOWN, PREFIX, UP, adapted_modules


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter's tensors, by their names in peft's files, where the model's are and of the same element types."""

    tensors: dict[str, torch.Tensor]
    scaling: float
    """α / r."""


class TorchAdapter:
    """The adapter that a model computes with; none at first."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        self._hooks: list[RemovableHandle] = []

    def use(self, adapter: LoadedAdapter) -> None:
        """Compute with this one instead of any other. Not during a forward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self._modules[module].register_forward_hook(
                _adding(adapter.tensors[f"{PREFIX}{module}{DOWN}"], adapter.tensors[f"{PREFIX}{module}{UP}"], adapter)
            )
            for module in sorted(adapted_modules(adapter.tensors))
        ]


def _adding(down_ri: torch.Tensor, up_or: torch.Tensor, adapter: LoadedAdapter) -> Callable[..., torch.Tensor]:
    def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + linear(linear(inputs[0], down_ri), up_or) * adapter.scaling

    return add
