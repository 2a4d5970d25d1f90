"""The policy: a causal language model in memory, alone or sharded over processes, whole or with adapters.

Owns loading, the forward pass of a packed row, and the way of parameters out and back in: by Hugging Face names and
whole, however they lie here. With several processes all of them must make the same calls.

Shapes: N response tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.errors import BackendDown
from poise.learner import adapters, attention
from poise.learner.config import LearnerConfig
from poise.learner.logprobs import token_logprobs
from poise.learner.packing import PackedRow
from poise.learner.world import World
from poise_client.types import WeightArray


class PackedForward(torch.nn.Module):
    """A model's log-probabilities of a packed row: one module, so that all parameters are at hand while it runs."""

    def __init__(self, model: Any, config: LearnerConfig) -> None:
        super().__init__()
        self.model = model
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._chunk_tokens = config.logprob_chunk_tokens

    def forward(self, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of a row's targets, [N] each."""
        device = row.token_ids_1L.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            states_1Ld = self.model.get_decoder()(
                input_ids=row.token_ids_1L,
                position_ids=row.positions_1L,
                attention_spans=row.spans,
                use_cache=False,
            ).last_hidden_state
        return token_logprobs(
            states_1Ld[0].index_select(0, row.predictors_N),
            self.model.get_output_embeddings(),
            row.targets_N,
            temperature,
            self._chunk_tokens,
            self._dtype,
        )


class Policy:
    """The model that is trained."""

    def __init__(self, config: LearnerConfig, world: World) -> None:
        """Load it.

        Raises:
            BackendDown: it cannot be loaded, or cannot be trained.
        """
        self._config = config
        self._world = world
        self.model = load_model(config).to(world.device).train()
        if config.lora is not None:
            adapters.inject(self.model, config.lora)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.logprobs = PackedForward(self.model, config)
        """Of a packed row: the forward pass."""
        if world.is_sharded:
            _shard(self.logprobs, self.model, world)

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
            tensors = ((adapters.name_in_files(name), self.whole(parameter)) for name, parameter in self.trained())
        else:
            tensors = adapters.merged(self.model, self.whole)
        for name, tensor in tensors:
            if self._world.rank == 0:
                weights[name] = _to_array(tensor.to("cpu", dtype, copy=True))
        return weights

    def save(self, folder: str) -> None:
        """Write the policy, adapters merged, with its tokenizer as a Hugging Face folder; and the adapters beside."""
        lora = self._config.lora
        if lora is None and not self._world.is_sharded:
            self.model.save_pretrained(folder)
        else:
            tensors = {name: self.kept(tensor) for name, tensor in adapters.merged(self.model, self.whole)}
            own = {name: self.kept(self.whole(parameter)) for name, parameter in self.trained()}
            if self._world.rank > 0:
                return
            plain = load_model(self._config)  # of the names and shapes that the folder is to have
            with torch.no_grad():
                for name, parameter in plain.named_parameters():
                    parameter.copy_(tensors[name])
            plain.save_pretrained(folder)
            if lora is not None:
                adapters.save(own, lora, self._config.model, folder)
        transformers.AutoTokenizer.from_pretrained(self._config.model).save_pretrained(folder)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return all of a parameter, or of a moment of its shape, wherever its parts lie."""
        tensor = tensor.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def kept(self, whole: torch.Tensor) -> torch.Tensor:
        """Return what this process is to keep of what `whole` gave, while it asks for more.

        Where parameters lie in parts, their device has no room for all of them at once: the first process keeps them
        outside it, and the others none.
        """
        if not self._world.is_sharded:
            return whole
        return whole.cpu() if self._world.rank == 0 else whole.new_empty(0)

    def part_of(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return this process's part of what the first process has whole, laid out as `parameter`."""
        whole = whole.to(parameter.device, copy=True)
        if isinstance(parameter, DTensor):
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        return whole


def load_model(config: LearnerConfig) -> Any:
    """Load the model that training starts from. Raises `BackendDown`."""
    attention.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation=attention.PACKED
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackendDown(f"model {config.model} cannot be loaded: {error}") from error
    _refuse_unless_all_attend_to_all(model.config, config.model)
    return model


def load_reference(config: LearnerConfig, world: World) -> PackedForward:
    """Load the model that training started from, held still. Raises `BackendDown`."""
    model = load_model(config).to(world.device).eval().requires_grad_(False)
    return PackedForward(model, config)


def _shard(forward: PackedForward, model: Any, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # else a GPU that is there is taken for `device: cpu` too
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(forward, mesh=mesh, reshard_after_forward=False)  # the gradient needs the head's weights at once
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by what all processes have together
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _refuse_unless_all_attend_to_all(config: Any, model: str) -> None:
    """Rows of siblings replace the model's own mask: one that looks back over a window, or recurs, would be wrong."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if others := sorted(kinds - {"full_attention"}):
        raise BackendDown(
            f"model {model} has layers of {', '.join(others)}; the learner trains models of full attention alone"
        )


def _to_array(tensor: torch.Tensor) -> WeightArray:
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[np.generic] = tensor.view(torch.uint16).numpy()
        return WeightArray(bits, "bfloat16")
    return WeightArray(tensor.numpy(), "float32")
