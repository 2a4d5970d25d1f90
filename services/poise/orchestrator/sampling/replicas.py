"""The generation replicas that there are now: found, asked how they stand, and chosen by what they have to do.

Replicas come and go while a run is driven. One gets prompts only when it has said that it is ready and serves new
enough weights; one that fails gets none until it says so again. Knows nothing of what is sampled.
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

_LOOK_EVERY_S = 0.5
_ASK_TIMEOUT_S = 3.0
_SILENCE_S = 60.0
"""A replica with work that neither hands over a group nor answers a question for so long is lost: its host may be."""
_BUSY_S = 0.5
_CHARS_A_TOKEN = 4
_RECENT = 0.05
"""Share of the newest group in what a response is expected to be long."""


class Replica:
    """One of them, and the work it was given."""

    def __init__(self, client: AsyncGenerationClient, lacks: int) -> None:
        self.client = client
        self.is_ready = False
        self.lacks: int | None = lacks
        """Lowest policy version that it is known not to serve; None while it is believed to keep up."""
        self.trouble = "was not asked yet"
        """Why it is not ready, or what it lacks."""
        self.is_starting = False
        """Whether that is the progress of its start."""
        self.not_before_s = 0.0
        self.heard_s = 0.0
        self.num_rollouts = 0
        """Given and unfinished."""
        self.num_tokens = 0.0
        """Expected of them."""
        self.num_served_tokens = 0
        """Response tokens handed over so far."""
        self.calls: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> str:
        """Its address."""
        return self.client.target

    def may_serve(self, policy_version: int) -> bool:
        """Whether prompts for this version or newer may be given to it now."""
        is_new_enough = self.lacks is None or policy_version < self.lacks
        return self.is_ready and is_new_enough and time.monotonic() >= self.not_before_s

    def take(self, num_rollouts: int, num_tokens: float) -> None:
        """Note work given."""
        self.num_rollouts += num_rollouts
        self.num_tokens += num_tokens

    def release(self, num_rollouts: int, num_tokens: float) -> None:
        """Note work finished or taken back."""
        self.num_rollouts -= num_rollouts
        self.num_tokens = self.num_tokens - num_tokens if self.num_rollouts else 0.0

    def heard(self) -> None:
        """Note a sign of life."""
        self.heard_s = time.monotonic()

    def is_behind(self, policy_version: int, error: PoiseClientError) -> None:
        """Note that it refused, for it does not serve this version yet."""
        self.lacks, self.trouble, self.is_starting = policy_version, error.message, False

    def failed(self, error: PoiseClientError) -> None:
        """Note a failure that may pass."""
        if isinstance(error, BusyError):  # it is well, and has enough to do
            self.trouble = error.message
            self.not_before_s = time.monotonic() + max(_BUSY_S, error.retry_after_s or 0.0)
            return
        if self.is_ready:
            logger.info("generation replica %s gets no prompts for now: %s", self.target, error.message)
        self.is_ready, self.trouble, self.is_starting = False, error.message, error.starting


class Replicas:
    """All of them."""

    def __init__(
        self, discovery: Discovery, connect: Callable[[Address], AsyncGenerationClient], max_rollouts: int
    ) -> None:
        """Give each at most `max_rollouts` at a time, but one group always."""
        self._discovery = discovery
        self._connect = connect
        self._max_rollouts = max_rollouts
        self._replicas: dict[str, Replica] = {}
        self._gone: list[Replica] = []
        """No longer found, and still at work."""
        self._wanted = 0
        self._num_asked = 0
        self._response_tokens: float | None = None
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")

    @property
    def served_tokens(self) -> dict[str, int]:
        """Response tokens that each replica has handed over so far, by address."""
        return {replica.target: replica.num_served_tokens for replica in (*self._replicas.values(), *self._gone)}

    @property
    def are_some_ready(self) -> bool:
        """Whether any accepts prompts, of whatever version."""
        return any(replica.is_ready for replica in self._replicas.values())

    def next_ready(self) -> AsyncGenerationClient | None:
        """Return the client of one that accepts prompts, another one each time; None where none does."""
        ready = [replica.client for replica in self._replicas.values() if replica.is_ready]
        self._num_asked += 1
        return ready[self._num_asked % len(ready)] if ready else None

    @property
    def are_starting(self) -> bool:
        """Whether all that are found are still loading."""
        return bool(self._replicas) and all(replica.is_starting for replica in self._replicas.values())

    @property
    def trouble(self) -> str:
        """What keeps each from being given prompts, for people."""
        troubles = [f"generation at {replica.target}: {replica.trouble}" for replica in self._replicas.values()]
        return "; ".join(troubles) or "generation: no replica is found where endpoints.generation says"

    async def close(self) -> None:
        """Close the clients."""
        for replica in (*self._replicas.values(), *self._gone):
            await replica.client.close()

    def want(self, policy_version: int) -> None:
        """Note what is asked for: replicas that come from now on must serve it before they get anything."""
        self._wanted = max(self._wanted, policy_version)

    def choose(self, policy_version: int, num_rollouts: int) -> Replica | None:
        """Return the one with the fewest tokens to do that may be given so many rollouts more; None where none may."""
        free = [
            replica
            for replica in self._replicas.values()
            if replica.may_serve(policy_version)
            and (not replica.num_rollouts or replica.num_rollouts + num_rollouts <= self._max_rollouts)
        ]
        return min(free, key=lambda replica: replica.num_tokens, default=None)

    def expected_tokens(self, prompt: Prompt, num_rollouts: int, sampling: Sampling) -> float:
        """Return how much work a group is taken for: its prompt, and responses as long as they lately were."""
        content = prompt.content
        if isinstance(content, str):
            num_prompt: float = len(content) / _CHARS_A_TOKEN
        else:
            num_prompt = sum(1 if isinstance(part, int) else len(part["content"]) / _CHARS_A_TOKEN for part in content)
        most = float(sampling.max_tokens or 1)
        return num_prompt + num_rollouts * min(most, self._response_tokens or most)

    def served(self, replica: Replica, group: Group) -> None:
        """Note a finished group."""
        replica.heard()
        lengths = [rollout.token_ids.size for rollout in group.rollouts]
        replica.num_served_tokens += sum(lengths)
        if lengths:
            mean = sum(lengths) / len(lengths)
            before = mean if self._response_tokens is None else self._response_tokens
            self._response_tokens = before + _RECENT * (mean - before)

    async def look(self) -> None:
        """Find the replicas, and ask those how they stand of which it is not known; at most every so often."""
        async with self._looking:
            if time.monotonic() - self._looked_s < _LOOK_EVERY_S:
                return
            await self._adopt(await self._discovery.find())
            await asyncio.gather(*(self._ask(replica) for replica in (*self._replicas.values(), *self._gone)))
            self._looked_s = time.monotonic()

    async def _adopt(self, addresses: Sequence[Address]) -> None:
        for target in self._replicas.keys() - {address.target for address in addresses}:
            logger.info("generation replica %s is gone", target)
            self._gone.append(self._replicas.pop(target))
        for address in addresses:
            if address.target not in self._replicas:
                self._replicas[address.target] = Replica(self._connect(address), self._wanted)
        for replica in [replica for replica in self._gone if not replica.calls]:
            self._gone.remove(replica)
            await replica.client.close()

    async def _ask(self, replica: Replica) -> None:
        """Ask one that gets no prompts whether it might, and one that has some whether it lives."""
        if replica.is_ready and replica.lacks is None and not replica.num_rollouts:
            return
        try:
            policy = await replica.client.get_policy(timeout_s=_ASK_TIMEOUT_S)
        except PoiseClientError as error:
            if replica.num_rollouts and time.monotonic() - replica.heard_s < _SILENCE_S:
                return  # busy: its streams would tell if it were dead
            replica.failed(error)
            for call in replica.calls:
                call.cancel()
            return
        replica.heard()
        if policy.ready != replica.is_ready:
            state = "is ready" if policy.ready else f"gets no prompts for now: {policy.not_ready_reason}"
            logger.info("generation replica %s %s", replica.target, state)
        replica.is_ready, replica.trouble, replica.is_starting = policy.ready, policy.not_ready_reason, False
        if replica.lacks is not None:
            replica.lacks = None if policy.policy_version >= self._wanted else policy.policy_version + 1
            replica.trouble = replica.trouble or f"serves version {policy.policy_version}, not yet {self._wanted}"
