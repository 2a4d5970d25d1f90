"""Low-rank adapters in vLLM: one at a time, under one id, replaced in place. vLLM is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from poise.generation.config import GenerationConfig

_ADAPTER_ID = 1


def adapter_arguments(config: GenerationConfig) -> dict[str, Any]:
    """Return vLLM's arguments for the configured adapters."""
    if config.lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks

    # vLLM supports only some ranks, and serves an adapter of a lower rank as the next higher one.
    rank = min(rank for rank in get_args(MaxLoRARanks) if rank >= config.lora.max_rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def adapter_request(folder: Path | None = None) -> Any:
    """Return vLLM's request for the served adapter; with a folder, for replacing it with the folder's adapter."""
    from vllm.lora.request import LoRARequest

    # vLLM does not read the path of a served adapter, but it must not be empty.
    return LoRARequest("policy", _ADAPTER_ID, str(folder or "served"), load_inplace=folder is not None)


def add_empty_adapter(manager: Any) -> None:
    """Make a worker's `LRUCacheWorkerLoRAManager` serve an adapter of zeros."""
    manager.add_dummy_lora(adapter_request(), rank=1)
    manager._adapter_manager.activate_adapter(_ADAPTER_ID)
