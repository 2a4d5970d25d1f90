"""The update loop: consumes labels, learns them, saves the state, acknowledges them, and fits estimators.

A label is acknowledged only after it is saved. If the service dies in between, the label is delivered again and
recognised as a duplicate. A label that cannot be learnt goes to the dead letters and never blocks the others.

Fits run in a thread, so queries are answered meanwhile. Labels that arrive during a fit are part of the next one. A
fitted probe is saved before it answers, so a version never names two probes. Groups that make a fit fail go to the dead
letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from poise.errors import InvalidRequest, PoiseError, QueueFull
from poise.queue.interface import Delivery, LabelQueue, QueueDepth, newer_entry
from poise.runtime.repeat_log import RepeatLog
from poise.value.config import QueueConfig
from poise.value.dedup import Admission
from poise.value.estimators.features import Label
from poise.value.estimators.interface import Fitted, Fitter
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.estimators.unfit_groups import FIT_ERRORS, unfit_groups
from poise.value.estimators.window import Window
from poise.value.messages import label_payload, parse_label
from poise.value.metrics import ValueMetrics
from poise.value.state import ValueState
from poise.value.store import StateLostError, StateStore

logger = logging.getLogger(__name__)

READ_WAIT_S = 0.5
"""How long a read of an empty queue blocks, s. A stop may take this much longer."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0
"""First and longest pause after a failed turn, s. The pause doubles with each failure."""

FIT_RETRY_S = 5.0
"""Pause before the next fit if a probe cannot be saved or a group cannot be dead-lettered, s."""

LOSS_SHOWN_S = 60.0
"""How long readiness reports lost labels, s. They cannot be restored, and new ones are still consumed."""

_MAX_REASON = 1000
"""Maximum characters of a dead letter's reason."""

_MAX_LOGGED = 200
"""Maximum characters of the reason in the log."""

_NO_ENTRY = "0-0"
"""Entry id of a dead letter whose queue entry was already acknowledged."""


