"""Refits probes when their domains hold labels they have not seen, in a thread beside queries.

Labels that arrive during a fit are covered by the next one together. A fit works on groups that were on the ledger
when it began, so what it gives has seen no label of a step that can still be pinned.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from poise.value.estimator import BaselineEstimator
from poise.value.keeper import StateKeeper
from poise.value.metrics import ValueMetrics
from poise.value.pins import VersionedProbe
from poise.value.probe import ProbeFitter
from poise.value.settling import Changes

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
"""After a probe could not be made durable."""


class Refitter:
    """One loop, one fit at a time."""

    def __init__(
        self,
        estimator: BaselineEstimator,
        make_fitter: Callable[[], ProbeFitter],
        keeper: StateKeeper,
        metrics: ValueMetrics,
        changes: Changes,
    ) -> None:
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
        if name not in self._fitters:
            self._fitters[name] = self._make_fitter()
        started_s = time.perf_counter()
        try:
            probe = await asyncio.to_thread(self._fitters[name].fit, window.groups)
            fit_s = time.perf_counter() - started_s
            if self._estimator.domains[name].window is not window:
                return  # another width has won meanwhile: these rows are none of the domain's any more
            version = before.version + 1 if before else 1
            await self._keeper.install(name, VersionedProbe(version, probe, num_added, fit_s))
        except OSError:  # the keeper has said so
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)
        except Exception:
            # A fit must not end the service: the probe before goes on answering, and the next labels may mend it.
            logger.exception("the probe of domain %r could not be fitted", name)
            self._metrics.fit_failures.labels(name).inc()
            self._failed_at[name] = num_added
        else:
            self._metrics.fit_seconds.labels(name).observe(fit_s)
            logger.info("probe of domain %r: version %d in %.2f s", name, version, fit_s)
