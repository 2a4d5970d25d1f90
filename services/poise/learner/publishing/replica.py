"""One replica, and the loop that keeps it at the version on offer.

It asks what the replica serves, and pushes when that is not what it should be. A new version, a restarted replica, a
broken push and a replica that was away are all the same case. A push goes on when a newer version is wanted: a replica
that takes longer than a step would else never get any.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

from poise.errors import PoiseError
from poise.learner.config import PushConfig
from poise.learner.publishing.process_group import GroupSender
from poise.learner.publishing.weight_version import Offer
from poise.runtime.startup import without_elapsed
from poise_client import AsyncGenerationClient, WeightPush
from poise_client.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    PoiseClientError,
    VersionMismatchError,
)
from poise_client.types import Policy, ReplicaResult, WeightUpdate

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 5.0

_MOST_PATIENCE = 8
"""Times `timeout_s` that a push may take in the end, to a replica that is behind anyway."""

_GROUP_SHARE = 0.5
"""Of a push's time, for its way from device to device: what is left is for another try over gRPC."""

_MAX_BROKEN = 2
"""Pushes from device to device that may break in a row; after them a replica gets all over gRPC."""


class Replica:
    """One replica."""

    def __init__(self, client: AsyncGenerationClient, config: PushConfig, sender: GroupSender | None = None) -> None:
        self._client = client
        self._config = config
        self._sender = sender
        self._num_broken_in_a_row = 0
        """Pushes through the sender's group."""
        self._said_unreached = ""
        """Instance of the replica of which it was said that the sender's group cannot reach it."""
        self._wanted: Offer | None = None
        self._refuses_delta_of: Offer | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self._gone = False
        self._patience = 1
        """Times `timeout_s` that the next push may take: twice as long after each that ran out of time."""
        self.is_behind = False
        """Whether it has let a step wait in vain, and was not current since: no step waits for it meanwhile."""
        self.result = ReplicaResult(client.target, 0, False, "not reached yet", 0.0, 0.0)
        """How it stands, as far as known."""

    def want(self, offer: Offer) -> None:
        """Push it from now on."""
        if offer is not self._wanted:
            self._wanted = offer
            self.result = dataclasses.replace(self.result, current=False, error="")
            self._wake.set()

    async def settled(self, offer: Offer) -> None:
        """Return when what is wanted is served, was pushed in vain once, or is not wanted any more."""
        async with self._settled:
            self._settled.notify_all()  # whoever waits for the version before need not any more
            await self._settled.wait_for(
                lambda: self._gone or self._wanted is not offer or self.result.current or bool(self.result.error)
            )

    def missed(self, offer: Offer) -> None:
        """Leave it to catch up by itself, unless it served the offer, or failed, by now."""
        if self._wanted is offer and not self.result.current and not self.result.error:
            self.is_behind = True

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            self._wake.clear()
            wanted = self._wanted
            if wanted is not None:
                result = await self._reconcile(wanted)
                async with self._settled:
                    if self._wanted is wanted:
                        if result.current:
                            self.is_behind, self._patience = False, 1
                        self._say_changes(result)
                        self.result = result
                    self._settled.notify_all()
            try:
                await asyncio.wait_for(self._wake.wait(), self._config.reconcile_every_s)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Let nobody wait for it any more; `run` must have ended."""
        async with self._settled:
            self._gone = True
            self._settled.notify_all()
        await self._client.close()
        if self._sender is not None:
            await self._sender.close()

    async def _reconcile(self, wanted: Offer) -> ReplicaResult:
        before = self.result
        try:
            policy = await self._client.get_policy(timeout_s=_ASK_TIMEOUT_S)
            served = dataclasses.replace(before, policy_version=policy.policy_version, digest=policy.digest, error="")
            if wanted.is_served_by(policy):
                return dataclasses.replace(served, current=True)
            before = dataclasses.replace(served, current=False)
            return await self._push(wanted, policy, before)
        except DeadlineExceededError as error:
            self.is_behind = True
            return dataclasses.replace(before, current=False, error=str(error))
        except (PoiseClientError, PoiseError) as error:
            return dataclasses.replace(before, current=False, error=str(error))
        except Exception as error:
            logger.exception("replica %s: a defect in publishing", before.address)
            return dataclasses.replace(before, current=False, error=f"a defect in publishing: {error}")

    async def _push(self, wanted: Offer, policy: Policy, before: ReplicaResult) -> ReplicaResult:
        """Push what changed where that is possible, else everything; within the push's time in all.

        A replica that is behind holds up nobody: it gets more time at every attempt, for one that is slow is to get
        there, and one that hangs is to be given up.
        """
        started = time.monotonic()
        delta = None if self._refuses_delta_of is wanted else await wanted.delta_for(policy)
        if delta is not None:
            try:
                return await self._send(delta, wanted, policy, before, started)
            except (VersionMismatchError, InvalidRequestError, InternalError) as error:
                logger.info("replica %s takes no delta: %s", before.address, error)
                self._refuses_delta_of = wanted
        try:
            return await self._send(await wanted.whole(), wanted, policy, before, started)
        except DeadlineExceededError:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            raise

    async def _send(
        self, push: WeightPush, wanted: Offer, policy: Policy, before: ReplicaResult, started: float
    ) -> ReplicaResult:
        update = await self._send_through_group(push, policy, self._left_s(started) * _GROUP_SHARE)
        if update is None:
            update = await self._client.push_weights(push, timeout_s=self._left_s(started))
        return dataclasses.replace(
            before,
            policy_version=update.policy_version,
            digest=wanted.version.digest,
            current=True,
            error="",
            push_s=time.monotonic() - started,
            pause_s=update.pause_s,
            sent_bytes=0 if push.manifest.file else push.payload_bytes,
        )

    def _left_s(self, started: float) -> float:
        return max(0.001, self._config.timeout_s * self._patience - (time.monotonic() - started))

    async def _send_through_group(self, push: WeightPush, policy: Policy, timeout_s: float) -> WeightUpdate | None:
        """Push from device to device; None where that cannot be done, and the push is to go over gRPC."""
        sender, address = self._sender, self.result.address
        if sender is None or self._num_broken_in_a_row >= _MAX_BROKEN:
            return None
        if not sender.reaches(policy):
            if self._said_unreached != policy.instance_id:
                self._said_unreached = policy.instance_id
                logger.warning("replica %s gets all over gRPC: it takes nothing device to device; set `nccl`", address)
            return None
        try:
            update = await sender.send(push, self._client, policy, timeout_s)
        except (ConflictError, VersionMismatchError):
            raise  # over gRPC it would be no other
        except Exception as error:
            self._num_broken_in_a_row += 1
            logger.error(
                "replica %s: a push from device to device broke, and goes over gRPC%s: %s",
                address,
                ", as all to come" if self._num_broken_in_a_row == _MAX_BROKEN else "",
                str(error) or type(error).__name__,
            )
            return None
        self._num_broken_in_a_row = 0
        return update

    def _say_changes(self, result: ReplicaResult) -> None:
        error = without_elapsed(result.error)
        if error and error != without_elapsed(self.result.error):
            level = logging.WARNING if error == result.error else logging.INFO  # one that starts is no trouble
            logger.log(level, "replica %s is not current: %s", result.address, result.error)
        elif result.current and (not self.result.current or result.policy_version != self.result.policy_version):
            logger.info(
                "replica %s serves version %d, pushed in %.2f s (%.1f MB)",
                result.address,
                result.policy_version,
                result.push_s,
                result.sent_bytes / 1e6,
            )
