"""Spreads prompts over generation replicas and yields each group once, even if replicas fail.

A prompt is assigned to one replica at a time. It is reassigned only after the call to that replica has ended, so no
rollout is lost or counted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from poise.orchestrator.sampling.replicas import Replica, ReplicaPool
from poise.orchestrator.sampling.retry import StopRequested, WaitLog, is_transient, pause
from poise_client.errors import InvalidRequestError, PoiseClientError, VersionMismatchError
from poise_client.types import Group, Prompt, Sampling

logger = logging.getLogger(__name__)

_PROMPT_FIELD = re.compile(r"prompts\[(\d+)\]\.?")

_STREAM_TIMEOUT_S = 3600.0
_PUSH_PATIENCE_S = 5.0
"""A wait for a weight push is logged only after this time."""


@dataclass(frozen=True, slots=True)
class RejectedPrompt:
    """A prompt that generation rejects; yielded in place of its group."""

    group_id: str
    reason: str


class GroupRequest:
    """One request for groups, spread over replicas. Use each object once."""

    def __init__(
        self,
        replicas: ReplicaPool,
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
        """Prompts not assigned to a replica."""
        self._calls: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[Group | RejectedPrompt | Exception | None] = asyncio.Queue()
        """Results of the calls; None when prompts or replicas may be free again."""
        self._has_refreshed = False
        self._waiting = WaitLog("generation", stopping)

    async def groups(self) -> AsyncGenerator[Group | RejectedPrompt, None]:
        """Yield every group, or its rejected prompt, once it is finished. Closing the generator cancels open calls.

        Raises:
            StopRequested: a stop was requested while no replica could take the remaining prompts.
            PoiseClientError: a replica failed with a permanent error.
        """
        self._replicas.require_version(self._min_policy_version)
        refresh = asyncio.create_task(self._refresh(), name="refresh replicas")
        try:
            while self._num_left:
                self._assign()
                self._check_waiting()
                item = await self._events.get()
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    self._num_left -= 1
                    yield item
        finally:
            for task in (refresh, *self._calls):
                task.cancel()
            await asyncio.gather(refresh, *self._calls, return_exceptions=True)

    async def _refresh(self) -> None:
        """Keep the pool up to date: new replicas, ready ones, lost ones."""
        while True:
            try:
                await self._replicas.refresh()
            except Exception as error:
                self._events.put_nowait(error)
                return
            self._has_refreshed = True
            self._events.put_nowait(None)
            await pause(self._stopping)

    def _assign(self) -> None:
        """Assign the waiting prompts to the least loaded replicas, with one call for each replica."""
        shares: dict[Replica, list[tuple[Prompt, float]]] = {}
        while self._queue:
            replica = self._replicas.choose(self._min_policy_version, self._num_rollouts)
            if replica is None:
                break
            prompt = self._queue.popleft()
            num_tokens = self._replicas.expected_tokens(prompt, self._num_rollouts, self._sampling)
            replica.assign(self._num_rollouts, num_tokens)
            shares.setdefault(replica, []).append((prompt, num_tokens))
        for replica, share in shares.items():
            call = asyncio.create_task(self._call(replica, share), name=f"sample at {replica.target}")
            for calls in (self._calls, replica.calls):
                calls.add(call)
                call.add_done_callback(calls.discard)

    def _check_waiting(self) -> None:
        """If no replica is sampling, log the wait, or raise `StopRequested` after a stop request."""
        if self._calls or not self._has_refreshed:
            return
        if self._stopping.is_set():
            raise StopRequested("generation")
        patience_s = _PUSH_PATIENCE_S if self._replicas.num_ready else 0.0  # ready ones wait for a weight push
        self._waiting.report(self._replicas.not_ready_reason, patience_s, starting=self._replicas.all_starting)

    async def _call(self, replica: Replica, share: Sequence[tuple[Prompt, float]]) -> None:
        """Sample a share of the prompts on a replica; requeue those that it did not finish."""
        left = {prompt.group_id: (prompt, num_tokens) for prompt, num_tokens in share}
        group_ids = list(left)
        replica.mark_alive()
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
                    self._waiting.done()
                    if any(rollout.finish_reason == "abort" for rollout in group.rollouts):
                        logger.debug("a weight update aborted group %s; sampling it again", group.group_id)
                        replica.mark_alive()
                        continue
                    _, num_tokens = left.pop(group.group_id)
                    replica.release(self._num_rollouts, num_tokens)
                    self._replicas.record_group(replica, group)
                    self._events.put_nowait(group)
        except VersionMismatchError as error:  # the learner has not pushed this version to it yet
            replica.mark_behind(self._min_policy_version, error)
        except InvalidRequestError as error:
            rejected = [
                RejectedPrompt(group_ids[index], reason)
                for index, reason in _rejected_prompts(error).items()
                if index < len(group_ids) and group_ids[index] in left
            ]
            for each in rejected:
                _, num_tokens = left.pop(each.group_id)
                replica.release(self._num_rollouts, num_tokens)
                self._events.put_nowait(each)
            if not rejected:
                self._events.put_nowait(error)
        except PoiseClientError as error:
            if not is_transient(error):
                self._events.put_nowait(error)
                return
            replica.mark_failed(error)
        except Exception as error:
            self._events.put_nowait(error)
        finally:
            for prompt, num_tokens in reversed(left.values()):
                replica.release(self._num_rollouts, num_tokens)
                self._queue.appendleft(prompt)
            self._events.put_nowait(None)


def _rejected_prompts(error: InvalidRequestError) -> dict[int, str]:
    """Return the reason for each rejected prompt, by index; empty if another field of the request is invalid too."""
    rejected: dict[int, str] = {}
    for field, description in error.violations:
        if match := _PROMPT_FIELD.match(field):
            rejected.setdefault(int(match[1]), f"{field[match.end() :]}: {description}")
        elif field:  # empty for "and 7 more wrong fields"
            return {}
    return rejected
