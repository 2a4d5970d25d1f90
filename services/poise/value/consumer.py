"""Feeds the labels from the queue to the estimator, so that each is learnt once and none is lost.

Owns the order: learn, make durable, only then acknowledge. A crash in between means that entries come again, and the
ledger tells that they were learnt. Poison goes to the dead letters and never stops the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time

from poise.errors import InvalidRequest, PoiseError, QueueFull
from poise.queue.interface import Delivery, LabelQueue, QueueDepth, newer_entry
from poise.runtime.repeat_log import RepeatLog
from poise.value.config import QueueConfig
from poise.value.dedup import Admission
from poise.value.estimator import BaselineEstimator
from poise.value.label_barrier import Changes
from poise.value.messages import parse_label
from poise.value.metrics import ValueMetrics
from poise.value.store.saver import StateKeeper
from poise.value.updater import Refitter

logger = logging.getLogger(__name__)

_READ_WAIT_S = 0.5
"""How long a read of an empty queue waits: also how soon a stop is noticed."""

_MAX_REASON = 1000
"""Characters kept of why an entry is poison."""

_MAX_LOGGED = 200
"""Characters of the reason that are logged; the dead letter has the rest."""

_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0

_LOSS_SHOWN_S = 60.0
"""How long readiness reports lost labels. They cannot be restored, and new ones are consumed all the time."""


class LabelConsumer:
    """One loop over the queue."""

    def __init__(
        self,
        queue: LabelQueue,
        estimator: BaselineEstimator,
        keeper: StateKeeper,
        refitter: Refitter,
        config: QueueConfig,
        metrics: ValueMetrics,
        changes: Changes,
    ) -> None:
        self._queue = queue
        self._estimator = estimator
        self._keeper = keeper
        self._refitter = refitter
        self._config = config
        self._metrics = metrics
        self._changes = changes
        self._stopping = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._repeats = RepeatLog(logger)
        self._problem = "the label queue has not been reached yet"
        self._lost_s = -_LOSS_SHOWN_S
        self.depth = QueueDepth(0, 0)
        """Of the queue, as last seen."""
        self._learnt: list[str] = []
        self._fresh: list[tuple[str, float]] = []
        """Domain and time of publishing of the labels that are new and not durable yet."""
        self._poison: list[tuple[Delivery, str]] = []

    @property
    def problem(self) -> str:
        """Why labels cannot be consumed or published, or which were lost in the last minute; empty if neither."""
        is_loss_recent = time.monotonic() - self._lost_s < _LOSS_SHOWN_S
        return self._problem or self.depth.problem or (self.depth.last_loss if is_loss_recent else "")

    @property
    def paused(self) -> bool:
        """Whether consumption is paused."""
        return not self._running.is_set()

    @property
    def halted(self) -> bool:
        """Whether consumption is paused, or stopped for good."""
        return self.paused or self._stopping.is_set()

    def pause(self) -> None:
        """Consume nothing until `resume`. What a read in progress still brings is held."""
        self._running.clear()
        self._changes.tell()

    def resume(self) -> None:
        """Consume again."""
        self._running.set()

    def stop(self) -> None:
        """End `run` after the batch in hand."""
        self._stopping.set()
        self._running.set()
        self._changes.tell()

    async def run(self) -> None:
        """Consume until stopped, over any trouble."""
        retry_s = _FIRST_RETRY_S
        while not self._stopping.is_set():
            try:
                self._report(await self._turn())
                retry_s = _FIRST_RETRY_S
            except Exception as error:
                self._report(_describe(error), None if isinstance(error, PoiseError | OSError) else error)
                self._changes.tell()
                await _wait(self._stopping, retry_s * random.uniform(0.5, 1.0))  # noqa: S311
                retry_s = min(2 * retry_s, _LAST_RETRY_S)

    def _report(self, problem: str, defect: Exception | None = None) -> None:
        """Log changes only: a queue that is down for an hour is one line."""
        if problem and problem != self._problem:
            logger.error("labels are not consumed: %s", problem, exc_info=defect)
        elif self._problem and not problem:
            logger.info("labels can be consumed")
        self._problem = problem

    def _observe(self, depth: QueueDepth) -> None:
        """Keep the queue's state, and log new warnings, problems and losses."""
        before, self.depth = self.depth, depth
        for warning in depth.warnings:
            if warning not in before.warnings:
                logger.warning("the label queue: %s", warning)
        if depth.problem and depth.problem != before.problem:
            logger.error("no label can be published: %s", depth.problem)
        if depth.num_losses > before.num_losses:
            logger.error("%s; training continues without them", depth.last_loss)
            self._lost_s = time.monotonic()
            self._estimator.newest_entry = ""  # it belonged to the lost stream

    async def _turn(self) -> str:
        """Consume a batch; return a problem that did not prevent it, or an empty text."""
        await self._settle()  # what an earlier turn could not
        await self._pass_pause()
        if self._stopping.is_set():
            return ""
        deliveries = await self._queue.read(max_entries=self._config.batch_entries, wait_s=_READ_WAIT_S)
        await self._pass_pause()  # paused while the read waited: what came is held
        for delivery in deliveries:
            await asyncio.sleep(0)  # questions that wait are answered between two labels
            reason = self._learn(delivery)
            if reason is None:
                self._learnt.append(delivery.entry_id)
            else:
                shown = reason if len(reason) <= _MAX_LOGGED else reason[:_MAX_LOGGED] + "…"
                self._repeats.log(logging.WARNING, f"label entry {delivery.entry_id} is dead-lettered: {shown}")
                self._poison.append((delivery, reason[:_MAX_REASON]))
        problem = await self._settle()
        self._changes.tell()
        self._observe(await self._queue.depth())
        return problem

    async def _pass_pause(self) -> None:
        """Wait until resumed, watching the queue meanwhile."""
        while self.paused:
            self._observe(await self._queue.depth())
            self._report("")
            await _wait(self._running, _READ_WAIT_S)

    async def _settle(self) -> str:
        """Acknowledge learnt entries and dead-letter poison; return why some of the poison is kept for a later try.

        A failure halfway forgets nothing. A server without memory for dead letters does not stop consumption, which
        frees memory; more than a batch of poison does.
        """
        if self._learnt:
            for entry_id in self._learnt:
                self._estimator.newest_entry = newer_entry(self._estimator.newest_entry, entry_id)
            # Even for duplicates alone: they may have been learnt in this life and not be durable yet.
            await self._keeper.keep()
            self._tell_lag()
            self._refitter.wake()
            await self._queue.ack(self._learnt)
            self._learnt = []
        while self._poison:
            try:
                await self._queue.dead_letter(*self._poison[0])
            except QueueFull as error:
                if len(self._poison) > self._config.batch_entries:
                    raise
                return f"{len(self._poison)} rejected labels cannot be dead-lettered yet: {_describe(error)}"
            del self._poison[0]
        return ""

    def _tell_lag(self) -> None:
        now_s = time.time()
        for domain, published_s in self._fresh:
            lag_s = max(0.0, now_s - published_s)  # another clock than ours may be ahead
            self._estimator.domains[domain].label_lag_s = lag_s
            self._metrics.label_lag.labels(domain).observe(lag_s)
        self._fresh = []

    def _learn(self, delivery: Delivery) -> str | None:
        """Learn from one entry; returns why it is poison, or None."""
        try:
            label = parse_label(delivery.payload, self._config.max_entry_bytes)
        except InvalidRequest as error:
            return error.message
        except Exception:
            # A defect of ours that this entry meets every time: it must not stop those behind it.
            logger.exception("label entry %s cannot be read", delivery.entry_id)
            return "a defect in reading it; the log holds the traceback"
        refusal = self._estimator.refusal(label.domain, label.rows.width) or self._estimator.dissent(label)
        if refusal is not None:
            return f"group.{refusal.field}: {refusal.description}"
        admission = self._estimator.learn(label)
        if admission is Admission.TOO_OLD:
            return f"step {label.step} of run {label.run_id!r} is older than the deduplication horizon"
        if admission is Admission.NEW:
            self._fresh.append((label.domain, delivery.published_s))
        return None


async def _wait(event: asyncio.Event, at_most_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), at_most_s)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
