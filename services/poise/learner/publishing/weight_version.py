"""One version, made ready to be sent: hashed, compared and written once, however many replicas want it.

Knows no replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from poise.learner.publishing.transports import Transport
from poise_client import WeightPush
from poise_client.types import Adapter, Policy, WeightArray

logger = logging.getLogger(__name__)


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
    def weights(self) -> Mapping[str, WeightArray]:
        """Every parameter by the name it has in files. Never changed."""
        ...

    @property
    def adapter(self) -> Adapter | None:
        """What the weights are, if an adapter's rather than the model's."""
        ...

    @property
    def sha256_by_name(self) -> Mapping[str, bytes]:
        """Of each of them."""
        ...

    @property
    def digest(self) -> bytes:
        """Of the weights."""
        ...


class Offer:
    """A version on offer, until another replaces it.

    What changed since the version before is computed at once, and that version's weights are let go then: two versions
    are held no longer than the comparison takes.
    """

    def __init__(self, version: Version, before: Offer | None, transport: Transport, *, deltas: bool) -> None:
        self.version = version
        self._transport = transport
        self._deltas = deltas and version.adapter is None  # adapters are small, and travel whole
        self._bare: asyncio.Future[WeightPush] = _on_thread(self._prepare)
        self._placed: dict[str, asyncio.Future[WeightPush]] = {}
        self._delta: asyncio.Task[WeightPush | None] | None = None
        if self._deltas and before is not None:
            self._delta = asyncio.create_task(self._compare(before._bare), name="delta")

    def is_served_by(self, policy: Policy) -> bool:
        """Whether a replica has it."""
        served = (policy.lineage_id, policy.policy_version, policy.digest)
        return served == (self.version.lineage_id, self.version.policy_version, self.version.digest)

    async def whole(self) -> WeightPush:
        """Return the push of all parameters. Raises what kept it from being made ready."""
        return await self._place("whole", await asyncio.shield(self._bare))

    async def delta_for(self, policy: Policy) -> WeightPush | None:
        """Return the push of what changed since what a replica serves and keeps; None where there is none."""
        if self._delta is None or not policy.keeps_base:
            return None
        push = await asyncio.shield(self._delta)
        if push is None:
            return None
        base = push.manifest.base
        if (base.lineage_id, base.policy_version, base.digest) != (
            policy.lineage_id,
            policy.policy_version,
            policy.digest,
        ):
            return None
        return await self._place("delta", push)

    async def withdraw(self) -> None:
        """Remove what was placed for it; whoever has it open reads on."""
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
            # In float32 nearly all elements change with every step: no delta, and nothing to keep for one.
            keep_as_base=self._deltas and any(weight.array.itemsize == 2 for weight in version.weights.values()),
            adapter=version.adapter,
        )

    async def _compare(self, base: asyncio.Future[WeightPush]) -> WeightPush | None:
        try:
            push = await asyncio.shield(self._bare)
            return (
                await asyncio.to_thread(push.delta, await asyncio.shield(base)) if push.manifest.keep_as_base else None
            )
        except Exception as error:
            logger.warning("no delta of version %d: %s", self.version.policy_version, error)
            return None

    async def _place(self, kind: str, push: WeightPush) -> WeightPush:
        if kind not in self._placed:
            self._placed[kind] = _on_thread(lambda: self._transport.place(push))
        return await asyncio.shield(self._placed[kind])


def _on_thread(work: Callable[[], WeightPush]) -> asyncio.Future[WeightPush]:
    """Start work that several may wait for, or none."""
    future = asyncio.ensure_future(asyncio.to_thread(work))
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
