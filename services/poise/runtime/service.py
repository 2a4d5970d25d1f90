"""The shape of a service: what `runtime.serve` needs to know of one to run it.

Owns the interface alone; knows neither how it is served nor what any service does.
"""

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
    """Whether a service does its work now, and why not."""

    ready: bool
    reason: str = ""
    elapsed_s: float | None = field(default=None, compare=False)
    """How long the service has been at what `reason` names; None where that is not told."""

    @property
    def text(self) -> str:
        """Why it is not ready, with the seconds: `loading weights, 40 s`. Empty while it is."""
        return self.reason if self.elapsed_s is None else with_elapsed(self.reason, self.elapsed_s)


@dataclass
class ServiceApp(ABC):
    """One service. Its constructor does no I/O; `start` does."""

    config: ServiceConfig
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to drain and end, as a first SIGTERM does."""
    grpc_address: str = ""
    """host:port that is bound, set before `start`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name: "generation", "value", "learner"."""

    @property
    @abstractmethod
    def grpc_services(self) -> Sequence[str]:
        """Full names of the gRPC services offered, for health and reflection."""

    @abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers to the server."""

    @abstractmethod
    async def start(self) -> None:
        """Load, connect, restore. The gRPC and admin ports already answer meanwhile; readiness says no."""

    @abstractmethod
    async def drain(self) -> None:
        """Refuse new work with `Draining`, finish what was accepted, make state durable."""

    @abstractmethod
    async def stop(self) -> None:
        """Release everything. Called once, after `drain` or after a failed `start`."""

    @abstractmethod
    def readiness(self) -> Readiness:
        """Whether work is accepted and can be done now. Cheap: it is polled."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """JSON-able facts for `/admin/v1/status`."""

    def fail(self, reason: str) -> None:
        """Give up: the process ends with status 1, for whoever supervises it to start afresh."""
        self.failure = reason
        self.failed.set()

    async def pause(self) -> None:
        """Refuse new work until `resume`. Work in hand goes on."""
        raise InvalidRequest.field("action", f"the {self.name} service cannot pause")

    async def resume(self) -> None:
        """Accept work again."""
        raise InvalidRequest.field("action", f"the {self.name} service cannot pause")

    async def checkpoint(self) -> dict[str, Any]:
        """Make the state durable now; returns what was written."""
        raise InvalidRequest.field("action", f"the {self.name} service has no state to checkpoint")

    def admin_routes(self) -> APIRouter | None:
        """Further REST routes of this service, mounted under `/admin/v1`."""
        return None
