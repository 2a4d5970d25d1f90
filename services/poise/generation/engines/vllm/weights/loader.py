"""New weights from a safetensors file into a running vLLM model. Imported inside vLLM's workers alone.

vLLM reloads layer by layer into the tensors its kernels hold, from whatever a registered backend hands it; this
backend reads the file that the server staged. On a CPU it does so beforehand, on a thread, where memory allows: one
process of a machine at a time, for all its replicas get their weights at the same moment.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from poise.generation.engines.vllm.orphans import SERVER_PID_VARIABLE
from poise.generation.engines.vllm.weights.next_weights import (
    NextWeights,
    make_next,
    num_weight_bytes,
    share_packed_heads,
    unknown_kinds,
)
from poise.generation.weights.capacity import MemoryTurn, free_memory_bytes, return_freed_memory

logger = logging.getLogger(__name__)

BACKEND = "poise_file"

_MEMORY_FACTOR = 1.25
"""Memory that must be free to make weights ready, over what these take: vLLM makes a layer before it packs it."""

NOTHING_TO_TELL = (logging.NOTSET, "")


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
    _thread: threading.Thread | None = None
    """What goes on beside sampling: making weights ready, or giving back the memory of those before."""
    _next: NextWeights | None = None
    """Of the update that comes next, if they could be made ready."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turn = MemoryTurn()
        """Held from the look at what is free until the memory of the weights before is given back."""

    def prepare(self, path: str) -> tuple[int, str]:
        """Begin to make a file's weights ready, on a thread, if that is possible here.

        Returns why it is not, after the level of a log at which that is worth a word; empty where it is, or nobody
        would expect it.
        """
        if self._thread is not None:
            self._thread.join()
        if self._next is not None:  # of an update that was given up
            self._next = None
            self._give_back()
        if not current_platform.is_cpu():
            return NOTHING_TO_TELL
        told = self._obstacle()
        if told == NOTHING_TO_TELL:
            self._start(self._prepare, path)
        else:
            self._turn.give_back()
        return told

    @property
    def is_preparing(self) -> bool:
        """Whether that goes on."""
        return self._thread is not None and self._thread.is_alive()

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """See vLLM."""
        return_freed_memory()  # of loading the model

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
        if current_platform.is_cpu():
            self._start(self._give_back)

    def shutdown(self) -> None:
        """See vLLM."""

    def _obstacle(self) -> tuple[int, str]:
        """Return why weights cannot be made ready, as `prepare` does; if nothing is in the way, this has the turn."""
        if self.parallel_config.world_size > 1:
            return logging.INFO, "the model is spread over several processes"
        if kinds := unknown_kinds(self.model):
            return logging.INFO, f"it has layers whose reload does more ({', '.join(kinds)})"
        try:
            if not self._turn.take():
                return logging.INFO, "another process of this machine makes its own ready, and one does so at a time"
        except OSError as error:
            return logging.WARNING, f"{error}; name a folder for temporary files that can be written in TMPDIR"
        needed = _MEMORY_FACTOR * num_weight_bytes(self.model)
        if free_memory_bytes() < needed:
            return logging.WARNING, (
                f"that takes {needed / 1e6:.0f} MB of memory, which are not free; free as much, or raise the limit of "
                "the container"
            )
        return NOTHING_TO_TELL

    def _start(self, work: Callable[..., None], *args: str) -> None:
        self._thread = threading.Thread(target=self._beside_sampling, args=(work, *args), name="weights", daemon=True)
        self._thread.start()

    def _beside_sampling(self, work: Callable[..., None], *args: str) -> None:
        # vLLM's threads are bound to cores. This one goes wherever the server may, and takes one: `torch._C`, for vLLM
        # has made the function of that name in `torch` do nothing.
        os.sched_setaffinity(0, os.sched_getaffinity(int(os.environ[SERVER_PID_VARIABLE])))
        torch._C.set_num_threads(1)
        work(*args)

    def _prepare(self, path: str) -> None:
        try:
            self._next = make_next(self.model, _tensors(path))
        except Exception:
            logger.exception("weights could not be made ready; they are loaded while sampling stands still")
        if self._next is None:
            self._give_back()

    def _give_back(self) -> None:
        return_freed_memory()
        self._turn.give_back()


def register_backend() -> None:
    """Make `poise_file` known to vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield name, file.get_tensor(name)
