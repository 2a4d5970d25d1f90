"""One policy version: its weights with hashes, and its pushes, prepared once for all replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from poise.learner.publishing.transports import Transport
from poise_client import WeightPush, combine_digests, hash_weights
from poise_client.types import Adapter, Policy, WeightArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightVersion:
    """The weights of one policy version, as replicas serve them. Never modified."""

    lineage_id: str
    """Id of the sequence of versions."""
    policy_version: int
    weights: dict[str, WeightArray]
    """Every parameter by its name in files, or only the adapter's."""
    sha256_by_name: dict[str, bytes]
    """SHA-256 of each parameter."""
    digest: bytes
    """Combined hash of all parameters."""
    adapter: Adapter | None = None
    """Describes the adapter if the weights are an adapter's."""

    @classmethod
    def of(
        cls, lineage_id: str, policy_version: int, weights: dict[str, WeightArray], adapter: Adapter | None = None
    ) -> WeightVersion:
        """Return a version with hashed weights."""
        hashes = hash_weights(weights)
        return cls(lineage_id, policy_version, weights, hashes, combine_digests(hashes, adapter), adapter)

    def is_served_by(self, policy: Policy) -> bool:
        """Return whether a replica that reports `policy` serves this version."""
        served = (policy.lineage_id, policy.policy_version, policy.digest)
        return served == (self.lineage_id, self.policy_version, self.digest)


class VersionPushes:
    """The pushes of one version: all parameters, or a delta against the previous version.

    The delta is computed immediately, so that the previous version can be freed.
    """

    def __init__(
        self, version: WeightVersion, previous: VersionPushes | None, transport: Transport, *, deltas: bool
    ) -> None:
        self.version = version
        self._transport = transport
        self._deltas = deltas and version.adapter is None  # adapters are small and always sent whole
        self._full: asyncio.Future[WeightPush] = _on_thread(self._prepare)
        self._placed: dict[str, asyncio.Future[WeightPush]] = {}
        self._delta: asyncio.Task[WeightPush | None] | None = None
        if self._deltas and previous is not None:
            self._delta = asyncio.create_task(self._compare(previous._full), name="delta")

    async def full(self) -> WeightPush:
        """Return the push of all parameters. Raises the exception of preparing it."""
        return await self._place("full", await asyncio.shield(self._full))

    async def delta_for(self, policy: Policy) -> WeightPush | None:
        """Return a delta against the version that a replica serves and has kept; None if there is none."""
        if self._delta is None or not policy.keeps_base:
            return None
        push = await asyncio.shield(self._delta)
        if push is None:
            return None
        base, served = push.manifest.base, (policy.lineage_id, policy.policy_version, policy.digest)
        if (base.lineage_id, base.policy_version, base.digest) != served:
            return None
        return await self._place("delta", push)

    async def close(self) -> None:
        """Remove the files that the transport wrote for this version. Replicas that opened one can still read it."""
        if self._delta is not None:
            await asyncio.wait({self._delta})
        for placed in self._placed.values():
            await asyncio.wait({placed})
            if not placed.cancelled() and placed.exception() is None:
                await asyncio.to_thread(self._transport.remove, placed.result())

    def _prepare(self) -> WeightPush:
        version = self.version
        return WeightPush.prepare(
            version.lineage_id,
            version.policy_version,
            version.weights,
            sha256_by_name=version.sha256_by_name,
            # In float32 nearly every element changes in every step, so a delta would save nothing.
            keep_as_base=self._deltas and any(weight.array.itemsize == 2 for weight in version.weights.values()),
            adapter=version.adapter,
        )

    async def _compare(self, base: asyncio.Future[WeightPush]) -> WeightPush | None:
        try:
            push = await asyncio.shield(self._full)
            return (
                await asyncio.to_thread(push.delta, await asyncio.shield(base)) if push.manifest.keep_as_base else None
            )
        except Exception as error:
            logger.warning(
                "version %d is sent whole, because no delta could be made: %s", self.version.policy_version, error
            )
            return None

    async def _place(self, kind: str, push: WeightPush) -> WeightPush:
        if kind not in self._placed:
            self._placed[kind] = _on_thread(lambda: self._transport.place(push))
        return await asyncio.shield(self._placed[kind])


def _on_thread(work: Callable[[], WeightPush]) -> asyncio.Future[WeightPush]:
    """Run work on a thread; any number of callers may await the result."""
    future = asyncio.ensure_future(asyncio.to_thread(work))
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
