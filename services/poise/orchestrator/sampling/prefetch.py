"""Samples steps ahead of the learner, one at a time and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from poise.orchestrator.storage.step_journal import JournalledStep

SampleStep = Callable[[int, int, int], Awaitable[JournalledStep]]
"""Samples and journals a step. Takes the step, the minimum policy version, and the number of steps it is ahead."""


class Prefetcher:
    """Steps that are being sampled, or sampled but not yet trained on."""

    def __init__(self, sample: SampleStep, pending: Mapping[int, JournalledStep]) -> None:
        """Start with `pending`, the steps that an earlier process sampled."""
        self._sample = sample
        self._pending = dict(pending)
        self._tasks: dict[int, asyncio.Task[JournalledStep]] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._pending or step in self._tasks

    def start(self, steps: range, policy_version: int) -> None:
        """Start sampling the steps that were not started yet, from `policy_version` or newer.

        The learner trains on the first of `steps` next; the others are ahead of it.
        """
        for step in steps:
            if step not in self:
                before = self._tasks.get(step - 1)
                self._tasks[step] = asyncio.create_task(
                    self._sample_after(before, step, policy_version, step - steps.start), name=f"sample-{step}"
                )

    async def take(self, step: int) -> JournalledStep:
        """Wait for a started step, remove and return it. Raises the error of its sampling."""
        if step in self._pending:
            return self._pending.pop(step)
        journalled = await self._tasks[step]
        del self._tasks[step]
        return journalled

    async def drain(self) -> None:
        """Wait until no step is being sampled. Errors are raised by `take`."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def close(self) -> None:
        """Cancel sampling. Journalled steps stay on disk for the next process."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _sample_after(
        self, before: asyncio.Task[JournalledStep] | None, step: int, policy_version: int, num_ahead: int
    ) -> JournalledStep:
        if before is not None:
            await asyncio.wait([before])
            if before.cancelled() or before.exception() is not None:
                raise asyncio.CancelledError  # the journal must have no gaps; `take` of that step raises its error
        return await self._sample(step, policy_version, num_ahead)
