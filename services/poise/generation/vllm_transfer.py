"""New weights from a safetensors file into a running vLLM model. Imported inside vLLM's workers alone.

vLLM reloads layer by layer into the tensors its kernels hold, from whatever a registered backend hands it; this
backend reads the file that the server staged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "poise_file"


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One update."""

    path: str = ""
    """The safetensors file, holding every parameter by its checkpoint name."""


class FileWeightTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):  # type: ignore[misc]
    """The `poise_file` backend."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """See vLLM."""

    def start_weight_update(self) -> None:
        """See vLLM."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """See vLLM."""
        self.model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        """See vLLM."""
        finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        _repack_cpu_heads(self.model)

    def shutdown(self) -> None:
        """See vLLM."""


def register_backend() -> None:
    """Make `poise_file` known to vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield name, file.get_tensor(name)


def _repack_cpu_heads(model: Any) -> None:
    """Pack the embeddings and heads again for the CPU's matrix product.

    On a CPU they keep a packed copy of their weight, which vLLM 0.32 does not renew on a reload: logits would go on
    coming from the old head, silently.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
