"""The value service as a whole: constructs the parts, and starts and stops them in the right order."""

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
from poise.value.consumer import LabelConsumer
from poise.value.dead_letters import dead_letter_routes
from poise.value.estimator import BaselineEstimator
from poise.value.gateway import ValueGateway
from poise.value.label_barrier import Changes, Settling
from poise.value.metrics import StateCollector, ValueMetrics
from poise.value.probe.incremental import GramFitter
from poise.value.probe.model import ProbeFitter
from poise.value.servicer import ValueServicer, probe_status
from poise.value.standby import Standby
from poise.value.store.folder import StateStore
from poise.value.store.saver import StateKeeper
from poise.value.updater import Refitter
from poise_proto.v1 import value_pb2, value_pb2_grpc

QueueFactory = Callable[[str], LabelQueue]
"""Makes the queue for a consumer of the given name."""


@dataclasses.dataclass(frozen=True)
class _Running:
    """The parts that exist once the state is restored."""

    queue: LabelQueue
    estimator: BaselineEstimator
    keeper: StateKeeper
    refitter: Refitter
    consumer: LabelConsumer
    tasks: tuple[asyncio.Task[None], ...]


class ValueApp(ServiceApp):
    """The value service."""

    config: ValueConfig

    def __init__(
        self,
        config: ValueConfig,
        make_queue: QueueFactory,
        make_fitter: Callable[[], ProbeFitter],
        registry: CollectorRegistry | None = None,
    ) -> None:
        super().__init__(config, registry or CollectorRegistry())
        self._make_queue = make_queue
        self._make_fitter = make_fitter
        self._store = StateStore(config.state_dir)
        self._metrics = ValueMetrics(self.registry)
        self._startup = Startup("restoring the state")
        self._servicer = ValueServicer(config, self._startup)
        self._standby = Standby(config.standby, self._store)
        self._running: _Running | None = None
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
        gateway = ValueGateway(self._servicer, self._standby)
        value_pb2_grpc.add_ValueServiceServicer_to_server(gateway, server)

    async def start(self) -> None:
        """Restore the state and begin to consume. A queue that is down delays consuming, not answering.

        A standby passes calls on until the state is its own.
        """
        saved = await self._standby.open_state(self.grpc_address)
        estimator = BaselineEstimator(self.config, saved)
        keeper = StateKeeper(estimator, self._store, self._metrics, self.fail)
        if saved is None:
            await keeper.keep()  # the name under which the queue is read must outlive a crash
        queue = self._make_queue(estimator.instance_id)
        queue.expect(estimator.newest_entry)
        changes = Changes()
        refitter = Refitter(estimator, self._make_fitter, keeper, queue, self._metrics, changes)
        consumer = LabelConsumer(queue, estimator, keeper, refitter, self.config.queue, self._metrics, changes)
        self.registry.register(StateCollector(estimator, lambda: consumer.depth))
        tasks = (
            asyncio.create_task(consumer.run(), name="value-consumer"),
            asyncio.create_task(refitter.run(), name="value-refitter"),
        )
        self._running = _Running(queue, estimator, keeper, refitter, consumer, tasks)
        self._servicer.open(estimator, queue, Settling(queue, estimator, consumer, refitter, changes))
        await self._standby.end()

    async def drain(self) -> None:
        """Refuse requests, finish the batch and the fit in hand, make all of it durable."""
        self._draining = True
        self._servicer.close()
        if self._running is None:
            return
        self._running.consumer.stop()
        self._running.refitter.stop()
        await asyncio.gather(*self._running.tasks)
        # Failing loses nothing: what is not durable was not acknowledged, and comes again. The keeper has said so.
        with contextlib.suppress(OSError):
            await self._running.keeper.keep()

    async def stop(self) -> None:
        """See `ServiceApp`."""
        if self._running is not None:
            for task in self._running.tasks:
                task.cancel()
            await asyncio.gather(*self._running.tasks, return_exceptions=True)
            await self._running.queue.close()
        await self._standby.end()
        self._store.close()

    def readiness(self) -> Readiness:
        """Ready while labels are consumed or deliberately paused."""
        if self._draining:
            return Readiness(False, "draining")
        running = self._running
        if self._standby.relay is not None:
            return Readiness(not self._standby.problem, self._standby.problem)
        if running is None:
            return Readiness(False, self._startup.stage, self._startup.elapsed_s)
        problem = running.keeper.problem or running.consumer.problem
        return Readiness(not problem, problem)

    def status(self) -> dict[str, Any]:
        """See `ServiceApp`."""
        running = self._running
        if self._standby.relay is not None:
            return {"state": "standby", "holder": self._standby.relay.target, "problem": self._standby.problem}
        if running is None:
            return {"state": "starting"}
        estimator = running.estimator
        return {
            "state": "draining" if self._draining else "paused" if running.consumer.paused else "serving",
            "problem": running.keeper.problem or running.consumer.problem,
            "instance_id": estimator.instance_id,
            "num_groups_consumed": estimator.num_groups_consumed,
            "num_duplicates": estimator.num_duplicates,
            "num_dead_letters": running.consumer.depth.num_dead_letters,
            "num_pending": running.consumer.depth.num_entries,
            "num_queue_losses": running.consumer.depth.num_losses,
            "last_queue_loss": running.consumer.depth.last_loss,
            "queue_warnings": list(running.consumer.depth.warnings),
            "probes": [self._probe_facts(estimator, name) for name in sorted(estimator.domains)],
        }

    def _probe_facts(self, estimator: BaselineEstimator, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = _without_nan(
            dataclasses.asdict(probe_status(estimator, name, self.config.probe.warmup_steps))
        )
        return facts

    async def pause(self) -> None:
        """Consume no labels until `resume`; questions are answered and labels queued meanwhile."""
        self._parts().consumer.pause()

    async def resume(self) -> None:
        """Consume labels again."""
        self._parts().consumer.resume()

    async def checkpoint(self) -> dict[str, Any]:
        """Make the state durable now."""
        running = self._parts()
        try:
            path = await running.keeper.keep()
        except OSError as error:
            raise BackendDown(
                f"the state cannot be written: {error}", remedy="Check that state_dir is writable and has room."
            ) from error
        return {"path": str(path), "num_groups_consumed": running.estimator.num_groups_consumed}

    def admin_routes(self) -> APIRouter:
        """See `dead_letters`."""
        return dead_letter_routes(lambda: self._parts().queue)

    def _parts(self) -> _Running:
        if self._standby.relay is not None:
            raise BackendDown(
                f"this replica is a standby; the one at {self._standby.relay.target} holds the state",
                remedy="Ask that one's admin port.",
            )
        if self._running is None or self._draining:
            raise Draining("the value service is starting or shutting down", retry_after_s=1.0)
        return self._running


def _without_nan(facts: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(facts, dict):
        return {key: _without_nan(value) for key, value in facts.items()}
    return None if isinstance(facts, float) and math.isnan(facts) else facts


def build(config: ValueConfig) -> ValueApp:
    """Construct the service on Redis Streams. No I/O."""
    probe = config.probe
    return ValueApp(
        config,
        lambda consumer: redis_queue(config.queue, consumer),
        lambda: GramFitter(
            probe.inputs,
            probe.prompt_components,
            probe.response_components,
            probe.alpha,
            probe.rows_per_component,
            incremental=probe.refit == "incremental",
        ),
    )


def redis_queue(config: QueueConfig, consumer: str) -> RedisQueue:
    """Construct the queue for a consumer of the given name."""
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
