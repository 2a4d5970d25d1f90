"""LoRA with peft: injects adapters into a model, merges them into plain parameters, and writes adapter files.

Replicas get either plain weights with the adapters merged, for any engine, or only the adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from poise.errors import Unusable
from poise.learner.config import LoraSettings
from poise.runtime.models.checkpoint_digest import checkpoint_digest
from poise_client.types import Adapter

_ADAPTER = "default"
_BASE = ".base_layer"
_PREFIX = "base_model.model."
"""Prefix of parameter names in peft's files."""


def inject(model: Any, settings: LoraSettings, name: str) -> None:
    """Inject adapters into a model in place and freeze everything else. Deterministic after `torch.manual_seed`.

    Raises:
        Unusable: the model called `name` has no such `target_modules`, or they cannot be merged.
    """
    import peft
    from peft.tuners.lora import Linear, LoraLayer

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it for each layer
            # of experts, which get no adapters
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            peft.inject_adapter_in_model(_peft_config(settings), model)
    except ValueError as error:
        raise Unusable(f"lora: model {name} ({type(model).__name__}) cannot take these adapters: {error}") from error
    others = [
        path for path, layer in model.named_modules() if isinstance(layer, LoraLayer) and type(layer) is not Linear
    ]
    if others:
        raise Unusable(
            f"lora.target_modules: {others[0]} of model {name} is not a linear layer, so its adapter cannot be merged",
            remedy="Name linear layers only, such as [q_proj, k_proj, v_proj, o_proj].",
        )


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_" in name


def merged(model: Any, full_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter by its name before `inject`, with adapters merged: W + (α / r)·B·A.

    `full_tensor` gathers a sharded parameter. It is called for all parameters in the same order on every rank.
    """
    with torch.no_grad():
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                continue
            tensor = full_tensor(parameter)
            if name.endswith(f"{_BASE}.weight"):
                layer = modules[name.removesuffix(f"{_BASE}.weight")]
                up, down = (full_tensor(side[_ADAPTER].weight) for side in (layer.lora_B, layer.lora_A))
                change = up @ down
                # Conv1D, as in GPT-2, stores its weight as [inputs, outputs].
                tensor = tensor + layer.scaling[_ADAPTER] * (change.T if layer.fan_in_fan_out else change)
            yield name.replace(_BASE, ""), tensor


def name_in_files(name: str) -> str:
    """Return the name of an adapter's parameter in peft's files."""
    return f"{_PREFIX}{name.replace(f'.{_ADAPTER}', '')}"


def describe(settings: LoraSettings, model: str) -> Adapter:
    """Return the description of a model's adapters for pushes. Reads the model's files.

    Raises:
        Unusable: they cannot be read.
    """
    return Adapter(settings.rank, float(settings.alpha), checkpoint_digest(model))


def save(tensors: Mapping[str, torch.Tensor], settings: LoraSettings, model: str, folder: str) -> None:
    """Write the adapters of a model to `<folder>/adapter`, in peft's format."""
    target = Path(folder) / "adapter"
    target.mkdir()
    config = _peft_config(settings)
    config.base_model_name_or_path = model
    config.inference_mode = True
    config.save_pretrained(str(target))
    named = {name_in_files(name): tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, target / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(settings: LoraSettings) -> Any:
    import peft

    modules = settings.target_modules
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
