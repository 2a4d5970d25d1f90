"""Builds the value service and defines what it does on start, drain and stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from fastapi import APIRouter
from prometheus_client import CollectorRegistry

from poise.errors import BackendDown, Draining
from poise.queue.interface import LabelQueue
from poise.queue.redis_queue import RedisQueue
from poise.runtime.service import Readiness, ServiceApp
from poise.runtime.startup import Startup
from poise.value.config import QueueConfig, ValueConfig
from poise.value.dead_letters import dead_letter_routes
from poise.value.estimators.interface import Fitter
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.score.fitter import ScoreFitter
from poise.value.metrics import StateCollector, ValueMetrics
from poise.value.servicer import ValueServicer
from poise.value.state import ValueState
from poise.value.store import StateStore
from poise.value.updater import Updater
from poise_proto.v1 import value_pb2, value_pb2_grpc


class ValueApp(ServiceApp):
    """The value service."""

    config: ValueConfig

    def __init__(
        self,
        config: ValueConfig,
        make_queue: Callable[[str], LabelQueue],
        make_fitter: Callable[[str], Fitter],
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`make_queue` returns the queue for a consumer of the given name, `make_fitter` the fitter of a domain."""
        super().__init__(config, registry or CollectorRegistry())
        self._make_queue = make_queue
        self._make_fitter = make_fitter
        self._store = StateStore(config.state_dir)
        self._metrics = ValueMetrics(self.registry)
        self._startup = Startup("restoring the state")
        self._servicer = ValueServicer(config, self._startup)
        self._updater: Updater | None = None
        self._task: asyncio.Task[None] | None = None
        self._draining = False

    @property
    def name(self) -> str:
        """See `ServiceApp`."""
        return "value"

    @property
    def grpc_services(self) -> Sequence[str]:
        """See `ServiceApp`."""
        return [value_pb2.DESCRIPTOR.services_by_name["ValueService"].full_name]

    def register(self, server: grpc.aio.Server) -> None:
        """See `ServiceApp`."""
        value_pb2_grpc.add_ValueServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Restore the state and start to consume. If the queue is down, requests are answered, and labels wait."""
        saved = await asyncio.to_thread(self._store.open)
        state = ValueState(self.config, saved)
        queue = self._make_queue(state.instance_id)
        updater = Updater(self.config.queue, state, queue, self._store, self._make_fitter, self._metrics, self.fail)
        if saved is None:
            await updater.save()  # the consumer's name must survive a crash
        queue.expect_at_least(state.newest_entry)
        self.registry.register(StateCollector(state, lambda: updater.depth))
        self._task = asyncio.create_task(updater.run(), name="value-updater")
        self._updater = updater
        self._servicer.open(updater)

    async def drain(self) -> None:
        """Reject requests, finish the current batch and fit, and save the state."""
        self._draining = True
        self._servicer.close()
        if self._updater is None or self._task is None:
            return
        self._updater.stop()
        await self._task
        # A failure loses nothing: unsaved labels are not acknowledged and are delivered again. `save` logs it.
        with contextlib.suppress(OSError):
            await self._updater.save()

    async def stop(self) -> None:
        """See `ServiceApp`."""
        if self._updater is not None and self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._updater.queue.close()
        self._store.close()

    def readiness(self) -> Readiness:
        """Ready while labels are consumed, or consumption is paused on request."""
        if self._draining:
            return Readiness(False, "draining")
        if self._updater is None:
            return Readiness(False, self._startup.stage, self._startup.elapsed_s)
        return Readiness(not self._updater.problem, self._updater.problem)

    def status(self) -> dict[str, Any]:
        """See `ServiceApp`."""
        if self._updater is None:
            return {"state": "starting"}
        updater, state, depth = self._updater, self._updater.state, self._updater.depth
        probes = (state.probe_status(name) for name in sorted(state.domains))
        return {
            "state": "draining" if self._draining else "paused" if updater.paused else "serving",
            "problem": updater.problem,
            "instance_id": state.instance_id,
            "num_groups_consumed": state.num_groups_consumed,
            "num_duplicates": state.num_duplicates,
            "num_dead_letters": depth.num_dead_letters,
            "num_pending": depth.num_entries,
            "num_queue_losses": depth.num_losses,
            "last_queue_loss": depth.last_loss,
            "queue_warnings": list(depth.warnings),
            "probes": [_without_nan(dataclasses.asdict(probe)) for probe in probes],
        }

    async def pause(self) -> None:
        """Stop consuming labels until `resume`. Requests are still answered and labels still queued."""
        self._running().pause()

    async def resume(self) -> None:
        """Consume labels again."""
        self._running().resume()

    async def checkpoint(self) -> dict[str, Any]:
        """Save the state now."""
        updater = self._running()
        try:
            path = await updater.save()
        except OSError as error:
            raise BackendDown(
                f"the state cannot be saved: {error}", remedy="Check that state_dir is writable and has free space."
            ) from error
        return {"path": str(path), "num_groups_consumed": updater.state.num_groups_consumed}

    def admin_routes(self) -> APIRouter:
        """See `dead_letters`."""
        return dead_letter_routes(lambda: self._running().queue)

    def _running(self) -> Updater:
        if self._updater is None or self._draining:
            raise Draining("the value service is starting or shutting down", retry_after_s=1.0)
        return self._updater


def _without_nan(facts: Any) -> Any:
    """Replace NaN by None, because JSON has no NaN."""
    if isinstance(facts, dict):
        return {key: _without_nan(value) for key, value in facts.items()}
    return None if isinstance(facts, float) and math.isnan(facts) else facts


def build(config: ValueConfig) -> ValueApp:
    """Build the service with a Redis Streams queue. No I/O."""
    return ValueApp(
        config,
        lambda consumer: redis_queue(config.queue, consumer),
        lambda domain: make_fitter(config, domain),
    )


def make_fitter(config: ValueConfig, domain: str) -> Fitter:
    """Return a fitter of the domain's estimator."""
    estimator, probe = config.estimator_of(domain), config.probe
    if estimator != "probe":
        return ScoreFitter(estimator, probe.prompt_components, probe.rows_per_component)
    return IncrementalFitter(
        probe.inputs,
        probe.prompt_components,
        probe.response_components,
        probe.alpha,
        probe.rows_per_component,
        incremental=probe.refit == "incremental",
    )


def redis_queue(config: QueueConfig, consumer: str) -> RedisQueue:
    """Return the queue for a consumer of the given name."""
    return RedisQueue(
        config.url.get_secret_value(),
        stream=config.stream,
        group=config.group,
        consumer=consumer,
        max_entries=config.max_entries,
        max_bytes=config.max_bytes,
        max_dead_letters=config.max_dead_letters,
        max_dead_letter_bytes=config.max_dead_letter_bytes,
        claim_idle_s=config.claim_idle_s,
    )
