"""The next weights of a model, made ready beside those it samples with. Imported inside vLLM's workers alone.

On a CPU vLLM packs every matrix for its kernels, which takes most of a reload. Here its reload runs on a twin: the same
modules, with tensors of their own. What it made is then taken over in place, in little more than the time of a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    _get_original_loader,
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None))
"""How layers may hold their weights: all that these make of them is their parameters and `cpu_linear`."""


@dataclass(frozen=True, slots=True)
class _Layer:
    live: Any
    parameters: dict[str, torch.Tensor]
    linear: Callable[..., torch.Tensor] | None
    """The product with its packed matrix, where it has one."""


class NextWeights:
    """What a model takes over to have other weights."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers

    @torch.no_grad()
    def take_over(self) -> None:
        """Change the model. Nothing may be computed by it meanwhile."""
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                layer.live._parameters[name].data.copy_(parameter)
            if layer.linear is not None:
                layer.live.cpu_linear = layer.linear


def unknown_kinds(model: torch.nn.Module) -> list[str]:
    """Return the kinds of layers for which next weights cannot be made ready beside these."""
    return sorted({type(layer).__name__ for layer in model.modules() if not _is_known(layer)})


def num_weight_bytes(model: torch.nn.Module) -> int:
    """Return about how much a twin holds."""
    recorded = (get_layerwise_info(layer).restore_metadata[0] for layer in model.modules())
    return sum(tensor.nbytes for parameters in recorded for tensor in parameters.values())


@torch.no_grad()
def make_next(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> NextWeights:
    """Make the weights ready that vLLM would load from these, by their checkpoint names. The model can be in use.

    Raises:
        ValueError: they are not all of the model's parameters.
    """
    twins: dict[torch.nn.Module, Any] = {}
    twin = _twin_of(model, twins)
    try:
        initialize_layerwise_reload(twin)
        for one in twins.values():
            get_layerwise_info(one).kernel_tensors = None  # there are none to copy the new ones to
        twin.load_weights(tensors)
        for one in twins.values():
            info = get_layerwise_info(one)
            if info.load_numel and not is_deferred_attention_layer(one):  # its padding was not loaded
                _layerwise_process(one, info)
        layers = [_made(live, one) for live, one in twins.items()]
    finally:
        for one in twins.values():
            del LAYERWISE_INFO[one]
            one.__dict__.clear()  # loaders and layers refer to each other: what they hold would stay, for a while
    renewed = {id(layer.live._parameters[name]) for layer in layers for name in layer.parameters}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in renewed]
    if missing:
        raise ValueError(f"nothing was loaded into {', '.join(missing[:5])}")
    return NextWeights(layers)


def share_packed_heads(model: torch.nn.Module) -> None:
    """Have heads that are tied to an embedding use its packed matrix.

    They would keep one of their own, which vLLM 0.32 does not renew on a reload: logits would go on coming from the
    old head, silently.
    """
    layers = [one for one in model.modules() if isinstance(one, VocabParallelEmbedding) and hasattr(one, "cpu_linear")]
    packed = {id(one.weight): one.cpu_linear for one in layers if not isinstance(one, ParallelLMHead)}
    for head in layers:
        head.cpu_linear = packed.get(id(head.weight), head.cpu_linear)


def _is_known(layer: torch.nn.Module) -> bool:
    if is_deferred_attention_layer(layer):
        return type(layer) is Attention and getattr(layer, "quant_method", None) is None
    stored = layer._buffers.keys() - layer._non_persistent_buffers_set
    return type(getattr(layer, "quant_method", None)) in _METHODS and not stored


def _twin_of(layer: Any, twins: dict[torch.nn.Module, Any]) -> Any:
    """Return a copy of the tree of modules, its parameters ready to be reloaded; `twins` gets every module's."""
    if layer in twins:
        return twins[layer]
    twin = twins[layer] = object.__new__(type(layer))
    twin.__dict__ = layer.__dict__.copy()
    twin._buffers = {}
    twin._non_persistent_buffers_set = set()
    twin._parameters = {name: _copied(layer._parameters[name]) for name in layer._parameters.keys() & SKIP_TENSORS}
    twin._modules = {name: None if child is None else _twin_of(child, twins) for name, child in layer._modules.items()}
    twin.__dict__.pop("cpu_linear", None)
    info = get_layerwise_info(layer)
    recorded = {name: _unwrapped(to_meta_tensor(tensor)) for name, tensor in info.restore_metadata[0].items()}
    LAYERWISE_INFO[twin] = LayerReloadingInfo((recorded, {}), info.restore_device)
    return twin


def _copied(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None:
        return None
    copy = parameter.data.clone()
    copy.__class__ = parameter.__class__
    copy.__dict__ = parameter.__dict__.copy()
    return _unwrapped(copy)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter with its own loader: after a reload in place, what was recorded has that reload's."""
    tensor.weight_loader = _get_original_loader(tensor)  # type: ignore[attr-defined]
    return tensor


def _made(live: torch.nn.Module, twin: Any) -> _Layer:
    loaded = {
        name: parameter
        for name, parameter in twin._parameters.items()
        if parameter is not None and not parameter.is_meta
    }
    return _Layer(live, loaded, twin.__dict__.get("cpu_linear"))
