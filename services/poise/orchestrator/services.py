"""The three services as the loop sees them: always there in the end.

Owns waiting out restarts, and spreading prompts over generation replicas. Built on the public SDK alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from poise.orchestrator.config import EndpointsConfig
from poise.runtime.config import ConfigError
from poise_client import AsyncGenerationClient, AsyncLearnerClient, AsyncValueClient, TlsOptions
from poise_client.errors import PoiseClientError, VersionMismatchError
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
_ASK_TIMEOUT_S = 3.0
_CALL_TIMEOUT_S = 60.0
_STREAM_TIMEOUT_S = 3600.0
_SUBMIT_TIMEOUT_S = 3600.0


class Services:
    """Clients of all services. Use as an async context manager."""

    def __init__(self, config: EndpointsConfig) -> None:
        token = None
        if config.token_file is not None:
            try:
                token = config.token_file.read_text(encoding="ascii").strip()
            except OSError as error:
                raise ConfigError(f"endpoints.token_file: cannot be read: {error}") from error
        tls = TlsOptions(root_certs_file=config.ca_file) if config.ca_file else None
        self._generation = [
            AsyncGenerationClient(target, token=token, tls=tls, allow_insecure_token=True)
            for target in config.generation
        ]
        self._value = AsyncValueClient(config.value, token=token, tls=tls, allow_insecure_token=True)
        self._learner = AsyncLearnerClient(config.learner, token=token, tls=tls, allow_insecure_token=True)

    async def __aenter__(self) -> Services:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for client in (*self._generation, self._value, self._learner):
            await client.close()

    async def wait_until_up(self, *, with_value: bool) -> None:
        """Return once every service answers; say at once, and again, which one is waited for."""
        asked: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            (f"learner at {self._learner.target}", lambda: self._learner.get_status(timeout_s=_ASK_TIMEOUT_S)),
            *(
                (f"generation at {client.target}", partial(client.get_policy, timeout_s=_ASK_TIMEOUT_S))
                for client in self._generation
            ),
        ]
        if with_value:
            asked.append((f"value at {self._value.target}", lambda: self._value.get_probe(timeout_s=_ASK_TIMEOUT_S)))
        for name, ask in asked:
            while True:
                try:
                    await ask()
                    break
                except PoiseClientError as error:
                    if not error.retryable:
                        raise
                    logger.warning("waiting for %s: %s. `poise up` starts services", name, error.message)
                    await asyncio.sleep(_RETRY_EVERY_S)

    async def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group, None]:
        """Yield every group once, from replicas that serve at least `min_policy_version`."""
        finished: asyncio.Queue[Group | BaseException] = asyncio.Queue()

        async def drain(client: AsyncGenerationClient, share: Sequence[Prompt]) -> None:
            left = {prompt.group_id: prompt for prompt in share}
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
                            del left[group.group_id]
                            finished.put_nowait(group)
                except VersionMismatchError:
                    await asyncio.sleep(_RETRY_EVERY_S)  # the learner's push is on its way
                except PoiseClientError as error:
                    if not error.retryable:
                        finished.put_nowait(error)
                        return
                    _say_waiting(error)
                    await asyncio.sleep(_RETRY_EVERY_S)
                except Exception as error:
                    finished.put_nowait(error)
                    return

        num_replicas = len(self._generation)
        shares = [prompts[index::num_replicas] for index in range(num_replicas)]
        tasks = [
            asyncio.create_task(drain(client, share))
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
        return await _persist(lambda: self._value.estimate_baselines(run_id, step, groups, timeout_s=_CALL_TIMEOUT_S))

    async def publish_labels(self, groups: Sequence[LabelledGroup]) -> int:
        """See `AsyncValueClient`."""
        return await _persist(lambda: self._value.publish_labels(groups, timeout_s=_CALL_TIMEOUT_S))

    async def submit_advantages(self, batch: Batch) -> StepResult:
        """See `AsyncLearnerClient`."""
        return await _persist(lambda: self._learner.submit_advantages(batch, timeout_s=_SUBMIT_TIMEOUT_S))

    async def learner_status(self) -> LearnerStatus:
        """See `AsyncLearnerClient`."""
        return await _persist(lambda: self._learner.get_status(timeout_s=_CALL_TIMEOUT_S))

    async def export_model(self, name: str) -> ModelExport:
        """See `AsyncLearnerClient`."""
        return await _persist(lambda: self._learner.export_model(name))


async def _persist(call: Callable[[], Awaitable[T]]) -> T:
    """Call until it succeeds, or fails in a way that waiting does not mend."""
    while True:
        try:
            return await call()
        except PoiseClientError as error:
            if not error.retryable:
                raise
            _say_waiting(error)
            await asyncio.sleep(_RETRY_EVERY_S)


def _say_waiting(error: PoiseClientError) -> None:
    logger.warning("still waiting: %s", error)
