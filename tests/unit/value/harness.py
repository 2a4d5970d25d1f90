"""The updater with an in-memory queue, which tests run, crash and restart; and fitters that fail or wait."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.support.memory_queue import MemoryQueue, MemoryStream

from poise.value.config import ValueConfig
from poise.value.estimators.features import Label
from poise.value.estimators.probe.model import FittedProbe
from poise.value.metrics import ValueMetrics
from poise.value.state import ValueState
from poise.value.store import Snapshot, StateStore
from poise.value.updater import Updater
from poise_client.types import Estimator

TIMEOUT_S = 30.0


def always_probe(domain: str) -> Estimator:
    """Return the estimator of every domain."""
    return "probe"


class MeanFitter:
    """Predicts the mean reward of its groups: enough to distinguish fits."""

    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        rewards = [reward for group in groups for reward in group.rewards.tolist()]
        return FittedProbe({}, sum(rewards) / len(rewards))


class BlockedFitter(MeanFitter):
    """Waits in its thread until `go` is released."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.sizes: list[int] = []
        self.go = threading.Semaphore(0)

    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        self.num_begun += 1
        self.sizes.append(len(groups))
        assert self.go.acquire(timeout=TIMEOUT_S)
        return super().fit(groups)


class FailingFitter(MeanFitter):
    """Fails for a reason other than the rows."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_fits = 0

    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        self.num_fits += 1
        if self.num_fits <= self.num_failures:
            raise RuntimeError("no more threads")
        return super().fit(groups)


class PickyFitter(MeanFitter):
    """Cannot fit some groups; with `together`, it cannot fit all of them in one fit."""

    def __init__(self, unfit: Sequence[str], *, together: bool = False) -> None:
        self._unfit = set(unfit)
        self._together = together

    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        found = self._unfit & {group.group_id for group in groups}
        if found and (not self._together or found == self._unfit):
            raise ArithmeticError("the fit gave parameters that are not finite")
        return super().fit(groups)


class Harness:
    """One process lifetime of the updater, on a state folder and a stream that outlive it."""

    def __init__(
        self, config: ValueConfig, stream: MemoryStream, make_fitter: Callable[[], MeanFitter] = MeanFitter
    ) -> None:
        self.config = config
        self.store = StateStore(Path(config.state_dir))
        self.state = ValueState(config, self.store.open())
        self.failures: list[str] = []
        self.registry = CollectorRegistry()
        self.queue = MemoryQueue(stream, "consumer")
        metrics = ValueMetrics(self.registry)
        self.updater = Updater(
            config.queue, self.state, self.queue, self.store, lambda _: make_fitter(), metrics, self.failures.append
        )

    def fit_failures(self, domain: str = "default") -> float:
        return self.registry.get_sample_value("poise_value_fit_failures_total", {"domain": domain}) or 0.0

    @contextlib.contextmanager
    def opened(self) -> Iterator[Harness]:
        """Close the store after the block."""
        try:
            yield self
        finally:
            self.store.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Harness]:
        """Run the updater during the block, then close the store."""
        task = asyncio.create_task(self.updater.run())
        with self.opened():
            try:
                yield self
            finally:
                self.updater.stop()
                await asyncio.wait_for(task, TIMEOUT_S)

    async def run_until(self, condition: Callable[[], bool]) -> None:
        """Run the updater until `condition`, then stop it. Raises what it raises."""
        running = asyncio.create_task(self.updater.run())
        try:
            await until(lambda: running.done() or condition())
        finally:
            self.updater.stop()
            await running


def saved_and_read(snapshot: Snapshot) -> Snapshot:
    """Save a snapshot and return it as loaded from the store."""
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(Path(folder))
        store.open()
        store.save(snapshot)
        store.close()
        read = store.open()
        store.close()
    assert read is not None
    return read


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to 100 bytes, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition was never true"
        await asyncio.sleep(0.005)
