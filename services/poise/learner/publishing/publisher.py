"""Keeps every generation replica at the learner's current version: finds them, and offers each version to all at once.

Knows neither torch nor the learner's state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from poise.learner.config import PushConfig
from poise.learner.publishing.replica import Replica
from poise.learner.publishing.transports import Transport
from poise.learner.publishing.weight_version import Offer, Version
from poise.runtime.network.discovery import Address, Discovery
from poise_client import AsyncGenerationClient
from poise_client.types import ReplicaResult

logger = logging.getLogger(__name__)


class Publisher:
    """All replicas. A slow or dead one holds up neither the others nor, beyond `timeout_s`, the learner."""

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
        self._config = config
        self._replicas: dict[str, Replica] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._unconnected: dict[str, ReplicaResult] = {}
        """Those that no client could be made for, and why: tried again with every look."""
        self._looked = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._withdrawing: set[asyncio.Task[None]] = set()
        self._offer: Offer | None = None

    def start(self) -> None:
        """Begin to look for replicas, and to reconcile them."""
        self._looking = asyncio.create_task(self._look(), name="replica-discovery")

    async def publish(self, version: Version) -> None:
        """Offer a version to every replica; return when each serves it or failed once, at most after `timeout_s`.

        One that lets this limit pass is behind: no version waits for it until it has caught up.
        """
        offer = self._take(version)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                await self._looked.wait()
                waited_for = [replica for replica in self._replicas.values() if not replica.is_behind]
                await asyncio.gather(*(replica.settled(offer) for replica in waited_for))
        except TimeoutError:
            for replica in self._replicas.values():
                replica.missed(offer)

    @property
    def results(self) -> tuple[ReplicaResult, ...]:
        """How each replica stands."""
        return (*(replica.result for replica in self._replicas.values()), *self._unconnected.values())

    async def stop(self) -> None:
        """End the loops, close the clients and leave nothing behind."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*(self._forget(target) for target in list(self._replicas)))
        if self._offer is not None:
            await self._offer.withdraw()
        await asyncio.gather(*self._withdrawing)
        await asyncio.to_thread(self._transport.close)

    def _take(self, version: Version) -> Offer:
        """Offer a version from now on, unless it is on offer."""
        before = self._offer
        if before is not None and before.version is version:
            offer = before
        else:
            offer = self._offer = Offer(version, before, self._transport, deltas=self._config.deltas)
            if before is not None:
                withdrawing = asyncio.create_task(before.withdraw(), name="withdraw")
                self._withdrawing.add(withdrawing)
                withdrawing.add_done_callback(self._withdrawing.discard)
        for replica in self._replicas.values():
            replica.want(offer)
        return offer

    async def _look(self) -> None:
        while True:
            is_done = False
            try:
                await self._adopt(await self._discovery.find())
                is_done = self._discovery.is_fixed and not self._unconnected
            except Exception:
                # Whatever it is, it must not end the looking: nobody would get what is learnt from then on.
                logger.exception("a defect in looking for replicas; they are looked for again")
            self._looked.set()
            if is_done:
                return
            await asyncio.sleep(self._config.reconcile_every_s)

    async def _adopt(self, addresses: list[Address]) -> None:
        """Take in the replicas that came, and let go of those that went."""
        targets = {address.target for address in addresses}
        for target in self._unconnected.keys() - targets:
            del self._unconnected[target]
        for target in self._replicas.keys() - targets:
            logger.info("replica %s is gone", target)
            await self._forget(target)
        for address in addresses:
            if address.target in self._replicas:
                continue
            client = self._client_of(address)
            if client is None:
                continue
            replica = self._replicas[address.target] = Replica(client, self._config, self._transport.group_sender())
            if self._offer is not None:
                replica.want(self._offer)
            self._loops[address.target] = asyncio.create_task(replica.run(), name=f"replica {address.target}")

    def _client_of(self, address: Address) -> AsyncGenerationClient | None:
        """Return a client for a replica; None where none can be made, which is told as how that replica stands."""
        try:
            client = self._connect(address)
        except Exception as error:  # authorities that cannot be read; an address that is none
            told = ReplicaResult(address.target, 0, False, f"no connection can be made: {error}", 0.0, 0.0)
            if told != self._unconnected.get(address.target):
                logger.warning("replica %s is not current: %s", address.target, told.error)
            self._unconnected[address.target] = told
            return None
        self._unconnected.pop(address.target, None)
        return client

    async def _forget(self, target: str) -> None:
        replica, loop = self._replicas.pop(target), self._loops.pop(target)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await replica.close()
