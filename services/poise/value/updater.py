"""Refits probes when their domains hold labels they have not seen, in a thread beside queries.

Labels that arrive during a fit are covered by the next one together. A fit works on groups that were on the ledger
when it began, so what it gives has seen no label of a step that can still be pinned. Groups that make a fit fail become
dead letters.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from poise.errors import PoiseError
from poise.queue.interface import Delivery, LabelQueue
from poise.runtime.repeat_log import RepeatLog
from poise.value.estimator import BaselineEstimator
from poise.value.label_barrier import Changes
from poise.value.messages import label_payload
from poise.value.metrics import ValueMetrics
from poise.value.probe.features import LabelledRows
from poise.value.probe.model import FittedProbe, ProbeFitter
from poise.value.probe.unfit_groups import UNFIT, unfit_groups
from poise.value.probe.window import Window
from poise.value.step_probes import VersionedProbe
from poise.value.store.saver import StateKeeper

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
"""Pause after a probe could not be stored or a dead letter not be sent."""

_NO_ENTRY = "0-0"
"""Id given for the queue entry of a learnt group, which was deleted when it was acknowledged."""


class Refitter:
    """One loop, one fit at a time."""

    def __init__(
        self,
        estimator: BaselineEstimator,
        make_fitter: Callable[[], ProbeFitter],
        keeper: StateKeeper,
        queue: LabelQueue,
        metrics: ValueMetrics,
        changes: Changes,
    ) -> None:
        self._queue = queue
        self._repeats = RepeatLog(logger)
        self._estimator = estimator
        self._make_fitter = make_fitter
        self._fitters: dict[str, ProbeFitter] = {}
        self._keeper = keeper
        self._metrics = metrics
        self._changes = changes
        self._wake = asyncio.Event()
        self._wake.set()  # a restored state may be due
        self._stopping = asyncio.Event()
        self._failed_at: dict[str, int] = {}

    def wake(self) -> None:
        """Look for domains that are due."""
        self._wake.set()

    def stop(self) -> None:
        """End `run` after the fit in hand."""
        self._stopping.set()
        self._wake.set()
        self._changes.tell()

    async def run(self) -> None:
        """Refit whatever is due, until stopped."""
        while not self._stopping.is_set():
            await self._wake.wait()
            self._wake.clear()
            for name in sorted(self._estimator.domains):
                if self._stopping.is_set():
                    return
                if self._estimator.is_due(name) and self._is_new_since_failure(name):
                    await self._refit(name)
                    self._changes.tell()

    def gives_up(self, name: str) -> bool:
        """Whether no fit is to come of the labels that a domain holds now: these have failed, or it is stopping."""
        return self._stopping.is_set() or not self._is_new_since_failure(name)

    def _is_new_since_failure(self, name: str) -> bool:
        """The same rows would fail again."""
        return self._estimator.domains[name].window.num_added > self._failed_at.get(name, 0)

    async def _refit(self, name: str) -> None:
        window, before = self._estimator.domains[name].window, self._estimator.probes.get(name)
        num_added = window.num_added
        started_s = time.perf_counter()
        try:
            probe = await self._fit(name, window)
            fit_s = time.perf_counter() - started_s
            if probe is None or self._estimator.domains[name].window is not window:
                return  # the window was replaced meanwhile, by another width or without unfit groups
            version = before.version + 1 if before else 1
            await self._keeper.install(name, VersionedProbe(version, probe, num_added, fit_s))
        except (OSError, PoiseError) as error:
            if isinstance(error, PoiseError):  # the keeper logs an OSError
                self._repeats.log(logging.ERROR, f"groups that cannot be fitted could not be dead-lettered: {error}")
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)
        except Exception as error:
            # A failed fit must not end the service: the previous probe answers, and the next labels may help.
            self._repeats.log(logging.ERROR, f"the probe of domain {name!r} could not be fitted: {error!r}", error)
            self._metrics.fit_failures.labels(name).inc()
            self._failed_at[name] = num_added
        else:
            self._metrics.fit_seconds.labels(name).observe(fit_s)
            logger.info("probe of domain %r: version %d in %.2f s", name, version, fit_s)

    async def _fit(self, name: str, window: Window) -> FittedProbe | None:
        """Return the probe of a window; None if groups were expelled instead, after which the window is due again.

        Raises:
            ArithmeticError, ValueError: it cannot be fitted, even without a few groups.
            OSError, PoiseError: the unfit groups cannot be dead-lettered now.
        """
        if name not in self._fitters:
            self._fitters[name] = self._make_fitter()
        groups = window.groups
        try:
            return await asyncio.to_thread(self._fitters[name].fit, groups)
        except UNFIT as error:
            unfit = await asyncio.to_thread(unfit_groups, groups, self._can_be_fitted)
            if not unfit:  # the cause was state of earlier fits, which the fitter has dropped
                return await asyncio.to_thread(self._fitters[name].fit, groups)
            if 2 * len(unfit) > len(groups):
                raise
            await self._expel(name, unfit, error)
            return None

    def _can_be_fitted(self, groups: Sequence[LabelledRows]) -> bool:
        try:
            self._make_fitter().fit(groups)
        except UNFIT:
            return False
        return True

    async def _expel(self, name: str, unfit: Sequence[LabelledRows], error: Exception) -> None:
        """Dead-letter learnt groups, then remove them from the window. A crash in between only sends them twice."""
        for group in unfit:
            delivery = Delivery(_NO_ENTRY, label_payload(group), time.time())
            await self._queue.dead_letter(delivery, f"was learnt, but no probe can be fitted with it: {error}")
        self._estimator.expel(name, unfit)
        await self._keeper.keep()
        self._repeats.log(
            logging.WARNING,
            f"{len(unfit)} groups of domain {name!r} are dead-lettered: no probe can be fitted with them: {error}",
        )
        self._wake.set()
