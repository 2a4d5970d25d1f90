"""The policy: a causal language model in memory, alone or sharded over processes, whole or with adapters.

Owns the way of parameters out: by Hugging Face names and whole, however they lie here. With several processes all of
them must make the same calls.
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
from poise.learner.distributed.fsdp import kept, shard, whole
from poise.learner.distributed.process_group import World
from poise.learner.models import lora as adapters
from poise.learner.models.backbone import load_model
from poise.learner.models.forward import PackedForward
from poise.learner.models.forward_check import check_adapters, checked_forward, probe_logprobs
from poise.runtime.models.decoder import decoder_layers
from poise.runtime.models.generation_config import repaired
from poise_client.types import WeightArray

logger = logging.getLogger(__name__)


class Policy:
    """The model that is trained."""

    def __init__(self, config: LearnerConfig, world: World) -> None:
        """Load it.

        Raises:
            Unusable: it cannot be loaded, or cannot be trained.
        """
        self._config = config
        self._world = world
        self.model = load_model(config).to(world.device)
        self._repair_generation_config()
        self._tokenizer: Any = None
        """Of the model; loaded with the first export, or check of one."""
        self.logprobs = checked_forward(self.model, config)
        """Of a packed row: the forward pass."""
        if config.lora is not None:
            before_N = probe_logprobs(self.logprobs)
            adapters.inject(self.model, config.lora, config.model)
            check_adapters(self.logprobs, before_N, config.model)
        if world.is_sharded:
            shard(self.logprobs, decoder_layers(self.model), world)
        self.logprobs.train(config.dropout)

    def _repair_generation_config(self) -> None:
        """Make the settings savable that transformers took from config.json, where a model has no file of them."""
        config = self.model.generation_config
        if config is None:
            return
        savable, repairs = repaired(config.to_diff_dict(), self._config.model, transformers.GenerationConfig)
        if repairs:
            logger.warning("%s", repairs)
            self.model.generation_config = savable

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters that training goes on from: all of them, or the adapters'."""
        for name, parameter in self.model.named_parameters():
            if self._config.lora is None or adapters.is_adapter(name):
                yield name, parameter

    def weights(self) -> dict[str, WeightArray]:
        """Return a copy of what replicas get, by the names it has in files; empty on all processes but the first.

        Every parameter, tied ones once, adapters merged; or with `push.transport: lora` the adapters' alone.
        """
        dtype = getattr(torch, self._config.dtype)
        weights = {}
        tensors: Iterator[tuple[str, torch.Tensor]]
        if self._config.push.transport == "lora":
            tensors = ((adapters.name_in_files(name), whole(parameter)) for name, parameter in self.trained())
        else:
            tensors = adapters.merged(self.model, whole)
        for name, tensor in tensors:
            if self._world.rank == 0:
                weights[name] = _to_array(tensor.to("cpu", dtype, copy=True))
        return weights

    def save(self, folder: str) -> None:
        """Write the policy, adapters merged, with its tokenizer as a Hugging Face folder; and the adapters beside."""
        if self._config.lora is None and not self._world.is_sharded:
            self._save(folder, None, {})
            return
        tensors = {name: kept(tensor, self._world) for name, tensor in adapters.merged(self.model, whole)}
        own = {name: kept(whole(parameter), self._world) for name, parameter in self.trained()}
        if self._world.rank == 0:
            self._save(folder, tensors | self._buffers(), own)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint that are no parameters, such as the expert biases of DeepSeek-V3."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}

    def save_without_parameters(self, folder: str) -> None:
        """Write all that `save` writes but the parameters, of which it writes the smallest; on one process.

        It fails where `save` would, for any reason but their size.
        """
        name, smallest = min(self._skeleton().named_parameters(), key=lambda named: named[1].numel())
        self._save(folder, {name: torch.zeros(smallest.shape)}, {})

    def _save(self, folder: str, tensors: dict[str, torch.Tensor] | None, adapter: dict[str, torch.Tensor]) -> None:
        """Write a folder with `tensors`, None for those of the model, and with an adapter where there are any."""
        model = self.model if tensors is None else self._skeleton()
        model.save_pretrained(folder, state_dict=tensors)
        if self._config.lora is not None:
            adapters.save(adapter, self._config.lora, self._config.model, folder)
        if self._tokenizer is None:  # kept: by the end of training the model's folder may be gone
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._config.model, trust_remote_code=False)
        self._tokenizer.save_pretrained(folder)

    def _skeleton(self) -> Any:
        """Return the model as it was before adapters and sharding, with names and shapes but without values."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # leaves no trace in what dropout draws next
            plain = transformers.AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float32)
        plain.generation_config = self.model.generation_config
        return plain


def load_reference(config: LearnerConfig, world: World) -> PackedForward:
    """Load the model that training started from, held still, in parts as the policy is. Raises `Unusable`."""
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
