"""The pool of generation replicas: discovery, health, and choice of the least loaded one.

Replicas may be added and removed during a run. A replica gets prompts only if it reports that it is ready and its
weights are new enough. After a failure it gets none until it reports that again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from poise.runtime.network.discovery import Address, Discovery
from poise_client import AsyncGenerationClient
from poise_client.errors import BusyError, PoiseClientError
from poise_client.types import Group, Prompt, Sampling

logger = logging.getLogger(__name__)

REFRESH_EVERY_S = 0.5
_STATUS_TIMEOUT_S = 3.0
SILENCE_S = 60.0
"""A replica with work that returns no group and answers no status call for this long counts as lost."""
_BUSY_S = 0.5
_CHARS_PER_TOKEN = 4
_SMOOTHING = 0.05
"""Weight of the newest group in the moving mean of response lengths."""


class Replica:
    """A replica and its assigned work."""

    def __init__(self, client: AsyncGenerationClient, missing_version: int) -> None:
        self.client = client
        self.is_ready = False
        self.missing_version: int | None = missing_version
        """Lowest policy version that it does not serve yet; None unless it is known to be behind."""
        self.not_ready_reason = "its status is not known yet"
        """Why it gets no prompts, for messages."""
        self.is_starting = False
        """Whether `not_ready_reason` is its start-up stage."""
        self.not_before_s = 0.0
        """Time after which a busy replica gets prompts again."""
        self.last_alive_s = 0.0
        self.num_rollouts = 0
        """Assigned and unfinished rollouts."""
        self.num_tokens = 0.0
        """Expected tokens of those rollouts."""
        self.num_served_tokens = 0
        """Response tokens returned so far."""
        self.calls: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> str:
        """Its address."""
        return self.client.target

    def may_serve(self, policy_version: int) -> bool:
        """Return whether it can take prompts for this version or newer now."""
        is_new_enough = self.missing_version is None or policy_version < self.missing_version
        return self.is_ready and is_new_enough and time.monotonic() >= self.not_before_s

    def assign(self, num_rollouts: int, num_tokens: float) -> None:
        """Add work."""
        self.num_rollouts += num_rollouts
        self.num_tokens += num_tokens

    def release(self, num_rollouts: int, num_tokens: float) -> None:
        """Remove work that is finished or withdrawn."""
        self.num_rollouts -= num_rollouts
        self.num_tokens = self.num_tokens - num_tokens if self.num_rollouts else 0.0

    def mark_alive(self) -> None:
        """Record that it answered."""
        self.last_alive_s = time.monotonic()

    def mark_behind(self, policy_version: int, error: PoiseClientError) -> None:
        """Record that it does not serve this version yet."""
        self.missing_version, self.not_ready_reason, self.is_starting = policy_version, error.message, False

    def mark_failed(self, error: PoiseClientError) -> None:
        """Record a transient failure."""
        if isinstance(error, BusyError):  # healthy, but fully loaded
            self.not_ready_reason = error.message
            self.not_before_s = time.monotonic() + max(_BUSY_S, error.retry_after_s or 0.0)
            return
        if self.is_ready:
            logger.info("generation replica %s gets no prompts until it is ready: %s", self.target, error.message)
        self.is_ready, self.not_ready_reason, self.is_starting = False, error.message, error.starting


class ReplicaPool:
    """All replicas."""

    def __init__(
        self, discovery: Discovery, connect: Callable[[Address], AsyncGenerationClient], max_rollouts: int
    ) -> None:
        """Assign each replica at most `max_rollouts` at a time, but always at least one group."""
        self._discovery = discovery
        self._connect = connect
        self._max_rollouts = max_rollouts
        self._replicas: dict[str, Replica] = {}
        self._removed: list[Replica] = []
        """Replicas that discovery no longer finds, with unfinished calls."""
        self._required_version = 0
        self._num_calls = 0
        self._response_tokens: float | None = None
        """Moving mean of response lengths."""
        self._refreshing = asyncio.Lock()
        self._refreshed_s = float("-inf")

    @property
    def served_tokens(self) -> dict[str, int]:
        """Response tokens that each replica returned so far, by address."""
        return {replica.target: replica.num_served_tokens for replica in (*self._replicas.values(), *self._removed)}

    @property
    def num_ready(self) -> int:
        """Replicas that accept prompts, of any policy version."""
        return sum(replica.is_ready for replica in self._replicas.values())

    @property
    def all_starting(self) -> bool:
        """Whether there are replicas and all of them are starting."""
        return bool(self._replicas) and all(replica.is_starting for replica in self._replicas.values())

    @property
    def not_ready_reason(self) -> str:
        """Why replicas get no prompts, for messages."""
        reasons = [f"generation at {replica.target}: {replica.not_ready_reason}" for replica in self._replicas.values()]
        return "; ".join(reasons) or "generation: endpoints.generation resolves to no replica"

    def next_ready(self) -> AsyncGenerationClient | None:
        """Return the client of a ready replica, in rotation; None if there is none."""
        ready = [replica.client for replica in self._replicas.values() if replica.is_ready]
        self._num_calls += 1
        return ready[self._num_calls % len(ready)] if ready else None

    def num_assigned(self, target: str) -> int:
        """Return the number of unfinished rollouts of the replica at an address."""
        return self._replicas[target].num_rollouts

    async def close(self) -> None:
        """Close the clients."""
        for replica in (*self._replicas.values(), *self._removed):
            await replica.client.close()

    def require_version(self, policy_version: int) -> None:
        """Require this version of new replicas before they get prompts."""
        self._required_version = max(self._required_version, policy_version)

    def choose(self, policy_version: int, num_rollouts: int) -> Replica | None:
        """Return the replica with room for `num_rollouts` and the fewest expected tokens; None if there is none."""
        free = [
            replica
            for replica in self._replicas.values()
            if replica.may_serve(policy_version)
            and (not replica.num_rollouts or replica.num_rollouts + num_rollouts <= self._max_rollouts)
        ]
        return min(free, key=lambda replica: replica.num_tokens, default=None)

    def expected_tokens(self, prompt: Prompt, num_rollouts: int, sampling: Sampling) -> float:
        """Return the expected tokens of a group: its prompt, and responses of the recent mean length."""
        content = prompt.content
        if isinstance(content, str):
            num_prompt: float = len(content) / _CHARS_PER_TOKEN
        else:
            num_prompt = sum(
                1 if isinstance(part, int) else len(part["content"]) / _CHARS_PER_TOKEN for part in content
            )
        most = float(sampling.max_tokens or 1)
        return num_prompt + num_rollouts * min(most, self._response_tokens or most)

    def record_group(self, replica: Replica, group: Group) -> None:
        """Record a finished group."""
        replica.mark_alive()
        lengths = [rollout.token_ids.size for rollout in group.rollouts]
        replica.num_served_tokens += sum(lengths)
        if lengths:
            mean = sum(lengths) / len(lengths)
            before = mean if self._response_tokens is None else self._response_tokens
            self._response_tokens = before + _SMOOTHING * (mean - before)

    async def refresh(self) -> None:
        """Discover replicas and poll those of unknown status. Do nothing if the last call is recent."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed_s < REFRESH_EVERY_S:
                return
            await self._update_members(await self._discovery.find())
            await asyncio.gather(*(self._poll(replica) for replica in (*self._replicas.values(), *self._removed)))
            self._refreshed_s = time.monotonic()

    async def _update_members(self, addresses: Sequence[Address]) -> None:
        for target in self._replicas.keys() - {address.target for address in addresses}:
            logger.info("generation replica %s was removed", target)
            self._removed.append(self._replicas.pop(target))
        for address in addresses:
            if address.target not in self._replicas:
                self._replicas[address.target] = Replica(self._connect(address), self._required_version)
        for replica in [replica for replica in self._removed if not replica.calls]:
            self._removed.remove(replica)
            await replica.client.close()

    async def _poll(self, replica: Replica) -> None:
        """Poll the readiness of an idle replica, or the liveness of a busy one."""
        if replica.is_ready and replica.missing_version is None and not replica.num_rollouts:
            return
        try:
            policy = await replica.client.get_policy(timeout_s=_STATUS_TIMEOUT_S)
        except PoiseClientError as error:
            if replica.num_rollouts and time.monotonic() - replica.last_alive_s < SILENCE_S:
                return  # busy: if it were dead, its streams would fail
            replica.mark_failed(error)
            for call in replica.calls:
                call.cancel()
            return
        replica.mark_alive()
        if policy.ready != replica.is_ready:
            state = "is ready" if policy.ready else f"gets no prompts until it is ready: {policy.not_ready_reason}"
            logger.info("generation replica %s %s", replica.target, state)
        replica.is_ready, replica.not_ready_reason, replica.is_starting = policy.ready, policy.not_ready_reason, False
        if replica.missing_version is not None:
            is_current = policy.policy_version >= self._required_version
            replica.missing_version = None if is_current else policy.policy_version + 1
            if not replica.not_ready_reason:
                replica.not_ready_reason = f"serves version {policy.policy_version}, not yet {self._required_version}"
