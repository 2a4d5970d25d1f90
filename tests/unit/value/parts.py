"""The service's parts put together over a queue in memory, to be run, crashed and started again by tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from poise.queue.memory_queue import MemoryQueue, MemoryStream
from poise.value.config import ValueConfig
from poise.value.consumer import LabelConsumer
from poise.value.estimator import BaselineEstimator
from poise.value.label_barrier import Changes, Settling
from poise.value.metrics import ValueMetrics
from poise.value.probe.features import LabelledRows
from poise.value.probe.model import FittedProbe
from poise.value.store.folder import StateStore
from poise.value.store.pieces import join, split
from poise.value.store.saver import StateKeeper
from poise.value.store.snapshot import Snapshot
from poise.value.updater import Refitter

TIMEOUT_S = 30.0


class MeanFitter:
    """Answers the mean reward of what it was fitted on: enough to tell fits apart."""

    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        rewards = [reward for group in groups for reward in group.rewards.tolist()]
        return FittedProbe({}, sum(rewards) / len(rewards))


class HeldFitter(MeanFitter):
    """Waits in its thread until let go."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.sizes: list[int] = []
        self.go = threading.Semaphore(0)

    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        self.num_begun += 1
        self.sizes.append(len(groups))
        assert self.go.acquire(timeout=TIMEOUT_S)
        return super().fit(groups)


class FailingFitter(MeanFitter):
    """Fails for no reason that lies in the rows."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_fits = 0

    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        self.num_fits += 1
        if self.num_fits <= self.num_failures:
            raise RuntimeError("no more threads")
        return super().fit(groups)


class PickyFitter(MeanFitter):
    """Cannot fit some groups; or, where `together`, not those in one fit."""

    def __init__(self, unfit: Sequence[str], *, together: bool = False) -> None:
        self._unfit = set(unfit)
        self._together = together

    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        found = self._unfit & {group.group_id for group in groups}
        if found and (not self._together or found == self._unfit):
            raise ArithmeticError("the fit gave parameters that are not finite")
        return super().fit(groups)


class Parts:
    """One life of the service on a state folder and a stream that outlive it."""

    def __init__(
        self,
        config: ValueConfig,
        stream: MemoryStream,
        make_fitter: Callable[[], MeanFitter] = MeanFitter,
    ) -> None:
        self.config = config
        self.store = StateStore(Path(config.state_dir))
        self.estimator = BaselineEstimator(config, self.store.open())
        self.given_up: list[str] = []
        self.metrics = ValueMetrics(CollectorRegistry())
        self.keeper = StateKeeper(self.estimator, self.store, self.metrics, self.given_up.append)
        self.queue = MemoryQueue(stream, "consumer")
        self.changes = changes = Changes()
        self.refitter = Refitter(self.estimator, make_fitter, self.keeper, self.queue, self.metrics, changes)
        self.consumer = LabelConsumer(
            self.queue, self.estimator, self.keeper, self.refitter, config.queue, self.metrics, changes
        )
        self.settling = Settling(self.queue, self.estimator, self.consumer, self.refitter, changes)

    @contextlib.contextmanager
    def alive(self) -> Iterator[Parts]:
        try:
            yield self
        finally:
            self.store.close()

    async def consume_until(self, condition: Callable[[], bool]) -> None:
        """Run the consumer until `condition`, then stop it. What it raises is raised."""
        running = asyncio.create_task(self.consumer.run())
        try:
            await until(lambda: running.done() or condition())
        finally:
            self.consumer.stop()
            await running

    async def refit_until(self, condition: Callable[[], bool]) -> None:
        """The same of the refitter."""
        running = asyncio.create_task(self.refitter.run())
        try:
            await until(lambda: running.done() or condition())
        finally:
            self.refitter.stop()
            await running


def stored(snapshot: Snapshot) -> Snapshot:
    """The snapshot as it comes back from its written form."""
    document, pieces = split(snapshot, None)
    return join(json.loads(json.dumps(document)), {name: encode() for name, encode in pieces.items()})


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        await asyncio.sleep(0.005)