class Updater:
    """The loop, and the only writer of the estimator's state."""

    def __init__(
        self,
        config: QueueConfig,
        state: ValueState,
        queue: LabelQueue,
        store: StateStore,
        make_fitter: Callable[[str], Fitter],
        metrics: ValueMetrics,
        fail: Callable[[str], None],
    ) -> None:
        """Prepare the loop. `fail` ends the service; it is called if another process takes over the state folder."""
        self.state = state
        self.queue = queue
        self.depth = QueueDepth(0, 0)
        """The queue's last known sizes."""
        self._config = config
        self._store = store
        self._make_fitter = make_fitter
        self._metrics = metrics
        self._fail = fail
        self._repeats = RepeatLog(logger)
        self._stopping = asyncio.Event()
        self._not_paused = asyncio.Event()
        self._not_paused.set()
        self._change = asyncio.Event()

        self._learnt: list[str] = []
        """Entries to acknowledge once the state is saved."""
        self._new: list[tuple[str, float]] = []
        """Domain and publishing time of new labels that are not saved yet."""
        self._rejected: list[tuple[Delivery, str]] = []
        """Entries to dead-letter, with the reasons."""
        self._queue_problem = "the label queue has not been reached yet"
        self._lost_s = -LOSS_SHOWN_S

        self._saving = asyncio.Lock()
        self._save_problem = ""

        self._fitters: dict[str, Fitter] = {}
        self._fits: asyncio.Task[None] | None = None
        self._fits_requested = False
        self._failed_at: dict[str, int] = {}
        """`Window.num_added` of each domain's failed fit."""

    @property
    def problem(self) -> str:
        """Why labels cannot be saved, consumed or published, or which were lost in the last minute; empty if none."""
        is_loss_recent = time.monotonic() - self._lost_s < LOSS_SHOWN_S
        lost = self.depth.last_loss if is_loss_recent else ""
        return self._save_problem or self._queue_problem or self.depth.problem or lost

    @property
    def paused(self) -> bool:
        """Whether consumption is paused."""
        return not self._not_paused.is_set()

    @property
    def halted(self) -> bool:
        """Whether consumption is paused or stopped."""
        return self.paused or self._stopping.is_set()

    def pause(self) -> None:
        """Stop consuming until `resume`. A read in progress may still return labels; they wait too."""
        self._not_paused.clear()
        self._notify()

    def resume(self) -> None:
        """Consume again."""
        self._not_paused.set()

    def stop(self) -> None:
        """End `run` after the current batch and the current fit."""
        self._stopping.set()
        self._not_paused.set()
        self._notify()

    def next_change(self) -> asyncio.Event:
        """Return an event that is set when entries leave the queue, a fit ends, or consumption or fitting halts.

        Get it before checking a condition, so that no change is missed.
        """
        return self._change

    def _notify(self) -> None:
        event, self._change = self._change, asyncio.Event()
        event.set()

    async def run(self) -> None:
        """Consume until stopped. After an error, report it, pause and retry."""
        retry_s = FIRST_RETRY_S
        self.request_fits()  # a restored state may have labels that its probes have not seen
        try:
            while not self._stopping.is_set():
                try:
                    self._report(await self._turn())
                    retry_s = FIRST_RETRY_S
                except Exception as error:
                    if not isinstance(error, OSError):  # `save` reports these
                        self._report(_describe(error), None if isinstance(error, PoiseError) else error)
                    self._notify()
                    await _wait(self._stopping, retry_s * random.uniform(0.5, 1.0))  # noqa: S311
                    retry_s = min(2 * retry_s, LAST_RETRY_S)
            if self._fits is not None:
                await self._fits
        except BaseException:
            if self._fits is not None:
                self._fits.cancel()
            raise

    # Consume, learn, save, acknowledge.

    async def _turn(self) -> str:
        """Consume one batch. Return a problem that did not prevent it; empty if there was none."""
        await self._finish_batch()  # if an earlier turn failed
        await self._wait_while_paused()
        if self._stopping.is_set():
            return ""
        deliveries = await self.queue.read(max_entries=self._config.batch_entries, wait_s=READ_WAIT_S)
        await self._wait_while_paused()
        for delivery in deliveries:
            await asyncio.sleep(0)  # waiting requests are answered between two labels
            reason = self._learn(delivery)
            if reason is None:
                self._learnt.append(delivery.entry_id)
            else:
                shown = reason if len(reason) <= _MAX_LOGGED else reason[:_MAX_LOGGED] + "…"
                self._repeats.log(logging.WARNING, f"label entry {delivery.entry_id} goes to the dead letters: {shown}")
                self._rejected.append((delivery, reason[:_MAX_REASON]))
        problem = await self._finish_batch()
        self._notify()
        self._observe(await self.queue.depth())
        return problem

    async def _wait_while_paused(self) -> None:
        while self.paused:
            self._observe(await self.queue.depth())
            self._report("")
            await _wait(self._not_paused, READ_WAIT_S)

    def _learn(self, delivery: Delivery) -> str | None:
        """Learn one entry; return the reason if it must be rejected."""
        try:
            label = parse_label(delivery.payload, self._config.max_entry_bytes, self.state.configured)
        except InvalidRequest as error:
            return error.message
        except Exception:
            # This entry triggers a bug every time. It must not block later entries.
            logger.exception("label entry %s cannot be read", delivery.entry_id)
            return "reading it raised an unexpected error; the log has the traceback"
        rejection = self.state.rejection(label.domain, label.features.width) or self.state.width_vote(label)
        if rejection is not None:
            return f"group.{rejection.field}: {rejection.description}"
        admission = self.state.learn(label)
        if admission is Admission.TOO_OLD:
            return f"step {label.step} of run {label.run_id!r} is older than the deduplication horizon"
        if admission is Admission.NEW:
            self._new.append((label.domain, delivery.published_s))
        return None

    async def _finish_batch(self) -> str:
        """Save and acknowledge learnt entries, and dead-letter rejected ones.

        Returns why rejected entries must wait; empty if none do. If the server has no memory for dead letters,
        consumption continues, because it frees memory. It stops when more than a batch of rejected entries wait. After
        an error, the next call retries the rest.
        """
        if self._learnt:
            for entry_id in self._learnt:
                self.state.newest_entry = newer_entry(self.state.newest_entry, entry_id)
            # Also if all are duplicates: this process may have learnt them and failed to save them.
            await self.save()
            self._record_lag()
            self.request_fits()
            await self.queue.ack(self._learnt)
            self._learnt = []
        while self._rejected:
            try:
                await self.queue.dead_letter(*self._rejected[0])
            except QueueFull as error:
                if len(self._rejected) > self._config.batch_entries:
                    raise
                return f"{len(self._rejected)} rejected labels cannot be dead-lettered yet: {_describe(error)}"
            del self._rejected[0]
        return ""

    def _record_lag(self) -> None:
        now_s = time.time()
        for domain, published_s in self._new:
            lag_s = max(0.0, now_s - published_s)  # the queue's clock may be ahead of ours
            self.state.domains[domain].label_lag_s = lag_s
            self._metrics.label_lag.labels(domain).observe(lag_s)
        self._new = []

    def _report(self, problem: str, bug: Exception | None = None) -> None:
        """Store the current problem. Log only changes, so that a long outage is one line."""
        if problem and problem != self._queue_problem:
            logger.error("labels are not consumed: %s", problem, exc_info=bug)
        elif self._queue_problem and not problem:
            logger.info("labels can be consumed")
        self._queue_problem = problem

    def _observe(self, depth: QueueDepth) -> None:
        """Store the queue's sizes; log new warnings, problems and losses."""
        before, self.depth = self.depth, depth
        for warning in depth.warnings:
            if warning not in before.warnings:
                logger.warning("the label queue: %s", warning)
        if depth.problem and depth.problem != before.problem:
            logger.error("no label can be published: %s", depth.problem)
        if depth.num_losses > before.num_losses:
            logger.error("%s; training continues without them", depth.last_loss)
            self._lost_s = time.monotonic()
            self.state.newest_entry = ""  # it belonged to the lost stream

    # Save.

    async def save(self, fitted: tuple[str, VersionedProbe] | None = None) -> Path:
        """Save the state, then install the fitted probe of a domain, if any. Returns the file.

        Raises:
            OSError: it could not be written. The domain's current probe continues to answer.
        """
        async with self._saving:
            snapshot = self.state.snapshot(fitted)
            started_s = time.perf_counter()
            try:
                path = await asyncio.to_thread(self._store.save, snapshot)
            except OSError as error:
                if not self._save_problem:
                    logger.error("the state cannot be saved, so labels stay in the queue: %s", error)
                self._save_problem = f"the state cannot be saved: {error}"
                if isinstance(error, StateLostError):
                    self._fail(str(error))
                raise
            self._save_problem = ""
            self._metrics.state_write_seconds.observe(time.perf_counter() - started_s)
            if fitted is not None:
                self.state.install(*fitted)
            return path

    # Fit.

    def request_fits(self) -> None:
        """Fit every domain that has new labels, in the background."""
        self._fits_requested = True
        if (self._fits is None or self._fits.done()) and not self._stopping.is_set():
            self._fits = asyncio.create_task(self._fit_all_due(), name="value-fits")

    def will_not_fit(self, name: str) -> bool:
        """Whether no fit of a domain's current labels will follow: a fit of them failed, or the service stops."""
        return self._stopping.is_set() or self.state.domains[name].window.num_added <= self._failed_at.get(name, 0)

    async def _fit_all_due(self) -> None:
        while self._fits_requested:
            self._fits_requested = False
            for name in sorted(self.state.domains):
                if self.state.is_due(name) and not self.will_not_fit(name):
                    await self._fit(name)
                    self._notify()

    async def _fit(self, name: str) -> None:
        """Fit a domain's probe, save it and install it."""
        domain = self.state.domains[name]
        window = domain.window
        num_added = window.num_added
        started_s = time.perf_counter()
        try:
            probe = await self._fit_in_thread(name, window)
            fit_s = time.perf_counter() - started_s
            if probe is None or domain.window is not window:
                return  # the window was replaced during the fit: another width, or unfit groups removed
            version = self.state.next_version(name)
            await self.save((name, VersionedProbe(version, probe, num_added, fit_s)))
        except (OSError, PoiseError) as error:
            if isinstance(error, PoiseError):  # `save` reports an OSError
                self._repeats.log(logging.ERROR, f"cannot write unfit groups to the dead letters: {error}")
            asyncio.get_running_loop().call_later(FIT_RETRY_S, self.request_fits)
        except Exception as error:
            # A failed fit must not end the service: the current probe answers, and the next labels may help.
            self._repeats.log(logging.ERROR, f"the estimator of domain {name!r} could not be fitted: {error!r}", error)
            self._metrics.fit_failures.labels(name).inc()
            self._failed_at[name] = num_added
        else:
            self._metrics.fit_seconds.labels(name).observe(fit_s)
            logger.info("probe of domain %r: version %d in %.2f s", name, version, fit_s)

    async def _fit_in_thread(self, name: str, window: Window) -> Fitted | None:
        """Return the probe of a window; None if unfit groups were removed instead, and the domain is due again.

        Raises:
            ArithmeticError, ValueError: the window cannot be fitted, even without a few of its groups.
            OSError, PoiseError: unfit groups could not be dead-lettered.
        """
        if name not in self._fitters:
            self._fitters[name] = self._make_fitter(name)
        fitter = self._fitters[name]
        groups = window.groups

        def can_be_fitted(some: Sequence[Label]) -> bool:
            try:
                self._make_fitter(name).fit(some)
            except FIT_ERRORS:
                return False
            return True

        try:
            return await asyncio.to_thread(fitter.fit, groups)
        except FIT_ERRORS as error:
            unfit = await asyncio.to_thread(unfit_groups, groups, can_be_fitted)
            if not unfit:  # the cause was the fitter's state from earlier fits, which it has dropped
                return await asyncio.to_thread(fitter.fit, groups)
            if 2 * len(unfit) > len(groups):
                raise
            await self._remove_unfit(name, unfit, error)
            return None

    async def _remove_unfit(self, name: str, unfit: Sequence[Label], error: Exception) -> None:
        """Dead-letter learnt groups, then remove them from the window. A crash in between dead-letters them twice."""
        for group in unfit:
            delivery = Delivery(_NO_ENTRY, label_payload(group), time.time())
            await self.queue.dead_letter(delivery, f"was learnt, but no estimator can be fitted with it: {error}")
        self.state.remove(name, unfit)
        await self.save()
        self._repeats.log(
            logging.WARNING,
            f"{len(unfit)} groups of domain {name!r} went to the dead letters, because fits with them fail: {error}",
        )
        self._fits_requested = True


async def _wait(event: asyncio.Event, at_most_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), at_most_s)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
