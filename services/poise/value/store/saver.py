"""Keeps the estimator's state on disk: one save at a time, beside queries.

Owns the order of things that must hold for a crash at any moment: a fitted probe is durable before it answers, so a
version never names two probes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from poise.value.estimator import BaselineEstimator
from poise.value.metrics import ValueMetrics
from poise.value.step_probes import VersionedProbe
from poise.value.store.folder import StateLostError, StateStore

logger = logging.getLogger(__name__)


class StateKeeper:
    """Saves snapshots in a thread."""

    def __init__(
        self,
        estimator: BaselineEstimator,
        store: StateStore,
        metrics: ValueMetrics,
        give_up: Callable[[str], None],
    ) -> None:
        """`give_up` ends the service when the folder is another's: two must not answer for one state."""
        self._give_up = give_up
        self._estimator = estimator
        self._store = store
        self._metrics = metrics
        self._saving = asyncio.Lock()
        self.problem = ""
        """Why the last save failed; empty while all is well."""

    async def keep(self) -> Path:
        """Make the state of now durable. Returns the file that committed it.

        Raises:
            OSError: it could not be written.
        """
        return await self._save({})

    async def install(self, domain: str, probe: VersionedProbe) -> None:
        """Make a fitted probe durable, then let it answer.

        Raises:
            OSError: it could not be written; the probe before goes on answering.
        """
        await self._save({domain: probe})

    async def _save(self, fitted: dict[str, VersionedProbe]) -> Path:
        async with self._saving:
            snapshot = self._estimator.snapshot(fitted)
            started_s = time.perf_counter()
            try:
                path = await asyncio.to_thread(self._store.save, snapshot)
            except OSError as error:
                if not self.problem:
                    logger.error("the state cannot be written, labels stay in the queue meanwhile: %s", error)
                self.problem = f"the state cannot be written: {error}"
                if isinstance(error, StateLostError):
                    self._give_up(str(error))
                raise
            self.problem = ""
            self._metrics.state_write_seconds.observe(time.perf_counter() - started_s)
            for domain, probe in fitted.items():
                self._estimator.install(domain, probe)
            return path
