"""Keeps every generation replica at the learner's current version.

One loop a replica: ask what it serves, push when that is not what it should be. A new version, a restarted replica, a
broken push and a replica that was away are all the same case. Knows neither torch nor the learner's state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from poise.learner.config import PushConfig
from poise_client import AsyncGenerationClient
from poise_client.errors import PoiseClientError
from poise_client.types import ReplicaResult, WeightArray

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 5.0


class Version(Protocol):
    """What is to be served."""

    @property
    def lineage_id(self) -> str:
        """Names the sequence of versions."""
        ...

    @property
    def policy_version(self) -> int:
        """Its number."""
        ...

    @property
    def weights(self) -> dict[str, WeightArray]:
        """Every parameter by its Hugging Face name. Never changed."""
        ...

    @property
    def digest(self) -> bytes:
        """Of the weights."""
        ...


class Replica:
    """One replica and the loop that keeps it current."""

    def __init__(self, client: AsyncGenerationClient, config: PushConfig) -> None:
        self._client = client
        self._config = config
        self._wanted: Version | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self.result = ReplicaResult(client.target, 0, False, "not reached yet", 0.0, 0.0)
        """How it stands, as far as known."""

    async def want(self, version: Version) -> None:
        """Push `version` from now on; return when it is served, or the last attempt to push it has failed."""
        async with self._settled:
            if version is not self._wanted:
                self._wanted = version
                self.result = _changed(self.result, current=False, error="")
                self._wake.set()
                self._settled.notify_all()  # whoever waits for the version before need not any more
            await self._settled.wait_for(
                lambda: self._wanted is not version or self.result.current or self.result.error
            )

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            self._wake.clear()
            wanted = self._wanted
            if wanted is not None:
                result = await self._reconcile(wanted)
                async with self._settled:
                    if self._wanted is wanted:
                        self._say_changes(result)
                        self.result = result
                    self._settled.notify_all()
            try:
                await asyncio.wait_for(self._wake.wait(), self._config.reconcile_every_s)
            except TimeoutError:
                continue

    async def _reconcile(self, wanted: Version) -> ReplicaResult:
        before = self.result
        try:
            policy = await self._client.get_policy(timeout_s=_ASK_TIMEOUT_S)
            if (policy.lineage_id, policy.policy_version, policy.digest) == (
                wanted.lineage_id,
                wanted.policy_version,
                wanted.digest,
            ):
                return _changed(before, policy_version=wanted.policy_version, current=True, error="")
            before = _changed(before, policy_version=policy.policy_version, current=False, error="")
            started = time.monotonic()
            update = await self._client.update_weights(
                lineage_id=wanted.lineage_id,
                policy_version=wanted.policy_version,
                weights=wanted.weights,
                timeout_s=self._config.timeout_s,
            )
            seconds = time.monotonic() - started
            return ReplicaResult(before.address, update.policy_version, True, "", seconds, update.pause_s)
        except PoiseClientError as error:
            return _changed(before, current=False, error=str(error))
        except Exception as error:
            logger.exception("replica %s: a defect in publishing", before.address)
            return _changed(before, current=False, error=f"a defect in publishing: {error}")

    def _say_changes(self, result: ReplicaResult) -> None:
        if result.error and result.error != self.result.error:
            logger.warning("replica %s is not current: %s", result.address, result.error)
        elif result.current and (not self.result.current or result.policy_version != self.result.policy_version):
            logger.info("replica %s serves version %d", result.address, result.policy_version)


class Publisher:
    """All replicas."""

    def __init__(self, clients: Sequence[AsyncGenerationClient], config: PushConfig) -> None:
        self._clients = clients
        self._config = config
        self._replicas = [Replica(client, config) for client in clients]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to reconcile."""
        self._tasks = [asyncio.create_task(replica.run(), name="replica") for replica in self._replicas]

    async def publish(self, version: Version) -> None:
        """Offer a version to every replica; return when each serves it or failed once, at most after `timeout_s`."""
        if not self._replicas:
            return
        waiting = [asyncio.create_task(replica.want(version)) for replica in self._replicas]
        _, late = await asyncio.wait(waiting, timeout=self._config.timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    @property
    def results(self) -> tuple[ReplicaResult, ...]:
        """How each replica stands."""
        return tuple(replica.result for replica in self._replicas)

    async def stop(self) -> None:
        """End the loops and close the clients."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()


def _changed(result: ReplicaResult, *, current: bool, error: str, policy_version: int | None = None) -> ReplicaResult:
    version = result.policy_version if policy_version is None else policy_version
    return ReplicaResult(result.address, version, current, error, result.push_s, result.pause_s)
