"""The three services as the loop sees them: always there in the end.

Owns the clients, and waiting out restarts; how prompts are spread over generation replicas is `dispatch`'s. Built on
the public SDK alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from poise.orchestrator.config import EndpointsConfig
from poise.orchestrator.sampling.load_balancer import Dispatch, RejectedPrompt
from poise.orchestrator.sampling.replicas import Replicas
from poise.orchestrator.sampling.waiting import StoppedWaiting, Waiting, may_pass, pause
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

logger = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", AsyncGenerationClient, AsyncValueClient, AsyncLearnerClient)

_NO_RETRIES = RetryPolicy(max_attempts=1)
"""Whoever waits here says so, and can be stopped; the clients would do it in silence."""
_ASK_TIMEOUT_S = 3.0
_CALL_TIMEOUT_S = 60.0
_SUBMIT_TIMEOUT_S = 3600.0
_EXPORT_TIMEOUT_S = 3600.0
CHECKED_AT_ONCE = 256
"""Prompts in a call that checks them: few enough to spread over replicas and to show progress."""
_CHECKS_AT_ONCE = 8
"""Concurrent `check_prompts` calls."""


class Services:
    """Clients of all services. Use as an async context manager.

    Every method raises `StoppedWaiting` when `stopping` is set while it waits for a service.
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
            named = TlsOptions(config.ca_file, server_name=address.server_name) if config.ca_file else None
            return client(AsyncGenerationClient, address.target, named)

        self._replicas = Replicas(Discovery(config.generation), connect, config.rollouts_per_replica)
        self._value = client(AsyncValueClient, config.value, tls)
        self._learner = client(AsyncLearnerClient, config.learner, tls)

    async def __aenter__(self) -> Services:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._replicas.close()
        for client in (self._value, self._learner):
            await client.close()

    @property
    def served_tokens(self) -> dict[str, int]:
        """Response tokens that each generation replica has handed over so far, by address."""
        return self._replicas.served_tokens

    async def wait_until_up(self, *, with_value: bool) -> None:
        """Return once all services answer, one replica of generation's; say at once, and again, who is waited for."""
        await self._ask_learner(lambda: self._learner.get_status(timeout_s=_ASK_TIMEOUT_S))
        await self.wait_for_generation()
        if with_value:
            await self._ask_value(lambda: self._value.get_probe(timeout_s=_ASK_TIMEOUT_S))

    def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group | RejectedPrompt, None]:
        """Yield every group once, from replicas that serve at least `min_policy_version`; see `Dispatch.groups`.

        Groups that new weights cut off (`in_flight: abort`) are sampled again: nobody is to train on halves.
        """
        dispatch = Dispatch(
            self._replicas, self._stopping, run_id, step, prompts, num_rollouts, sampling, min_policy_version
        )
        return dispatch.groups()

    async def generation_policy(self) -> Policy:
        """See `AsyncGenerationClient.get_policy`: of any replica that is ready."""
        return await self._ask_generation(lambda client: client.get_policy(timeout_s=_ASK_TIMEOUT_S))

    async def check_prompts(
        self, contents: Sequence[PromptContent], on_checked: Callable[[int], None]
    ) -> list[PromptCheck]:
        """Return the check of each prompt, in order; `on_checked` receives the number of prompts checked so far."""
        numbered = [Prompt(f"{index:08d}", content) for index, content in enumerate(contents)]
        parts = [numbered[first : first + CHECKED_AT_ONCE] for first in range(0, len(numbered), CHECKED_AT_ONCE)]
        gate = asyncio.Semaphore(_CHECKS_AT_ONCE)
        num_checked = 0

        async def check(part: Sequence[Prompt]) -> list[PromptCheck]:
            nonlocal num_checked
            async with gate:
                answer = await self._ask_generation(lambda client: client.check_prompts(part))
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
        """See `AsyncValueClient`."""
        timeout_s = _CALL_TIMEOUT_S + wait_for_labels_s
        return await self._ask_value(
            lambda: self._value.estimate_baselines(
                run_id, step, groups, wait_for_labels_s=wait_for_labels_s, timeout_s=timeout_s
            )
        )

    async def publish_labels(self, groups: Sequence[Group]) -> int:
        """See `AsyncValueClient`."""
        return await self._ask_value(lambda: self._value.publish_labels(groups, timeout_s=_CALL_TIMEOUT_S))

    async def probe_report(self) -> ProbeReport:
        """See `AsyncValueClient.get_probe`."""
        return await self._ask_value(lambda: self._value.get_probe(timeout_s=_CALL_TIMEOUT_S))

    async def submit_advantages(self, batch: Batch) -> StepResult:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.submit_advantages(batch, timeout_s=_SUBMIT_TIMEOUT_S))

    async def learner_status(self) -> LearnerStatus:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.get_status(timeout_s=_CALL_TIMEOUT_S))

    async def export_model(self, name: str) -> ModelExport:
        """See `AsyncLearnerClient`."""
        return await self._ask_learner(lambda: self._learner.export_model(name, timeout_s=_EXPORT_TIMEOUT_S))

    async def check_export(self, name: str) -> ModelExport:
        """Raise what an export of this name would raise; see `AsyncLearnerClient.export_model`."""
        return await self._ask_learner(
            lambda: self._learner.export_model(name, check_only=True, timeout_s=_EXPORT_TIMEOUT_S)
        )

    async def is_learner_there(self) -> bool:
        """Whether anybody answers at the learner's address, ready or not."""
        try:
            await self._learner.get_status(timeout_s=_ASK_TIMEOUT_S)
        except UnavailableError as error:
            return error.reason != UnavailableError.default_reason
        except PoiseClientError:
            pass  # whoever asks again is told
        return True

    async def wait_for_generation(self) -> None:
        """Return once a replica is ready; say at once, and again, what is waited for."""
        waiting = Waiting("generation", self._stopping)
        while True:
            await self._replicas.look()
            if self._replicas.are_some_ready:
                waiting.over()
                return
            waiting.say(self._replicas.trouble, starting=self._replicas.are_starting)
            if self._stopping.is_set():
                raise StoppedWaiting("generation")
            await pause(self._stopping)

    async def _ask_generation(self, call: Callable[[AsyncGenerationClient], Awaitable[T]]) -> T:
        """Call a replica that is ready; rotate over the replicas."""

        async def ask() -> T:
            while (client := self._replicas.next_ready()) is None:
                await self.wait_for_generation()
            return await call(client)

        return await self._persist("generation", ask)

    async def _ask_value(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._persist(f"value at {self._value.target}", call)

    async def _ask_learner(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._persist(f"learner at {self._learner.target}", call)

    async def _persist(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it succeeds, or fails in a way that waiting does not mend."""
        waiting = Waiting(name, self._stopping)
        while True:
            try:
                answer = await call()
            except PoiseClientError as error:
                if not may_pass(error):
                    raise
                await waiting.pause(error)
            else:
                waiting.over()
                return answer
