"""Clients of the three services, through the public SDK. Calls wait while a service restarts.

Prompts are spread over generation replicas by `load_balancer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from poise.orchestrator.config import EndpointsConfig
from poise.orchestrator.sampling.load_balancer import GroupRequest, RejectedPrompt
from poise.orchestrator.sampling.replicas import ReplicaPool
from poise.orchestrator.sampling.retry import WaitLog, is_transient
from poise.runtime.config.settings import check_readable, open_token_file
from poise.runtime.network.discovery import Address, Discovery
from poise_client import AsyncGenerationClient, AsyncLearnerClient, AsyncValueClient, RetryPolicy, TlsOptions
from poise_client.errors import PoiseClientError, UnavailableError
from poise_client.types import (
    Batch,
    Group,
    GroupBaselines,
    LearnerStatus,
    ModelExport,
    Policy,
    ProbeReport,
    Prompt,
    PromptCheck,
    PromptContent,
    Sampling,
    StepResult,
)

T = TypeVar("T")
C = TypeVar("C", AsyncGenerationClient, AsyncValueClient, AsyncLearnerClient)

_NO_RETRIES = RetryPolicy(max_attempts=1)
"""Retries happen here instead of in the clients: they are logged and can be stopped."""
_STATUS_TIMEOUT_S = 3.0
_CALL_TIMEOUT_S = 60.0
_SUBMIT_TIMEOUT_S = 3600.0
_EXPORT_TIMEOUT_S = 3600.0
PROMPTS_PER_CHECK = 256
"""Prompts per `check_prompts` call. Small enough to spread calls over replicas and to show progress."""
_MAX_CHECKS = 8
"""Concurrent `check_prompts` calls."""


class ServiceClients:
    """Clients of all services. Use as an async context manager.

    Methods raise `StopRequested` if `stopping` is set while they wait for a service.
    """

    def __init__(self, config: EndpointsConfig, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        secret = open_token_file(config.token_file, "endpoints.token_file")
        check_readable(config.ca_file, "endpoints.ca_file")
        tls = TlsOptions(root_certs_file=config.ca_file) if config.ca_file else None

        def client(kind: type[C], target: str, tls: TlsOptions | None) -> C:
            return kind(
                target,
                token_file=secret,
                tls=tls,
                allow_insecure_token=True,
                retries=_NO_RETRIES,
                use_proxy=config.use_proxy,
            )

        def connect(address: Address) -> AsyncGenerationClient:
            replica_tls = TlsOptions(config.ca_file, server_name=address.server_name) if config.ca_file else None
            return client(AsyncGenerationClient, address.target, replica_tls)

        self.replicas = ReplicaPool(Discovery(config.generation), connect, config.rollouts_per_replica)
        self._value = client(AsyncValueClient, config.value, tls)
        self._learner = client(AsyncLearnerClient, config.learner, tls)

    async def __aenter__(self) -> ServiceClients:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.replicas.close()
        for client in (self._value, self._learner):
            await client.close()

    async def wait_until_up(self, *, with_value: bool) -> None:
        """Return once learner, value and at least one generation replica answer. Log the reason for the wait."""
        await self._call_learner(lambda: self._learner.get_status(timeout_s=_STATUS_TIMEOUT_S))
        await self.wait_for_generation()
        if with_value:
            await self._call_value(lambda: self._value.get_probe(timeout_s=_STATUS_TIMEOUT_S))

    def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group | RejectedPrompt, None]:
        """Yield every group once, from replicas that serve at least `min_policy_version`; see `GroupRequest.groups`.

        Groups that a weight update aborted (`in_flight: abort`) are sampled again.
        """
        request = GroupRequest(
            self.replicas, self._stopping, run_id, step, prompts, num_rollouts, sampling, min_policy_version
        )
        return request.groups()

    async def generation_policy(self) -> Policy:
        """Return the policy of any ready replica; see `AsyncGenerationClient.get_policy`."""
        return await self._call_generation(lambda client: client.get_policy(timeout_s=_STATUS_TIMEOUT_S))

    async def check_prompts(
        self, contents: Sequence[PromptContent], on_checked: Callable[[int], None]
    ) -> list[PromptCheck]:
        """Return the check of each prompt, in order; call `on_checked` with the number of prompts checked so far."""
        numbered = [Prompt(f"{index:08d}", content) for index, content in enumerate(contents)]
        parts = [numbered[first : first + PROMPTS_PER_CHECK] for first in range(0, len(numbered), PROMPTS_PER_CHECK)]
        gate = asyncio.Semaphore(_MAX_CHECKS)
        num_checked = 0

        async def check(part: Sequence[Prompt]) -> list[PromptCheck]:
            nonlocal num_checked
            async with gate:
                answer = await self._call_generation(lambda client: client.check_prompts(part))
            num_checked += len(part)
            on_checked(num_checked)
            return answer

        calls = [asyncio.create_task(check(part)) for part in parts]
        try:
            return [each for call in calls for each in await call]
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def estimate_baselines(
        self, run_id: str, step: int, groups: Sequence[Group], wait_for_labels_s: float
    ) -> list[GroupBaselines]:
        """See `AsyncValueClient`. Wait up to `wait_for_labels_s` until the probe is fitted on all labels."""
        timeout_s = _CALL_TIMEOUT_S + wait_for_labels_s
        return await self._call_value(
            lambda: self._value.estimate_baselines(
                run_id, step, groups, wait_for_labels_s=wait_for_labels_s, timeout_s=timeout_s
            )
        )

    async def publish_labels(self, groups: Sequence[Group]) -> int:
        """See `AsyncValueClient`."""
        return await self._call_value(lambda: self._value.publish_labels(groups, timeout_s=_CALL_TIMEOUT_S))

    async def probe_report(self) -> ProbeReport:
        """See `AsyncValueClient.get_probe`."""
        return await self._call_value(lambda: self._value.get_probe(timeout_s=_CALL_TIMEOUT_S))

    async def submit_advantages(self, batch: Batch) -> StepResult:
        """See `AsyncLearnerClient`."""
        return await self._call_learner(lambda: self._learner.submit_advantages(batch, timeout_s=_SUBMIT_TIMEOUT_S))

    async def learner_status(self) -> LearnerStatus:
        """See `AsyncLearnerClient`."""
        return await self._call_learner(lambda: self._learner.get_status(timeout_s=_CALL_TIMEOUT_S))

    async def export_model(self, name: str) -> ModelExport:
        """See `AsyncLearnerClient`."""
        return await self._call_learner(lambda: self._learner.export_model(name, timeout_s=_EXPORT_TIMEOUT_S))

    async def check_export(self, name: str) -> ModelExport:
        """Check whether an export of this name would succeed; see `AsyncLearnerClient.export_model`."""
        return await self._call_learner(
            lambda: self._learner.export_model(name, check_only=True, timeout_s=_EXPORT_TIMEOUT_S)
        )

    async def is_learner_reachable(self) -> bool:
        """Return whether a learner answers at its address, even if it is not ready."""
        try:
            await self._learner.get_status(timeout_s=_STATUS_TIMEOUT_S)
        except UnavailableError as error:
            return error.reason != UnavailableError.default_reason
        except PoiseClientError:
            pass  # the next call raises it
        return True

    async def wait_for_generation(self) -> None:
        """Return once a replica is ready. Log the reason for the wait."""
        waiting = WaitLog("generation", self._stopping)
        while True:
            await self.replicas.refresh()
            if self.replicas.num_ready:
                waiting.done()
                return
            waiting.report(self.replicas.not_ready_reason, starting=self.replicas.all_starting)
            await waiting.pause()

    async def _call_generation(self, call: Callable[[AsyncGenerationClient], Awaitable[T]]) -> T:
        """Call a ready replica, in rotation."""

        async def call_next() -> T:
            while (client := self.replicas.next_ready()) is None:
                await self.wait_for_generation()
            return await call(client)

        return await self._retry("generation", call_next)

    async def _call_value(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._retry(f"value at {self._value.target}", call)

    async def _call_learner(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._retry(f"learner at {self._learner.target}", call)

    async def _retry(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it succeeds or fails with a permanent error."""
        waiting = WaitLog(name, self._stopping)
        while True:
            try:
                answer = await call()
            except PoiseClientError as error:
                if not is_transient(error):
                    raise
                waiting.report(f"{name}: {error.message}", starting=error.starting)
                await waiting.pause(error.retry_after_s or 0.0)
            else:
                waiting.done()
                return answer
