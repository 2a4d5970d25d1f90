"""Waiting until a run's probes know every label that was published before a question.

Which probe a step is pinned to then follows from the labels alone, and not from how fast consuming and fitting went.
Owns the waiting, which starts nothing: whoever stops waiting leaves nothing behind. Knows no protobuf and no pins.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
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

    async def settle(self, run_id: str, asked: Collection[str], limit_s: float) -> frozenset[str] | None:
        """Return the domains that hold labels, of those published so far, which their probes have not seen; None where
        some of these labels are not learnt and durable, so that it could be any domain.

        Returns once no domain is waited for, or none can be fitted soon, and in any case after `limit_s`. Waited for
        are the domains `asked` about, and those that the run has taught: a question about them may be of the same step,
        and other runs' fits are no reason to wait. The answer holds until the caller yields. A queue that is out of
        reach may come back in time, and is waited for.
        """
        learnt: dict[str, int] | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                if not await self._are_learnt():
                    return None
                # Not those that come meanwhile, or labels of other runs could keep this one waiting.
                learnt = {name: domain.window.num_added for name, domain in self._estimator.domains.items()}
                own = {*asked, *self._estimator.taught_by(run_id)}
                await self._are_fitted_on({name: num_added for name, num_added in learnt.items() if name in own})
        return None if learnt is None else self._behind(learnt)

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

    async def _are_fitted_on(self, wanted: Mapping[str, int]) -> None:
        while True:
            change = self._changes.next()
            if all(self._refitter.gives_up(name) for name in self._behind(wanted)):
                return
            await change.wait()

    def _behind(self, wanted: Mapping[str, int]) -> frozenset[str]:
        """Return the domains whose probes have not seen the first so many groups of their windows."""
        return frozenset(name for name, num_added in wanted.items() if self._estimator.is_due(name, num_added))
