"""Finds the generation replicas and updates all of them to the learner's current version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from poise.learner.config import PushConfig
from poise.learner.publishing.replica import Replica
from poise.learner.publishing.transports import Transport
from poise.learner.publishing.weight_version import VersionPushes, WeightVersion
from poise.runtime.network.discovery import Address, Discovery
from poise_client import AsyncGenerationClient
from poise_client.types import ReplicaResult

logger = logging.getLogger(__name__)


class Publisher:
    """Updates all replicas. A slow or dead one delays the learner by at most `timeout_s`, and delays no others."""

    def __init__(
        self,
        discovery: Discovery,
        connect: Callable[[Address], AsyncGenerationClient],
        transport: Transport,
        config: PushConfig,
    ) -> None:
        self._discovery = discovery
        self._connect = connect
        self._transport = transport
        self.config = config
        self.replicas: dict[str, Replica] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._unconnected: dict[str, ReplicaResult] = {}
        """Replicas whose client could not be created, with the reason. Every discovery retries them."""
        self._has_discovered = asyncio.Event()
        self._discovering: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._pushes: VersionPushes | None = None
        """The pushes of the current version."""

    def start(self) -> None:
        """Start discovering and updating replicas."""
        self._discovering = asyncio.create_task(self._discover(), name="replica-discovery")

    async def publish(self, version: WeightVersion) -> None:
        """Push a version to every replica. Return once each serves it or has failed, after `timeout_s` at the latest.

        A replica that exceeds this limit is behind: later versions do not wait for it until it has caught up.
        """
        pushes = self._set_version(version)
        try:
            async with asyncio.timeout(self.config.timeout_s):
                await self._has_discovered.wait()
                waited_for = [replica for replica in self.replicas.values() if not replica.is_behind]
                await asyncio.gather(*(replica.wait_for(pushes) for replica in waited_for))
        except TimeoutError:
            for replica in self.replicas.values():
                replica.mark_behind(pushes)

    @property
    def results(self) -> tuple[ReplicaResult, ...]:
        """The last result of each replica."""
        return (*(replica.result for replica in self.replicas.values()), *self._unconnected.values())

    async def stop(self) -> None:
        """Stop the loops, close the clients and remove the transport's files."""
        if self._discovering is not None:
            self._discovering.cancel()
            await asyncio.gather(self._discovering, return_exceptions=True)
        await asyncio.gather(*(self._remove(target) for target in list(self.replicas)))
        if self._pushes is not None:
            await self._pushes.close()
        await asyncio.gather(*self._closing)
        await asyncio.to_thread(self._transport.close)

    def _set_version(self, version: WeightVersion) -> VersionPushes:
        """Make this the version that every replica should serve."""
        previous = self._pushes
        if previous is not None and previous.version is version:
            pushes = previous
        else:
            pushes = self._pushes = VersionPushes(version, previous, self._transport, deltas=self.config.deltas)
            if previous is not None:
                closing = asyncio.create_task(previous.close(), name="close-version")
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for replica in self.replicas.values():
            replica.set_version(pushes)
        return pushes

    async def _discover(self) -> None:
        while True:
            is_done = False
            try:
                await self._update(await self._discovery.find())
                is_done = self._discovery.is_fixed and not self._unconnected
            except Exception:
                # If this loop ended, new replicas would never get weights.
                logger.exception("unexpected error while looking for replicas; trying again")
            self._has_discovered.set()
            if is_done:
                return
            await asyncio.sleep(self.config.reconcile_every_s)

    async def _update(self, addresses: list[Address]) -> None:
        """Add replicas that appeared and remove those that disappeared."""
        targets = {address.target for address in addresses}
        for target in self._unconnected.keys() - targets:
            del self._unconnected[target]
        for target in self.replicas.keys() - targets:
            logger.info("replica %s was removed: its address is no longer found", target)
            await self._remove(target)
        for address in addresses:
            if address.target in self.replicas:
                continue
            client = self._make_client(address)
            if client is None:
                continue
            replica = self.replicas[address.target] = Replica(client, self.config, self._transport.group_sender())
            if self._pushes is not None:
                replica.set_version(self._pushes)
            self._loops[address.target] = asyncio.create_task(replica.run(), name=f"replica {address.target}")

    def _make_client(self, address: Address) -> AsyncGenerationClient | None:
        """Return a client for a replica; None if that fails. The replica's result then has the error."""
        try:
            client = self._connect(address)
        except Exception as error:  # an unreadable CA file, or an invalid address
            result = ReplicaResult(address.target, 0, False, f"cannot connect: {error}", 0.0, 0.0)
            if result != self._unconnected.get(address.target):
                logger.warning("replica %s is not current: %s", address.target, result.error)
            self._unconnected[address.target] = result
            return None
        self._unconnected.pop(address.target, None)
        return client

    async def _remove(self, target: str) -> None:
        replica, loop = self.replicas.pop(target), self._loops.pop(target)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await replica.close()
