"""A low-rank adapter on the linear modules of a transformers model: y + (α / r)·B·A·x, unmerged.

Shapes: r the adapter's rank; a linear module's weight is [out, in], its A [r, in], its B [out, r].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from poise.errors import InvalidRequest
from poise.generation.weights.adapter_files import (
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS_FILE,
    adapted_modules,
    check_adapter,
    read_config,
)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter's tensors by their names in peft's files, on the model's device and in its dtype."""

    tensors: dict[str, torch.Tensor]
    scaling: float
    """α / r."""


class TorchAdapter:
    """The adapter that a model currently computes with; none at first."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        self._hooks: list[RemovableHandle] = []

    def use(self, adapter: LoadedAdapter) -> None:
        """Replace the adapter. Must not run during a forward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self._modules[module].register_forward_hook(
                _lora_hook(
                    adapter.tensors[f"{PREFIX}{module}{LORA_A}"],
                    adapter.tensors[f"{PREFIX}{module}{LORA_B}"],
                    adapter.scaling,
                )
            )
            for module in sorted(adapted_modules(adapter.tensors))
        ]


def read_adapter(folder: Path, parameters: Mapping[str, torch.Tensor]) -> LoadedAdapter:
    """Return the adapter in a folder, for a model with these parameters.

    Raises:
        InvalidRequest: the adapter cannot be read or does not fit the model.
    """
    rank, alpha = read_config(folder)
    new = read_tensors(folder / WEIGHTS_FILE)
    check_adapter(shapes_of(parameters), shapes_of(new), rank)
    like = next(iter(parameters.values()))
    return LoadedAdapter({name: tensor.to(like, copy=True) for name, tensor in new.items()}, alpha / rank)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file. Raises `InvalidRequest` if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest.field("weights", f"{path} cannot be read: {error}") from error


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _lora_hook(a_ri: torch.Tensor, b_or: torch.Tensor, scaling: float) -> Callable[..., torch.Tensor]:
    def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + linear(linear(inputs[0], a_ri), b_or) * scaling

    return add
