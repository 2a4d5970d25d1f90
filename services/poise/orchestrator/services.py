"""The three services as the loop sees them: always there in the end.

Owns waiting out restarts, saying so, and spreading prompts over generation replicas. Built on the public SDK alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from poise.orchestrator.config import EndpointsConfig
from poise.runtime.config import read_token_file
from poise_client import AsyncGenerationClient, AsyncLearnerClient, AsyncValueClient, RetryPolicy, TlsOptions
from poise_client.errors import DeadlineExceededError, PoiseClientError, VersionMismatchError
from poise_client.types import (
    Batch,
    Group,
    GroupBaselines,
    GroupFeatures,
    LabelledGroup,
    LearnerStatus,
    ModelExport,
    Prompt,
    Sampling,
    StepResult,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_EVERY_S = 1.0
_SAY_EVERY_S = 15.0
_PUSH_PATIENCE_S = 5.0
"""Weights on their way are nothing to speak of for this long."""
_NO_RETRIES = RetryPolicy(max_attempts=1)
"""Whoever waits here says so, and can be stopped; the clients would do it in silence."""
_ASK_TIMEOUT_S = 3.0
_CALL_TIMEOUT_S = 60.0
_STREAM_TIMEOUT_S = 3600.0
_SUBMIT_TIMEOUT_S = 3600.0


class StoppedWaiting(Exception):
    """Stopping was asked for while a service was out of reach."""


class Services:
    """Clients of all services. Use as an async context manager.

    Every method raises `StoppedWaiting` when `stopping` is set while it waits for a service.
    """

    def __init__(self, config: EndpointsConfig, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        token_file = config.token_file
        token = None if token_file is None else read_token_file(token_file, "endpoints.token_file")
        tls = TlsOptions(root_certs_file=config.ca_file) if config.ca_file else None
        self._generation = [
            AsyncGenerationClient(target, token=token, tls=tls, allow_insecure_token=True, retries=_NO_RETRIES)
            for target in config.generation
        ]
        self._value = AsyncValueClient(
            config.value, token=token, tls=tls, allow_insecure_token=True, retries=_NO_RETRIES
        )
        self._learner = AsyncLearnerClient(
            config.learner, token=token, tls=tls, allow_insecure_token=True, retries=_NO_RETRIES
        )

    async def __aenter__(self) -> Services:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for client in (*self._generation, self._value, self._learner):
            await client.close()

    async def wait_until_up(self, *, with_value: bool) -> None:
        """Return once every service answers; say at once, and again, which one is waited for."""
        await self._ask_learner(lambda: self._learner.get_status(timeout_s=_ASK_TIMEOUT_S))
        for client in self._generation:
            await self._persist(f"generation at {client.target}", partial(client.get_policy, timeout_s=_ASK_TIMEOUT_S))
        if with_value:
            await self._ask_value(lambda: self._value.get_probe(timeout_s=_ASK_TIMEOUT_S))

    async def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group, None]:
        """Yield every group once, from replicas that serve at least `min_policy_version`.

        Groups that new weights cut off (`in_flight: abort`) are sampled again: nobody is to train on halves.
        """
        finished: asyncio.Queue[Group | BaseException] = asyncio.Queue()

        async def drain(client: AsyncGenerationClient, share: Sequence[Prompt]) -> None:
            left = {prompt.group_id: prompt for prompt in share}
            waiting = _Waiting(f"generation at {client.target}", self._stopping)
            while left:
                try:
                    groups = client.stream_trajectories(
                        run_id,
                        step,
                        list(left.values()),
                        num_rollouts=num_rollouts,
                        sampling=sampling,
                        min_policy_version=min_policy_version,
                        timeout_s=_STREAM_TIMEOUT_S,
                    )
                    async with contextlib.aclosing(groups):
                        async for group in groups:
                            waiting.over()
                            if _is_cut_off(group):
                                logger.debug("new weights cut group %s off: it is sampled again", group.group_id)
                                continue
                            del left[group.group_id]
                            finished.put_nowait(group)
                except VersionMismatchError as error:  # the learner's push is on its way
                    await waiting.pause(error, patience_s=_PUSH_PATIENCE_S)
                except PoiseClientError as error:
                    if not _may_pass(error):
                        raise
                    await waiting.pause(error)

        async def report(client: AsyncGenerationClient, share: Sequence[Prompt]) -> None:
            try:
                await drain(client, share)
            except Exception as error:
                finished.put_nowait(error)

        num_replicas = len(self._generation)
        shares = [prompts[index::num_replicas] for index in range(num_replicas)]
        tasks = [
            asyncio.create_task(report(client, share))
            for client, share in zip(self._generation, shares, strict=True)
            if share
        ]
        try:
            for _ in prompts:
                item = await finished.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def estimate_baselines(self, run_id: str, step: int, groups: Sequence[GroupFeatures]) -> list[GroupBaselines]:
        """See `AsyncValueClient`."""
        return await self._ask_value(
            lambda: self._value.estimate_baselines(run_id, step, groups, timeout_s=_CALL_TIMEOUT_S)
        )

    async def publish_labels(self, groups: Sequence[LabelledGroup]) -> int:
        """See `AsyncValueClient`."""
        return await self._ask_value(lambda: self._value.publish_labels(groups, timeout_s=_CALL_TIMEOUT_S))

    async def submit_advantages(self, batch: Batch) -> StepResult:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.submit_advantages(batch, timeout_s=_SUBMIT_TIMEOUT_S))

    async def learner_status(self) -> LearnerStatus:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.get_status(timeout_s=_CALL_TIMEOUT_S))

    async def export_model(self, name: str) -> ModelExport:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.export_model(name))

    async def _ask_value(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._persist(f"value at {self._value.target}", call)

    async def _ask_learner(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._persist(f"learner at {self._learner.target}", call)

    async def _persist(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it succeeds, or fails in a way that waiting does not mend."""
        waiting = _Waiting(name, self._stopping)
        while True:
            try:
                answer = await call()
            except PoiseClientError as error:
                if not _may_pass(error):
                    raise
                await waiting.pause(error)
            else:
                waiting.over()
                return answer


def _is_cut_off(group: Group) -> bool:
    return any(rollout.finish_reason == "abort" for rollout in group.rollouts)


def _may_pass(error: PoiseClientError) -> bool:
    """Whether the same call may succeed later: also after a service hung, as on a busy machine it may."""
    return error.retryable or isinstance(error, DeadlineExceededError)


class _Waiting:
    """Waiting for one service: says so at once and now and then, and when it is over."""

    def __init__(self, name: str, stopping: asyncio.Event) -> None:
        self._name = name
        self._stopping = stopping
        self._since_s: float | None = None
        self._said_s: float | None = None

    async def pause(self, error: PoiseClientError, patience_s: float = 0.0) -> None:
        """Wait until the next attempt is due; `patience_s` is how long to wait before a word of it.

        Raises:
            StoppedWaiting: stopping was asked for.
        """
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s >= patience_s and (self._said_s is None or now_s - self._said_s >= _SAY_EVERY_S):
            remedy = "; `poise up` starts the services, `poise status` shows them" if self._said_s is None else ""
            logger.warning("waiting for %s: %s%s", self._name, error.message, remedy)
            self._said_s = now_s
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), max(_RETRY_EVERY_S, error.retry_after_s or 0.0))
        if self._stopping.is_set():
            raise StoppedWaiting(self._name)

    def over(self) -> None:
        """The service answered."""
        if self._said_s is not None and self._since_s is not None:
            logger.info("%s answers after %.0f s", self._name, time.monotonic() - self._since_s)
        self._since_s = self._said_s = None
