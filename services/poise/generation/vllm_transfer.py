"""New weights from a safetensors file into a running vLLM model. Imported inside vLLM's workers alone.

vLLM reloads layer by layer into the tensors its kernels hold, from whatever a registered backend hands it; this
backend reads the file that the server staged. On a CPU it does so beforehand, on a thread, where memory allows.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from poise.generation.room import free_memory_bytes
from poise.generation.vllm_orphans import SERVER_PID_VARIABLE
from poise.generation.vllm_twin import NextWeights, is_twinnable, make_next, num_weight_bytes, share_packed_heads

logger = logging.getLogger(__name__)

BACKEND = "poise_file"

_MEMORY_FACTOR = 1.25
"""Memory that must be free to make weights ready, over what these take: vLLM makes a layer before it packs it."""


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
    _preparing: threading.Thread | None = None
    _next: NextWeights | None = None
    """Of the update that comes next, if they could be made ready."""

    def prepare(self, path: str) -> None:
        """Begin to make a file's weights ready, on a thread, if that is possible here."""
        if self._preparing is not None:
            self._preparing.join()  # it runs still if its update was given up, and is not to end after this one
        self._next = None
        if not is_twinnable(self.model):
            return
        needed, free = _MEMORY_FACTOR * num_weight_bytes(self.model), free_memory_bytes()
        if free < needed:
            logger.info(
                "sampling will stand still while weights load: %d MB are free, %d needed", free / 1e6, needed / 1e6
            )
            return
        self._preparing = threading.Thread(target=self._prepare, args=(path,), name="next-weights", daemon=True)
        self._preparing.start()

    @property
    def is_preparing(self) -> bool:
        """Whether that goes on."""
        return self._preparing is not None and self._preparing.is_alive()

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """See vLLM."""

    def start_weight_update(self) -> None:
        """See vLLM."""
        if self._next is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """See vLLM."""
        if self._next is None:
            self.model.load_weights(_tensors(update_info.path))
        else:
            self._next.take_over()

    def finish_weight_update(self) -> None:
        """See vLLM."""
        if self._next is None:
            finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        self._next = None
        share_packed_heads(self.model)

    def shutdown(self) -> None:
        """See vLLM."""

    def _prepare(self, path: str) -> None:
        # vLLM's threads are bound to cores. This one goes wherever the server may, and takes one: `torch._C`, for vLLM
        # has made the function of that name in `torch` do nothing.
        os.sched_setaffinity(0, os.sched_getaffinity(int(os.environ[SERVER_PID_VARIABLE])))
        torch._C.set_num_threads(1)
        try:
            self._next = make_next(self.model, _tensors(path))
        except Exception:
            logger.exception("weights could not be made ready; they are loaded while sampling stands still")


def register_backend() -> None:
    """Make `poise_file` known to vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield name, file.get_tensor(name)
