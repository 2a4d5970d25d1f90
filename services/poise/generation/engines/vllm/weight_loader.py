"""Replaces the weights of a running vLLM model with those in a safetensors file. Imported in vLLM's workers only.

vLLM reloads a model layer by layer, in place, with tensors from a registered backend. On a CPU it packs every matrix
for its kernels, which takes most of a reload. So there the backend prepares the next weights on a thread while sampling
continues: it reloads a shadow model, which has the same modules but its own tensors, and later copies the result in
place. It falls back to vLLM's reload if the shadow does not fit in memory or the model has unknown layers. Only one
process per machine prepares at a time, because all replicas receive their weights at the same moment.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    _get_original_loader,
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.platforms import current_platform

from poise.generation.engines.vllm.orphans import SERVER_PID_VARIABLE
from poise.generation.weights.capacity import MemoryLock, free_memory_bytes, trim_memory

logger = logging.getLogger(__name__)

BACKEND = "poise_file"

NO_OBSTACLE = (logging.NOTSET, "")

_MEMORY_FACTOR = 1.25
"""Free memory needed to prepare weights, relative to their size: vLLM builds a layer before it packs it."""

_KNOWN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None))
"""Quantization methods that store a layer's weights only in its parameters and in `cpu_linear`."""


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Initialization of the backend; it needs no fields."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One update."""

    path: str = ""
    """A safetensors file that holds every parameter by its checkpoint name."""


class FileWeightTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):  # type: ignore[misc]
    """The `poise_file` backend."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate
    thread: threading.Thread | None = None
    """Prepares the next weights, or frees the replaced ones, while sampling continues."""
    next_weights: NextWeights | None = None
    """The weights of the next update, if they were prepared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_lock = MemoryLock()
        """Held from the check of free memory until the replaced weights are freed."""

    def prepare(self, path: str) -> tuple[int, str]:
        """Start preparing the weights in a file on a thread, if that is possible here.

        Returns `NO_OBSTACLE` if preparation started. On a GPU it does nothing and also returns `NO_OBSTACLE`.
        Otherwise it returns a log level and the reason.
        """
        if self.thread is not None:
            self.thread.join()
        if self.next_weights is not None:  # prepared for an update that was abandoned
            self.next_weights = None
            self._return_memory()
        if not current_platform.is_cpu():
            return NO_OBSTACLE
        obstacle = self._obstacle()
        if obstacle == NO_OBSTACLE:
            self._start(self._prepare, path)
        else:
            self.memory_lock.release()
        return obstacle

    @property
    def is_preparing(self) -> bool:
        """Whether the thread still runs."""
        return self.thread is not None and self.thread.is_alive()

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """See vLLM."""
        trim_memory()  # loading the model freed much

    def start_weight_update(self) -> None:
        """See vLLM."""
        if self.next_weights is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """See vLLM."""
        if self.next_weights is None:
            self.model.load_weights(_read_tensors(update_info.path))
        else:
            self.next_weights.apply()

    def finish_weight_update(self) -> None:
        """See vLLM."""
        if self.next_weights is None:
            finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        self.next_weights = None
        share_packed_heads(self.model)
        if current_platform.is_cpu():
            self._start(self._return_memory)

    def shutdown(self) -> None:
        """See vLLM."""

    def _obstacle(self) -> tuple[int, str]:
        """Return why weights cannot be prepared here, or `NO_OBSTACLE`; then this process holds the memory lock."""
        if self.parallel_config.world_size > 1:
            return logging.INFO, "the model is split over several processes"
        if kinds := unknown_layers(self.model):
            return logging.INFO, f"the model has layers of unknown kinds ({', '.join(kinds)})"
        try:
            if not self.memory_lock.try_acquire():
                return logging.INFO, "another process on this machine is preparing its weights"
        except OSError as error:
            return logging.WARNING, f"{error}; set TMPDIR to a writable folder"
        needed = _MEMORY_FACTOR * num_weight_bytes(self.model)
        free = free_memory_bytes()
        if free < needed:
            return logging.WARNING, (
                f"preparing needs {needed / 1e6:.0f} MB of memory, but only {free / 1e6:.0f} MB are available; release "
                "memory, or raise the container's memory limit"
            )
        return NO_OBSTACLE

    def _start(self, work: Callable[..., None], *args: str) -> None:
        self.thread = threading.Thread(target=self._in_background, args=(work, *args), name="weights", daemon=True)
        self.thread.start()

    def _in_background(self, work: Callable[..., None], *args: str) -> None:
        # vLLM binds its threads to cores. Undo that for this thread, and compute on one core at a time.
        # vLLM disabled `torch.set_num_threads`, so call `torch._C`.
        os.sched_setaffinity(0, os.sched_getaffinity(int(os.environ[SERVER_PID_VARIABLE])))
        torch._C.set_num_threads(1)
        work(*args)

    def _prepare(self, path: str) -> None:
        try:
            self.next_weights = prepare_next(self.model, _read_tensors(path))
        except Exception:
            logger.exception("preparing new weights failed; generation pauses while they load")
        if self.next_weights is None:
            self._return_memory()

    def _return_memory(self) -> None:
        trim_memory()
        self.memory_lock.release()


