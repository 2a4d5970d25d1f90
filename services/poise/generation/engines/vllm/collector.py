"""Fetches the records of finished rollouts from the worker, and frees those of aborted rollouts.

The worker responds after its current step. Requests that arrive meanwhile are sent together in the next call.
"""

from __future__ import annotations

import asyncio
from typing import Any

from poise.algorithms.features import Span
from poise.errors import BackendDown
from poise.generation.engines.vllm.recorder import Record
from poise.generation.engines.vllm.worker_client import call_workers


class Collector:
    """Calls `poise_collect`, one call at a time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._wanted: list[tuple[tuple[str, int, int, int], asyncio.Future[Record | None]]] = []
        self._dropped: list[tuple[str, asyncio.Future[Record | None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def collect(self, rollout_id: str, num_tokens: int, window: Span) -> Record | None:
        """Return a finished rollout's record and free it in the worker; see `Recorder.collect`."""
        done = self._future()
        self._wanted.append(((rollout_id, num_tokens, window.start, window.end), done))
        return await done

    async def drop(self, rollout_id: str) -> None:
        """Free a rollout's record in the worker."""
        done = self._future()
        self._dropped.append((rollout_id, done))
        await done

    def _future(self) -> asyncio.Future[Record | None]:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="collector")
        return asyncio.get_running_loop().create_future()

    async def _run(self) -> None:
        while self._wanted or self._dropped:
            wanted, self._wanted = self._wanted, []
            dropped, self._dropped = self._dropped, []
            waiting = [done for _, done in (*wanted, *dropped)]
            try:
                rollouts = ([rollout for rollout, _ in wanted], [rollout for rollout, _ in dropped])
                ranks = await call_workers(self._engine, "poise_collect", *rollouts)
                records = next(records for records in ranks if records is not None)
            except Exception as error:
                down = BackendDown(f"the records of finished rollouts cannot be fetched from vLLM: {error}")
                _resolve(waiting, [down] * len(waiting))
            else:
                _resolve(waiting, [*records, *[None] * len(dropped)])
        self._task = None


def _resolve(waiting: list[asyncio.Future[Record | None]], outcomes: list[Any]) -> None:
    for done, outcome in zip(waiting, outcomes, strict=True):
        if done.done():  # the caller was cancelled
            continue
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
