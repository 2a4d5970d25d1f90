"""Calls from the server's process to the `PoiseWorker`s of a vLLM engine. vLLM is imported late.

vLLM never answers a call if its engine process dies meanwhile. `call_engine` raises `BackendDown` instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from poise.errors import BackendDown, PoiseError
from poise.generation.engines.vllm.lora import adapter_request
from poise.generation.weights.process_group import GroupPayload, wait_for_payload

logger = logging.getLogger(__name__)

_CHECK_ALIVE_S = 1.0
"""How often a waiting call checks that the engine is alive."""
_POLL_S = 0.02

Response = TypeVar("Response")


async def call_engine(engine: Any, call: Coroutine[Any, Any, Response]) -> Response:
    """Return the result of a call to an `AsyncLLM`, or raise its error.

    Raises:
        BackendDown: the engine died before it answered.
    """
    task = asyncio.create_task(call)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_CHECK_ALIVE_S)
            if not task.done() and engine.errored:
                raise BackendDown("vLLM died")
    finally:
        task.cancel()
    return task.result()


async def call_workers(engine: Any, method: str, *args: Any) -> list[Any]:
    """Call a method of the `PoiseWorker`s of an `AsyncLLM`. Return the result of each rank; see `call_engine`."""
    return await call_engine(engine, engine.collective_rpc(method, args=args))


async def receive_payload(engine: Any, payload: GroupPayload) -> None:
    """Receive a payload in the first worker, which has the device.

    Raises:
        BackendDown: the payload did not arrive, or the worker failed.
    """

    async def outcome() -> str | None:
        result: str | None = (await call_workers(engine, "poise_receive_outcome"))[0]
        return result

    async def abort() -> None:
        if not engine.errored:
            await call_workers(engine, "poise_abort_receive")

    group = payload.rendezvous
    fields = (group.backend, group.key, list(payload.part_bytes), payload.header, str(payload.path), payload.timeout_s)
    try:
        await call_workers(engine, "poise_receive_payload", *fields)
        await wait_for_payload(outcome, abort, payload.timeout_s)
    except PoiseError:
        raise
    except Exception as error:
        raise BackendDown(f"vLLM cannot receive the payload of the push: {error}") from error


async def prepare_weights(engine: Any, weights: Path, last_obstacle: str) -> str:
    """Prepare new weights in the workers while sampling continues.

    Returns why the workers cannot, or an empty string. Logs it if it differs from `last_obstacle`, because the
    workers' own logs are hidden.

    Raises:
        BackendDown: vLLM does not answer.
    """
    try:
        level, obstacle = (await call_workers(engine, "poise_prepare_weights", str(weights)))[0]
        while any(await call_workers(engine, "poise_is_preparing")):  # noqa: ASYNC110 (in other processes)
            await asyncio.sleep(_POLL_S)
    except Exception as error:
        raise BackendDown(f"vLLM cannot prepare new weights: {error}") from error
    if obstacle and obstacle != last_obstacle:
        logger.log(
            level, "generation pauses while new weights load, because they cannot be prepared beforehand: %s", obstacle
        )
    return str(obstacle)


async def load_weights(engine: Any, weights: Path, policy_version: int) -> None:
    """Replace the weights. Sampling must be paused. Raises vLLM's errors."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await engine.start_weight_update()
    await engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
    await engine.finish_weight_update(weight_version=str(policy_version))


async def load_adapter(engine: Any, folder: Path, policy_version: int) -> None:
    """Replace the adapter. Sampling must be paused. Raises vLLM's errors."""
    if not await engine.add_lora(adapter_request(folder)):
        raise RuntimeError("vLLM rejected the adapter")
    await engine.update_weight_version(str(policy_version))
