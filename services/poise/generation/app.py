"""The generation service: builds its engine and servicer, watches the engine, and decides when it is ready."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine, EngineInfo
from poise.generation.metrics import GenerationMetrics
from poise.generation.servicer import GenerationServicer
from poise.runtime.service import Readiness, ServiceApp
from poise.runtime.startup import Startup
from poise_proto.v1 import generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

LOADING = "the model is still loading"
"""The startup stage to report before the engine reports its own."""

_WATCH_INTERVAL_S = 0.5
_HUNG_S = 600.0
"""The engine counts as hung if no rollout starts or finishes for this time, or for max_model_len seconds if longer."""


class GenerationApp(ServiceApp):
    """The generation service."""

    config: GenerationConfig

    def __init__(self, config: GenerationConfig, engine: Engine, startup: Startup | None = None) -> None:
        """`startup` receives the engine's progress while the model loads."""
        super().__init__(config, CollectorRegistry())
        self.engine = engine
        self._startup = startup or Startup(LOADING)
        self._metrics = GenerationMetrics(
            self.registry,
            num_running=lambda: self.servicer.sampler.num_running,
            num_accepted=lambda: self.servicer.sampler.num_accepted,
        )
        self.servicer = GenerationServicer(engine, config, self._metrics, self._not_ready_reason)
        self._started = False
        self._paused = False
        self._draining = False
        self._watcher: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """See `ServiceApp`."""
        return "generation"

    @property
    def grpc_services(self) -> Sequence[str]:
        """See `ServiceApp`."""
        return [generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name]

    def register(self, server: grpc.aio.Server) -> None:
        """See `ServiceApp`."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.servicer, server)

    async def start(self) -> None:
        """Load the model and start watching the engine."""
        if self.config.lora is not None:
            self._startup.begin("reading the model's files")
        await asyncio.to_thread(self.servicer.receiver.start)
        await self.engine.start()
        self._started = True
        self._metrics.loaded()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watcher")

    async def drain(self) -> None:
        """Reject new rollouts and wait for the accepted ones to finish."""
        self._draining = True
        await self.servicer.sampler.wait_until_idle()

    async def stop(self) -> None:
        """See `ServiceApp`."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self.engine.stop()
        self.servicer.sampler.close()
        self.servicer.receiver.close()

    def readiness(self) -> Readiness:
        """Ready once rollouts are accepted."""
        reason = self._not_ready_reason()
        return Readiness(not reason, reason, None if self._started else self._startup.elapsed_s)

    def status(self) -> dict[str, Any]:
        """See `ServiceApp`."""
        policy = self.servicer.policy
        return {
            "instance_id": self.servicer.instance_id,
            "lineage_id": policy.lineage_id,
            "policy_version": policy.policy_version,
            "digest": policy.digest.hex(),
            "keeps_base": self.servicer.receiver.keeps_base,
            "num_running": self.servicer.sampler.num_running,
            "num_accepted": self.servicer.sampler.num_accepted,
            "paused": self._paused,
            "engine": _info_dict(self.engine.info) if self._started else None,
        }

    async def pause(self) -> None:
        """Reject new rollouts until `resume`. Accepted rollouts continue."""
        self._paused = True

    async def resume(self) -> None:
        """Accept rollouts again."""
        self._paused = False

    def _not_ready_reason(self) -> str:
        if self._draining:
            return "the generation service is shutting down"
        if not self._started:
            return self._startup.stage
        if not self.engine.is_alive():
            return "the engine died"
        if self._paused:
            return "paused; resume with POST /admin/v1/resume"
        if self.config.wait_for_learner and not self.servicer.policy.lineage_id:
            return "waiting for a learner to push the weights"
        return ""

    async def _watch(self) -> None:
        """End the process when the engine dies or hangs."""
        limit_s = max(_HUNG_S, self.engine.info.max_model_len)
        while self.engine.is_alive():
            if self.servicer.sampler.stalled_s > limit_s:
                self.fail(f"the engine hangs: no rollout started or finished for {limit_s:.0f} s")
                return
            await asyncio.sleep(_WATCH_INTERVAL_S)
        self.fail("the engine died")


def _info_dict(info: EngineInfo) -> dict[str, Any]:
    """Return an engine's info as JSON values."""
    return dataclasses.asdict(info) | {"tokenizer_digest": info.tokenizer_digest.hex()}


def make_engine(config: GenerationConfig, startup: Startup | None = None) -> Engine:
    """Return the engine that the settings choose, not started. Imports its libraries; no other I/O.

    Raises:
        ConfigError: the path of vLLM's sockets would be too long.
    """
    if config.engine == "torch":
        from poise.generation.engines.transformers.engine import TorchEngine

        return TorchEngine(config, startup)
    from poise.generation.engines.vllm.launch import check_socket_folder

    check_socket_folder()
    from poise.generation.engines.vllm.engine import VllmEngine

    return VllmEngine(config, startup)


def build(config: GenerationConfig) -> GenerationApp:
    """Return the service, not started. Imports the engine's libraries; no other I/O."""
    startup = Startup(LOADING)
    return GenerationApp(config, make_engine(config, startup), startup)
