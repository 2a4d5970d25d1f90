"""Receiving bodies of pushes in vLLM's first worker, which has the device: told and asked from the server's process."""

from __future__ import annotations

from typing import Any

from poise.errors import BackendDown, PoiseError
from poise.generation.engines.vllm.worker_calls import ask_workers
from poise.generation.weights.payload import Body, wait_for_body


class WorkerReceiver:
    """Of an `AsyncLLM` whose workers are `PoiseWorker`s."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def backend(self) -> str:
        """Return of which groups the worker can be a member."""
        backend: str = (await ask_workers(self._engine, "poise_group_backend"))[0]
        return backend

    async def receive(self, body: Body) -> None:
        """See `Engine`. Raises `BackendDown` whatever goes wrong in the worker."""
        met = body.rendezvous
        told = (met.backend, met.key, list(body.part_bytes), body.header, str(body.path), body.timeout_s)
        try:
            await ask_workers(self._engine, "poise_receive", *told)
            await wait_for_body(self._ask, self._abandon, body.timeout_s)
        except PoiseError:
            raise
        except Exception as error:
            raise BackendDown(f"vLLM cannot receive: {error}") from error

    async def _ask(self) -> str | None:
        outcome: str | None = (await ask_workers(self._engine, "poise_received"))[0]
        return outcome

    async def _abandon(self) -> None:
        if not self._engine.errored:
            await ask_workers(self._engine, "poise_abandon")
