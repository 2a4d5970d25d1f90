"""Connections to the three services: `connect` for scripts, `connect_async` for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

from poise_client._generation import AsyncGenerationClient
from poise_client._learner import AsyncLearnerClient
from poise_client._run import AsyncRun, Bootstrap
from poise_client._sync_clients import GenerationClient, LearnerClient, Run, ValueClient
from poise_client._transport.client import AsyncClient, ClientOptions
from poise_client._transport.sync import Blocking
from poise_client._value import AsyncValueClient


class AsyncServices:
    """The three services of a cluster. Use it as an async context manager; `connect_async` creates it."""

    def __init__(self, generation: str, value: str, learner: str, **options: Unpack[ClientOptions]) -> None:
        self.generation = AsyncGenerationClient(generation, **options)
        """Client of the generation service."""
        self.value = AsyncValueClient(value, **options)
        """Client of the value service."""
        self.learner = AsyncLearnerClient(learner, **options)
        """Client of the learner."""

    def __repr__(self) -> str:
        clients: Sequence[AsyncClient] = (self.generation, self.value, self.learner)
        return f"{type(self).__name__}({', '.join(client.target for client in clients)})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel running calls and close the channels for good. Safe to call twice."""
        await asyncio.gather(self.generation.close(), self.value.close(), self.learner.close())

    def run(self, run_id: str, *, domain: str | None = None, bootstrap: Bootstrap = "rloo") -> AsyncRun:
        """Return a training run. Nothing is sent until its first call.

        Args:
            run_id: name of the run. Reuse a name to continue that run; its steps are not trained twice.
            domain: domain of groups without one; "default" by default.
            bootstrap: baseline until the probe's first fit.
        """
        return AsyncRun(run_id, self.generation, self.value, self.learner, domain=domain, bootstrap=bootstrap)


class Services(Blocking[AsyncServices]):
    """The three services, for scripts, notebooks and threads. Use it as a context manager; `connect` creates it."""

    def __init__(self, generation: str, value: str, learner: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(AsyncServices(generation, value, learner, **options))
        self.generation = GenerationClient(generation, **options)
        """Client of the generation service."""
        self.value = ValueClient(value, **options)
        """Client of the value service."""
        self.learner = LearnerClient(learner, **options)
        """Client of the learner."""

    def close(self) -> None:
        """Cancel running calls of all threads and close the channels for good. Safe to call twice."""
        for client in (self.generation, self.value, self.learner):
            client.close()
        super().close()

    def run(self, run_id: str, *, domain: str | None = None, bootstrap: Bootstrap = "rloo") -> Run:
        """Return a training run; see `AsyncServices.run`."""
        return Run(self, self._client.run(run_id, domain=domain, bootstrap=bootstrap))


def connect(*, generation: str, value: str, learner: str, **options: Unpack[ClientOptions]) -> Services:
    """Return the services at three addresses. Channels open with the first call.

    Args:
        generation: address of a generation replica: `host:port`, `dns:///name:port` or `unix:path`.
        value: address of the value service.
        learner: address of the learner.
        options: see `ClientOptions`: token, token_file, tls, timeout_s, retries, allow_insecure_token, use_proxy.

    Raises:
        ValueError: invalid address, token or combination of options; a token file that other users can read.
        OSError: a file cannot be read.
    """
    return Services(generation, value, learner, **options)


def connect_async(*, generation: str, value: str, learner: str, **options: Unpack[ClientOptions]) -> AsyncServices:
    """Return the services for use in an event loop. Takes the arguments of `connect`."""
    return AsyncServices(generation, value, learner, **options)
