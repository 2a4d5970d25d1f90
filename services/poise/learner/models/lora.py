"""LoRA through peft: the adapters inside a model, and the way back to plain parameters.

The weights that replicas get are plain ones with the adapters merged, whatever engine it is; or the adapters alone,
for replicas that compute with them as they are. Knows no processes.
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
"""How peft calls the model that an adapter belongs to, in its files."""


def inject(model: Any, settings: LoraSettings, name: str) -> None:
    """Put adapters into a model, in place, and hold everything else still. Deterministic after `torch.manual_seed`.

    Raises:
        Unusable: `target_modules` are not in the model called `name`, or cannot be merged.
    """
    import peft
    from peft.tuners.lora import Linear, LoraLayer

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it, layer by layer
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys"
            )  # of experts, which get no adapters
            peft.inject_adapter_in_model(_peft_config(settings), model)
    except ValueError as error:
        raise Unusable(f"lora: model {name} ({type(model).__name__}) cannot take these adapters: {error}") from error
    others = [
        path for path, layer in model.named_modules() if isinstance(layer, LoraLayer) and type(layer) is not Linear
    ]
    if others:
        raise Unusable(
            f"lora.target_modules: {others[0]} of model {name} is no linear layer, and its adapter cannot be merged",
            remedy="Name linear layers only, such as [q_proj, k_proj, v_proj, o_proj].",
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of the model is an adapter's."""
    return ".lora_" in name


def merged(model: Any, whole: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter of the model by the name it had before `inject`, adapters merged: W + (α / r)·B·A.

    `whole` gives all of a parameter that is sharded; it is called for all parameters in the same order everywhere.
    """
    with torch.no_grad():
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                continue
            tensor = whole(parameter)
            if name.endswith(f"{_BASE}.weight"):
                layer = modules[name.removesuffix(f"{_BASE}.weight")]
                up, down = (whole(side[_ADAPTER].weight) for side in (layer.lora_B, layer.lora_A))
                change = up @ down
                # Conv1D, as in GPT-2, keeps its weight as [inputs, outputs].
                tensor = tensor + layer.scaling[_ADAPTER] * (change.T if layer.fan_in_fan_out else change)
            yield name.replace(_BASE, ""), tensor


def name_in_files(name: str) -> str:
    """Return what peft's files call a parameter of an adapter."""
    return f"{_PREFIX}{name.replace(f'.{_ADAPTER}', '')}"


def describe(settings: LoraSettings, model: str) -> Adapter:
    """Return what adapters of a model are, for whom they are sent to. Reads the model's files.

    Raises:
        Unusable: they cannot be read.
    """
    return Adapter(settings.rank, float(settings.alpha), checkpoint_digest(model))


def save(tensors: Mapping[str, torch.Tensor], settings: LoraSettings, model: str, folder: str) -> None:
    """Write the adapters as peft reads them, into `<folder>/adapter`, on top of the model they belong to."""
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
