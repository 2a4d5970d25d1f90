"""Prompts to replicas and groups back: each group once, whatever becomes of the replica that it was given to.

A group is given to one replica at a time, and to another only after the call to the first is over: no rollout is lost
and none counts twice. Owns who samples what; which replicas there are is `replicas`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from poise.orchestrator.sampling import waiting
from poise.orchestrator.sampling.replicas import Replica, Replicas
from poise.orchestrator.sampling.waiting import StoppedWaiting, Waiting, may_pass
from poise_client.errors import InvalidRequestError, PoiseClientError, VersionMismatchError
from poise_client.types import Group, Prompt, Sampling

logger = logging.getLogger(__name__)

_PROMPT_FIELD = re.compile(r"prompts\[(\d+)\]\.?")

_STREAM_TIMEOUT_S = 3600.0
_PUSH_PATIENCE_S = 5.0
"""Weights on their way are nothing to speak of for this long."""


@dataclass(frozen=True, slots=True)
class RejectedPrompt:
    """A prompt that every replica rejects; yielded in place of its group."""

    group_id: str
    reason: str


class Dispatch:
    """One request for groups, spread over replicas. Its call must run once."""

    def __init__(
        self,
        replicas: Replicas,
        stopping: asyncio.Event,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> None:
        self._replicas = replicas
        self._stopping = stopping
        self._run_id = run_id
        self._step = step
        self._num_rollouts = num_rollouts
        self._sampling = sampling
        self._min_policy_version = min_policy_version
        self._num_left = len(prompts)
        self._queue = deque(prompts)
        """Not given to any replica."""
        self._calls: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[Group | RejectedPrompt | Exception | None] = asyncio.Queue()
        """What calls bring; None where things have changed."""
        self._has_looked = False
        self._waiting = Waiting("generation", stopping)

    async def groups(self) -> AsyncGenerator[Group | RejectedPrompt, None]:
        """Yield every group once, as it is finished, or that its prompt was rejected. Closing it ends what still runs.

        Raises:
            StoppedWaiting: stopping was asked for while no replica could take what is left.
            PoiseClientError: a replica refused in a way that waiting does not mend.
        """
        self._replicas.want(self._min_policy_version)
        watch = asyncio.create_task(self._watch(), name="watch replicas")
        try:
            while self._num_left:
                self._give()
                self._say()
                item = await self._events.get()
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    self._num_left -= 1
                    yield item
        finally:
            for task in (watch, *self._calls):
                task.cancel()
            await asyncio.gather(watch, *self._calls, return_exceptions=True)

    async def _watch(self) -> None:
        """Keep looking for replicas that could help, or are lost."""
        while True:
            try:
                await self._replicas.look()
            except Exception as error:
                self._events.put_nowait(error)
                return
            self._has_looked = True
            self._events.put_nowait(None)
            await waiting.pause(self._stopping)

    def _give(self) -> None:
        """Give what is left to the replicas with least to do, those given to one in one call."""
        shares: dict[Replica, list[tuple[Prompt, float]]] = {}
        while self._queue:
            replica = self._replicas.choose(self._min_policy_version, self._num_rollouts)
            if replica is None:
                break
            prompt = self._queue.popleft()
            num_tokens = self._replicas.expected_tokens(prompt, self._num_rollouts, self._sampling)
            replica.take(self._num_rollouts, num_tokens)
            shares.setdefault(replica, []).append((prompt, num_tokens))
        for replica, share in shares.items():
            call = asyncio.create_task(self._call(replica, share), name=f"sample at {replica.target}")
            for calls in (self._calls, replica.calls):
                calls.add(call)
                call.add_done_callback(calls.discard)

    def _say(self) -> None:
        """Tell of waiting while nobody is at work, and obey a stop."""
        if self._calls or not self._has_looked:
            return
        if self._stopping.is_set():
            raise StoppedWaiting("generation")
        patience_s = _PUSH_PATIENCE_S if self._replicas.are_some_ready else 0.0  # a push is on its way
        self._waiting.say(self._replicas.trouble, patience_s, starting=self._replicas.are_starting)

    async def _call(self, replica: Replica, share: Sequence[tuple[Prompt, float]]) -> None:
        """Have a replica sample its share; what it leaves undone is given again."""
        left = {prompt.group_id: (prompt, num_tokens) for prompt, num_tokens in share}
        asked = list(left)
        replica.heard()
        try:
            groups = replica.client.stream_trajectories(
                self._run_id,
                self._step,
                [prompt for prompt, _ in left.values()],
                num_rollouts=self._num_rollouts,
                sampling=self._sampling,
                min_policy_version=self._min_policy_version,
                timeout_s=_STREAM_TIMEOUT_S,
            )
            async with contextlib.aclosing(groups):
                async for group in groups:
                    self._waiting.over()
                    if _is_cut_off(group):
                        logger.debug("new weights cut group %s off: it is sampled again", group.group_id)
                        replica.heard()
                        continue
                    _, num_tokens = left.pop(group.group_id)
                    replica.release(self._num_rollouts, num_tokens)
                    self._replicas.served(replica, group)
                    self._events.put_nowait(group)
        except VersionMismatchError as error:  # the learner's push is on its way
            replica.is_behind(self._min_policy_version, error)
        except InvalidRequestError as error:
            rejected = [
                RejectedPrompt(asked[index], reason)
                for index, reason in _rejected_prompts(error).items()
                if index < len(asked) and asked[index] in left
            ]
            for each in rejected:
                _, num_tokens = left.pop(each.group_id)
                replica.release(self._num_rollouts, num_tokens)
                self._events.put_nowait(each)
            if not rejected:
                self._events.put_nowait(error)
        except PoiseClientError as error:
            if not may_pass(error):
                self._events.put_nowait(error)
                return
            replica.failed(error)
        except Exception as error:
            self._events.put_nowait(error)
        finally:
            for prompt, num_tokens in reversed(left.values()):
                replica.release(self._num_rollouts, num_tokens)
                self._queue.appendleft(prompt)
            self._events.put_nowait(None)


def _is_cut_off(group: Group) -> bool:
    return any(rollout.finish_reason == "abort" for rollout in group.rollouts)


def _rejected_prompts(error: InvalidRequestError) -> dict[int, str]:
    """Return the reason for each rejected prompt, by index; empty if another field of the request is wrong too."""
    rejected: dict[int, str] = {}
    for field, what in error.violations:
        if match := _PROMPT_FIELD.match(field):
            rejected.setdefault(int(match[1]), f"{field[match.end() :]}: {what}")
        elif field:  # that of "and 7 more wrong fields" is empty
            return {}
    return rejected
