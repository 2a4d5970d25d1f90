"""New weights for a vLLM that runs: its workers are told from the server's process. vLLM is imported late."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from poise.errors import BackendDown
from poise.generation.engines.vllm.lora import adapter_request
from poise.generation.engines.vllm.worker_calls import ask_workers

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 0.02


async def prepare_weights(engine: Any, weights: Path, known_obstacle: str) -> str:
    """Have the workers of an `AsyncLLM` make weights ready while sampling goes on.

    Returns why they cannot, empty if they can, and logs it unless it is known: their own logs go nowhere.

    Raises:
        BackendDown: vLLM does not answer.
    """
    try:
        level, obstacle = (await ask_workers(engine, "poise_prepare", str(weights)))[0]
        while any(await ask_workers(engine, "poise_is_preparing")):  # noqa: ASYNC110 (in other processes)
            await asyncio.sleep(_ASK_EVERY_S)
    except Exception as error:
        raise BackendDown(f"vLLM cannot prepare an update: {error}") from error
    if obstacle and obstacle != known_obstacle:
        logger.log(level, "sampling stands still while new weights load, for they cannot be made ready: %s", obstacle)
    return str(obstacle)


async def load_weights(engine: Any, weights: Path, policy_version: int) -> None:
    """Exchange the weights; sampling must be paused. Raises whatever vLLM does."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await engine.start_weight_update()
    await engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
    await engine.finish_weight_update(weight_version=str(policy_version))


async def load_adapter(engine: Any, folder: Path, policy_version: int) -> None:
    """Exchange the adapter; sampling must be paused. Raises whatever vLLM does."""
    if not await engine.add_lora(adapter_request(folder)):
        raise RuntimeError("vLLM did not take the adapter")
    await engine.update_weight_version(str(policy_version))
