"""One replica, and the loop that updates it to the current version.

The loop asks which version the replica serves, and pushes the current one if they differ. It handles a new version, a
restarted replica and a failed push alike. A running push continues when a newer version arrives. Otherwise, a replica
slower than a step would never get any version.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

from poise.errors import PoiseError
from poise.learner.config import PushConfig
from poise.learner.publishing.process_group import GroupSender
from poise.learner.publishing.weight_version import VersionPushes
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

_GET_POLICY_TIMEOUT_S = 5.0

_MAX_TIMEOUT_FACTOR = 8
"""A push to a replica that is behind may take up to this many times `timeout_s`."""

_GROUP_SHARE = 0.5
"""Share of a push's time for the process group. The rest is for a retry over gRPC."""

_MAX_GROUP_FAILURES = 2
"""After this many failed pushes in a row through the process group, all pushes to the replica use gRPC."""


class Replica:
    """One replica."""

    def __init__(self, client: AsyncGenerationClient, config: PushConfig, sender: GroupSender | None = None) -> None:
        self._client = client
        self.config = config
        self._sender = sender
        self._num_group_failures = 0
        """Failed pushes in a row through the process group."""
        self._warned_instance = ""
        """Id of the replica process whose missing process group was logged."""
        self._wanted: VersionPushes | None = None
        self._rejects_delta_of: VersionPushes | None = None
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._is_closed = False
        self._timeout_factor = 1
        """Doubled after each push that timed out."""
        self.is_behind = False
        """True from a timeout until the replica is current again. Steps do not wait for it meanwhile."""
        self.result = ReplicaResult(client.target, 0, False, "not reached yet", 0.0, 0.0)
        """The last known state."""

    def set_version(self, pushes: VersionPushes) -> None:
        """Push this version from now on."""
        if pushes is not self._wanted:
            self._wanted = pushes
            self.result = dataclasses.replace(self.result, current=False, error="")
            self._wake.set()

    async def wait_for(self, pushes: VersionPushes) -> None:
        """Wait until the version is served, its push has failed, or another version has replaced it."""
        async with self._changed:
            self._changed.notify_all()  # wake callers that wait for an older version
            await self._changed.wait_for(
                lambda: self._is_closed or self._wanted is not pushes or self.result.current or bool(self.result.error)
            )

    def mark_behind(self, pushes: VersionPushes) -> None:
        """Mark the replica as behind unless it serves the version, or a push of it has failed."""
        if self._wanted is pushes and not self.result.current and not self.result.error:
            self.is_behind = True

    async def run(self) -> None:
        """Check and push until cancelled."""
        while True:
            self._wake.clear()
            wanted = self._wanted
            if wanted is not None:
                result = await self._reconcile(wanted)
                async with self._changed:
                    if self._wanted is wanted:
                        if result.current:
                            self.is_behind, self._timeout_factor = False, 1
                        self._log_change(result)
                        self.result = result
                    self._changed.notify_all()
            try:
                await asyncio.wait_for(self._wake.wait(), self.config.reconcile_every_s)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Release all callers of `wait_for` and close the client. `run` must have ended."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        await self._client.close()
        if self._sender is not None:
            await self._sender.close()

    async def _reconcile(self, wanted: VersionPushes) -> ReplicaResult:
        result = self.result
        try:
            policy = await self._client.get_policy(timeout_s=_GET_POLICY_TIMEOUT_S)
            served = dataclasses.replace(result, policy_version=policy.policy_version, digest=policy.digest, error="")
            if wanted.version.is_served_by(policy):
                return dataclasses.replace(served, current=True)
            result = dataclasses.replace(served, current=False)
            return await self._push(wanted, policy, result)
        except DeadlineExceededError as error:
            self.is_behind = True
            return dataclasses.replace(result, current=False, error=str(error))
        except (PoiseClientError, PoiseError) as error:
            return dataclasses.replace(result, current=False, error=str(error))
        except Exception as error:
            logger.exception("replica %s: unexpected error while publishing", result.address)
            return dataclasses.replace(result, current=False, error=f"unexpected error while publishing: {error}")

    async def _push(self, wanted: VersionPushes, policy: Policy, result: ReplicaResult) -> ReplicaResult:
        """Push a delta if possible, else all parameters, within one time limit.

        The limit doubles after each timeout, up to a maximum. So a slow replica succeeds in the end, and a push to a
        hanging replica ends. This delays no step, because steps do not wait for a replica that is behind.
        """
        started = time.monotonic()
        delta = None if self._rejects_delta_of is wanted else await wanted.delta_for(policy)
        if delta is not None:
            try:
                return await self._send(delta, wanted, policy, result, started)
            except (VersionMismatchError, InvalidRequestError, InternalError) as error:
                logger.info("replica %s rejects the delta; sending everything: %s", result.address, error)
                self._rejects_delta_of = wanted
        try:
            return await self._send(await wanted.full(), wanted, policy, result, started)
        except DeadlineExceededError:
            self._timeout_factor = min(2 * self._timeout_factor, _MAX_TIMEOUT_FACTOR)
            raise

    async def _send(
        self, push: WeightPush, wanted: VersionPushes, policy: Policy, result: ReplicaResult, started: float
    ) -> ReplicaResult:
        update = await self._send_through_group(push, policy, self._left_s(started) * _GROUP_SHARE)
        if update is None:
            update = await self._client.push_weights(push, timeout_s=self._left_s(started))
        return dataclasses.replace(
            result,
            policy_version=update.policy_version,
            digest=wanted.version.digest,
            current=True,
            error="",
            push_s=time.monotonic() - started,
            pause_s=update.pause_s,
            sent_bytes=0 if push.manifest.file else push.payload_bytes,
        )

    def _left_s(self, started: float) -> float:
        return max(0.001, self.config.timeout_s * self._timeout_factor - (time.monotonic() - started))

    async def _send_through_group(self, push: WeightPush, policy: Policy, timeout_s: float) -> WeightUpdate | None:
        """Push through the process group; None if that is not possible and the push must go over gRPC."""
        sender, address = self._sender, self.result.address
        if sender is None or self._num_group_failures >= _MAX_GROUP_FAILURES:
            return None
        if not sender.can_reach(policy):
            if self._warned_instance != policy.instance_id:
                self._warned_instance = policy.instance_id
                logger.warning("replica %s falls back to gRPC: it has no process group. Set `nccl` there", address)
            return None
        try:
            update = await sender.send(push, self._client, policy, timeout_s)
        except (ConflictError, VersionMismatchError):
            raise  # gRPC would give the same error
        except Exception as error:
            self._num_group_failures += 1
            logger.error(
                "replica %s: a push through the process group failed; %s over gRPC: %s",
                address,
                "all pushes now go" if self._num_group_failures == _MAX_GROUP_FAILURES else "this one goes",
                str(error) or type(error).__name__,
            )
            return None
        self._num_group_failures = 0
        return update

    def _log_change(self, result: ReplicaResult) -> None:
        error = without_elapsed(result.error)
        if error and error != without_elapsed(self.result.error):
            level = logging.WARNING if error == result.error else logging.INFO  # a starting replica is no problem
            logger.log(level, "replica %s is not current: %s", result.address, result.error)
        elif result.current and (not self.result.current or result.policy_version != self.result.policy_version):
            logger.info(
                "replica %s serves version %d, pushed in %.2f s (%.1f MB)",
                result.address,
                result.policy_version,
                result.push_s,
                result.sent_bytes / 1e6,
            )
