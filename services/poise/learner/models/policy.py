"""The policy: the causal language model in training, with or without adapters, sharded over ranks if there are several.

Weights and exports have Hugging Face names and full tensors, even if parameters are sharded. Every rank must make the
same calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from poise.learner.config import LearnerConfig
from poise.learner.distributed.fsdp import full_tensor, on_rank_zero, shard
from poise.learner.distributed.process_group import World
from poise.learner.models import lora
from poise.learner.models.backbone import load_model
from poise.learner.models.forward import PackedForward
from poise.learner.models.forward_check import check_adapters, checked_forward, logprobs_of_random_groups
from poise.runtime.models.decoder import decoder_layers
from poise.runtime.models.generation_config import repaired
from poise_client.types import WeightArray

logger = logging.getLogger(__name__)


class Policy:
    """The model that is trained."""

    def __init__(self, config: LearnerConfig, world: World) -> None:
        """Load the model.

        Raises:
            Unusable: it cannot be loaded, or cannot be trained.
        """
        self._config = config
        self._world = world
        self.model = load_model(config).to(world.device)
        self._repair_generation_config()
        self._tokenizer: Any = None
        """Loaded by the first export or export check."""
        self.logprobs = checked_forward(self.model, config)
        """The forward pass of a packed row."""
        if config.lora is not None:
            without_N = logprobs_of_random_groups(self.logprobs)
            lora.inject(self.model, config.lora, config.model)
            check_adapters(self.logprobs, without_N, config.model)
        if world.is_sharded:
            shard(self.logprobs, decoder_layers(self.model), world)
        self.logprobs.train(config.dropout)

    def _repair_generation_config(self) -> None:
        """Repair generation settings that transformers read from config.json but would not save."""
        config = self.model.generation_config
        if config is None:
            return
        savable, repairs = repaired(config.to_diff_dict(), self._config.model, transformers.GenerationConfig)
        if repairs:
            logger.warning("%s", repairs)
            self.model.generation_config = savable

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the trained parameters: all of them, or only the adapters'."""
        for name, parameter in self.model.named_parameters():
            if self._config.lora is None or lora.is_adapter(name):
                yield name, parameter

    def weights(self) -> dict[str, WeightArray]:
        """Return a copy of the weights to push, by their names in files; empty except on rank 0.

        These are all parameters, tied ones once, with adapters merged. With `push.transport: lora`, only the adapters'.
        """
        dtype = getattr(torch, self._config.dtype)
        weights = {}
        tensors: Iterator[tuple[str, torch.Tensor]]
        if self._config.push.transport == "lora":
            tensors = ((lora.name_in_files(name), full_tensor(parameter)) for name, parameter in self.trained())
        else:
            tensors = lora.merged(self.model, full_tensor)
        for name, tensor in tensors:
            if self._world.rank == 0:
                weights[name] = _to_array(tensor.to("cpu", dtype, copy=True))
        return weights

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder: the policy, adapters merged, its tokenizer, and the adapters in `adapter`."""
        if self._config.lora is None and not self._world.is_sharded:
            self._save(folder, None, {})
            return
        tensors = {name: on_rank_zero(tensor, self._world) for name, tensor in lora.merged(self.model, full_tensor)}
        own = {name: on_rank_zero(full_tensor(parameter), self._world) for name, parameter in self.trained()}
        if self._world.rank == 0:
            self._save(folder, tensors | self._buffers(), own)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return saved tensors that are not parameters, such as the expert biases of DeepSeek-V3."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}

    def save_without_parameters(self, folder: str) -> None:
        """Write what `save` writes, but only the smallest parameter. Runs on one rank.

        It fails whenever `save` would, except for lack of disk space.
        """
        name, smallest = min(self._skeleton().named_parameters(), key=lambda named: named[1].numel())
        self._save(folder, {name: torch.zeros(smallest.shape)}, {})

    def _save(self, folder: str, tensors: dict[str, torch.Tensor] | None, adapter: dict[str, torch.Tensor]) -> None:
        """Write a folder with `tensors`, or with the model's own if None, and with the adapter if there is one."""
        model = self.model if tensors is None else self._skeleton()
        model.save_pretrained(folder, state_dict=tensors)
        if self._config.lora is not None:
            lora.save(adapter, self._config.lora, self._config.model, folder)
        if self._tokenizer is None:  # keep it: the model's folder may be deleted before training ends
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._config.model, trust_remote_code=False)
        self._tokenizer.save_pretrained(folder)

    def _skeleton(self) -> Any:
        """Return the model without adapters and sharding, on the meta device: names and shapes, but no values."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # keep dropout's random state
            plain = transformers.AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float32)
        plain.generation_config = self.model.generation_config
        return plain


def load_reference(config: LearnerConfig, world: World) -> PackedForward:
    """Load the model that training started from, frozen and sharded like the policy. Raises `Unusable`."""
    model = load_model(config).to(world.device)
    forward = checked_forward(model, config).requires_grad_(False)
    if world.is_sharded:
        shard(forward, decoder_layers(model), world, keep_head=False)
    return forward


def _to_array(tensor: torch.Tensor) -> WeightArray:
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[np.generic] = tensor.view(torch.uint16).numpy()
        return WeightArray(bits, "bfloat16")
    return WeightArray(tensor.numpy(), "float32")