def register_backend() -> None:
    """Register `poise_file` with vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


def _read_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


@dataclass(frozen=True, slots=True)
class _NextLayer:
    module: Any
    """The layer that the model samples with."""
    parameters: dict[str, torch.Tensor]
    linear: Callable[..., torch.Tensor] | None
    """Multiplies by the packed matrix; None if the layer has none."""


class NextWeights:
    """Prepared weights of a model."""

    def __init__(self, layers: list[_NextLayer]) -> None:
        self._layers = layers

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the weights into the model. No forward pass may run meanwhile."""
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                layer.module._parameters[name].data.copy_(parameter)
            if layer.linear is not None:
                layer.module.cpu_linear = layer.linear


@torch.no_grad()
def prepare_next(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> NextWeights:
    """Return the weights that vLLM would load from these tensors, by checkpoint name. The model can be in use.

    Raises:
        ValueError: parameters of the model are missing.
    """
    shadows: dict[torch.nn.Module, Any] = {}
    shadow_model = _shadow_of(model, shadows)
    try:
        initialize_layerwise_reload(shadow_model)
        for shadow in shadows.values():
            get_layerwise_info(shadow).kernel_tensors = None  # a shadow has none to copy new tensors to
        shadow_model.load_weights(tensors)
        for shadow in shadows.values():
            info = get_layerwise_info(shadow)
            if info.load_numel and not is_deferred_attention_layer(
                shadow
            ):  # padding is never loaded, so vLLM has not finished this layer
                _layerwise_process(shadow, info)
        layers = [_next_layer(module, shadow) for module, shadow in shadows.items()]
    finally:
        for shadow in shadows.values():
            del LAYERWISE_INFO[shadow]
            shadow.__dict__.clear()  # loaders and layers refer to each other, which would delay freeing the tensors
    loaded = {id(layer.module._parameters[name]) for layer in layers for name in layer.parameters}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in loaded]
    if missing:
        raise ValueError(f"the file has no weights for {', '.join(missing[:5])}")
    return NextWeights(layers)


def share_packed_heads(model: torch.nn.Module) -> None:
    """Make heads that are tied to an embedding use its packed matrix.

    vLLM 0.32 gives them a packed matrix of their own and does not update it on a reload: logits would silently come
    from the old head.
    """
    layers = [
        layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear")
    ]
    packed = {id(layer.weight): layer.cpu_linear for layer in layers if not isinstance(layer, ParallelLMHead)}
    for head in layers:
        head.cpu_linear = packed.get(id(head.weight), head.cpu_linear)


def unknown_layers(model: torch.nn.Module) -> list[str]:
    """Return the classes of layers whose next weights cannot be prepared."""
    return sorted({type(layer).__name__ for layer in model.modules() if not _is_known(layer)})


def num_weight_bytes(model: torch.nn.Module) -> int:
    """Return the approximate size of a shadow model's tensors."""
    recorded = (get_layerwise_info(layer).restore_metadata[0] for layer in model.modules())
    return sum(tensor.nbytes for parameters in recorded for tensor in parameters.values())


def _is_known(layer: torch.nn.Module) -> bool:
    if is_deferred_attention_layer(layer):
        return type(layer) is Attention and getattr(layer, "quant_method", None) is None
    persistent_buffers = layer._buffers.keys() - layer._non_persistent_buffers_set
    return type(getattr(layer, "quant_method", None)) in _KNOWN_METHODS and not persistent_buffers


def _shadow_of(layer: Any, shadows: dict[torch.nn.Module, Any]) -> Any:
    """Return a copy of a tree of modules whose parameters are ready to reload. Adds each copy to `shadows`."""
    if layer in shadows:
        return shadows[layer]
    shadow = shadows[layer] = object.__new__(type(layer))
    shadow.__dict__ = layer.__dict__.copy()
    shadow._buffers = {}
    shadow._non_persistent_buffers_set = set()
    shadow._parameters = {name: _cloned(layer._parameters[name]) for name in layer._parameters.keys() & SKIP_TENSORS}
    shadow._modules = {
        name: None if child is None else _shadow_of(child, shadows) for name, child in layer._modules.items()
    }
    shadow.__dict__.pop("cpu_linear", None)
    info = get_layerwise_info(layer)
    recorded = {name: _unwrapped(to_meta_tensor(tensor)) for name, tensor in info.restore_metadata[0].items()}
    LAYERWISE_INFO[shadow] = LayerReloadingInfo((recorded, {}), info.restore_device)
    return shadow


def _cloned(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None:
        return None
    clone = parameter.data.clone()
    clone.__class__ = parameter.__class__
    clone.__dict__ = parameter.__dict__.copy()
    return _unwrapped(clone)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Restore a parameter's original loader, which an earlier in-place reload has wrapped. Return the parameter."""
    tensor.weight_loader = _get_original_loader(tensor)  # type: ignore[attr-defined]
    return tensor


def _next_layer(module: torch.nn.Module, shadow: Any) -> _NextLayer:
    loaded = {
        name: parameter
        for name, parameter in shadow._parameters.items()
        if parameter is not None and not parameter.is_meta
    }
    return _NextLayer(module, loaded, shadow.__dict__.get("cpu_linear"))
