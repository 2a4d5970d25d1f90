"""Low-rank adapters in vLLM: one at a time, always under the same id, exchanged in place. vLLM is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from poise.generation.config import GenerationConfig

_ADAPTER_ID = 1


def adapter_arguments(config: GenerationConfig) -> dict[str, Any]:
    """Return the arguments of vLLM that let it serve adapters as configured."""
    if config.lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks

    # vLLM knows some ranks alone, and serves smaller ones as the next of them.
    rank = min(rank for rank in get_args(MaxLoRARanks) if rank >= config.lora.max_rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def adapter_request(folder: Path | None = None) -> Any:
    """Return what names the adapter that is served; with a folder, what has vLLM serve that one instead."""
    from vllm.lora.request import LoRARequest

    # Of what is served vLLM has no need to look at the path, which must not be empty.
    return LoRARequest("policy", _ADAPTER_ID, str(folder or "served"), load_inplace=folder is not None)


def add_empty_adapter(manager: Any) -> None:
    """Have a worker serve an adapter of zeros, by its `LRUCacheWorkerLoRAManager`."""
    manager.add_dummy_lora(adapter_request(), rank=1)
    manager._adapter_manager.activate_adapter(_ADAPTER_ID)
