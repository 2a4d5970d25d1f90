"""The interface that every service implements. `runtime.server` runs it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from fastapi import APIRouter
from prometheus_client import CollectorRegistry

from poise.errors import InvalidRequest
from poise.runtime.config.settings import ServiceConfig
from poise.runtime.startup import with_elapsed


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a service accepts work now, and why not."""

    ready: bool
    reason: str = ""
    elapsed_s: float | None = field(default=None, compare=False)
    """Seconds since `reason` began to apply; None if unknown."""

    @property
    def text(self) -> str:
        """Why it is not ready, with the seconds: `loading weights, 40 s`. Empty when it is ready."""
        return self.reason if self.elapsed_s is None else with_elapsed(self.reason, self.elapsed_s)


@dataclass
class ServiceApp(ABC):
    """One service. Its constructor does no I/O; `start` does."""

    config: ServiceConfig
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""
    stop_requested: asyncio.Event = field(default_factory=asyncio.Event)
    """Set it to drain and exit, as the first SIGTERM does."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name: "generation", "value" or "learner"."""

    @property
    @abstractmethod
    def grpc_services(self) -> Sequence[str]:
        """Full names of its gRPC services, for health checks and reflection."""

    @abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers to the server."""

    @abstractmethod
    async def start(self) -> None:
        """Load, connect and restore. The gRPC and admin ports already respond; the service is not ready."""

    @abstractmethod
    async def drain(self) -> None:
        """Reject new work with `Draining`, finish running work, make the state durable."""

    @abstractmethod
    async def stop(self) -> None:
        """Release all resources. Called once, after `drain` or a failed `start`."""

    @abstractmethod
    def readiness(self) -> Readiness:
        """Return whether the service accepts work now. It is polled, so it must be cheap."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Return JSON-serialisable facts for `/admin/v1/status`."""

    def fail(self, reason: str) -> None:
        """End the process with status 1, so that its supervisor restarts it."""
        self.failure = reason
        self.failed.set()

    async def pause(self) -> None:
        """Reject new work until `resume`; running work continues."""
        raise InvalidRequest.field("action", f"the {self.name} service cannot pause")

    async def resume(self) -> None:
        """Accept work again."""
        raise InvalidRequest.field("action", f"the {self.name} service cannot pause")

    async def checkpoint(self) -> dict[str, Any]:
        """Make the state durable now; return its path and other facts."""
        raise InvalidRequest.field("action", f"the {self.name} service has no state to checkpoint")

    def admin_routes(self) -> APIRouter | None:
        """Return further REST routes of this service, for `/admin/v1`; None if it has none."""
        return None
