"""Steps on their way to the learner: begun some steps ahead of it, sampled one after the other, taken in order.

Owns what is in hand between sampling and training. Knows neither services nor files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from poise.orchestrator.storage.step_journal import JournalledStep

SampleStep = Callable[[int, int, int], Awaitable[JournalledStep]]
"""Samples and journals a step. Takes the step, the least policy version, and how many steps it is ahead."""


class Pipeline:
    """Steps in hand. The same step is begun once."""

    def __init__(self, sample: SampleStep, pending: Mapping[int, JournalledStep]) -> None:
        """Begin with `pending`, the steps that an earlier process sampled."""
        self._sample = sample
        self._pending = dict(pending)
        self._tasks: dict[int, asyncio.Task[JournalledStep]] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._pending or step in self._tasks

    def begin(self, steps: range, policy_version: int) -> None:
        """Have `steps` sampled, those that are not in hand yet, from `policy_version` or newer.

        `steps` begins with the one that the learner is to get next: the others are sampled ahead of it.
        """
        for step in steps:
            if step not in self:
                before = self._tasks.get(step - 1)
                self._tasks[step] = asyncio.create_task(
                    self._sample_after(before, step, policy_version, step - steps.start), name=f"sample-{step}"
                )

    async def take(self, step: int) -> JournalledStep:
        """Return a step that was begun, as soon as it is journalled, and let go of it. Raises what sampling raised."""
        if step in self._pending:
            return self._pending.pop(step)
        journalled = await self._tasks[step]
        del self._tasks[step]
        return journalled

    async def settle(self) -> None:
        """Return when nothing is being sampled. What went wrong is told when the step is taken."""
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def close(self) -> None:
        """Give up what is being sampled. What is journalled is there when the run goes on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _sample_after(
        self, before: asyncio.Task[JournalledStep] | None, step: int, policy_version: int, num_ahead: int
    ) -> JournalledStep:
        if before is not None:
            await asyncio.wait([before])
            if before.cancelled() or before.exception() is not None:
                raise asyncio.CancelledError  # journals have no gaps, and what went wrong is told with that step
        return await self._sample(step, policy_version, num_ahead)
