"""Waiting until the probes know every label that was published before a question.

Which probe a step is pinned to then follows from the labels alone, and not from how fast consuming and fitting went.
Owns the waiting, which starts nothing: whoever stops waiting leaves nothing behind. Knows no protobuf and no pins.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from poise.errors import BackendDown
from poise.queue.interface import LabelQueue
from poise.value.estimator import BaselineEstimator


class Changes:
    """Tells all who wait that something has changed: look again."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Return what will be set at the next change. Take it before looking, and no change is missed."""
        return self._next

    def tell(self) -> None:
        """Something has changed."""
        event, self._next = self._next, asyncio.Event()
        event.set()


class Consumer(Protocol):
    """Whoever takes labels out of the queue."""

    @property
    def halted(self) -> bool:
        """Whether it takes none, by intention."""
        ...


class Refitter(Protocol):
    """Whoever fits probes."""

    def gives_up(self, name: str) -> bool:
        """Whether no fit is to come of the labels that a domain holds now."""
        ...


class Settling:
    """One service's. `changes` tells of every entry that left the queue, every fit, and every halt."""

    def __init__(
        self,
        queue: LabelQueue,
        estimator: BaselineEstimator,
        consumer: Consumer,
        refitter: Refitter,
        changes: Changes,
    ) -> None:
        self._queue = queue
        self._estimator = estimator
        self._consumer = consumer
        self._refitter = refitter
        self._changes = changes

    async def settle(self, limit_s: float) -> bool:
        """Return whether all labels published so far are learnt, durable and fitted on: once they are, or cannot be
        soon, and in any case after `limit_s`.

        True holds until the caller yields. A queue that is out of reach may come back in time, and is waited for.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self._are_learnt() and await self._are_fitted_on()
        except TimeoutError:
            return False

    async def _are_learnt(self) -> bool:
        asked, newest = False, None
        while True:
            change = self._changes.next()
            try:
                if not asked:
                    newest, asked = await self._queue.newest(), True
                if newest is None or not await self._queue.holds(newest):
                    return True
            except BackendDown:
                pass  # the consumer says so, and tries again
            if self._consumer.halted:
                return False
            await change.wait()

    async def _are_fitted_on(self) -> bool:
        # Not those that come meanwhile, or labels of other runs could keep this one waiting.
        wanted = {name: domain.window.num_added for name, domain in self._estimator.domains.items()}
        while True:
            change = self._changes.next()
            behind = [name for name, num_added in wanted.items() if self._estimator.is_due(name, num_added)]
            if not behind:
                return True
            if all(self._refitter.gives_up(name) for name in behind):
                return False
            await change.wait()
