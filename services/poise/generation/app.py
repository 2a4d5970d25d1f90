"""The generation service as a whole: the engine, what is served, and when it is ready."""

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
"""The first stage of a start, until the engine reports its own."""

_WATCH_EVERY_S = 0.5
_HUNG_S = 600.0
"""An engine out of which nothing comes hangs: after this, or, where that is longer, a second for each token that its
longest rollout may have."""


class GenerationApp(ServiceApp):
    """The generation service."""

    config: GenerationConfig

    def __init__(self, config: GenerationConfig, engine: Engine, startup: Startup | None = None) -> None:
        """`startup` is where the engine reports its progress."""
        super().__init__(config, CollectorRegistry())
        self._engine = engine
        self._startup = startup or Startup(LOADING)
        self._metrics = GenerationMetrics(
            self.registry,
            num_running=lambda: self._servicer.sampler.num_running,
            num_accepted=lambda: self._servicer.sampler.num_accepted,
        )
        self._servicer = GenerationServicer(engine, config, self._metrics, self._refusal)
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
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Load the model, then watch over the engine."""
        if self.config.lora is not None:
            self._startup.begin("reading the model's files")
        await asyncio.to_thread(self._servicer.pushes.start)
        await self._engine.start()
        self._started = True
        self._metrics.loaded()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watcher")

    async def drain(self) -> None:
        """Refuse new rollouts and let those accepted finish."""
        self._draining = True
        await self._servicer.sampler.idle()

    async def stop(self) -> None:
        """See `ServiceApp`."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._engine.stop()
        self._servicer.sampler.close()
        self._servicer.pushes.close()

    def readiness(self) -> Readiness:
        """Ready when rollouts are accepted, from the policy they should come from."""
        refusal = self._refusal()
        return Readiness(not refusal, refusal, None if self._started else self._startup.elapsed_s)

    def status(self) -> dict[str, Any]:
        """See `ServiceApp`."""
        policy = self._servicer.policy
        return {
            "instance_id": self._servicer.instance_id,
            "lineage_id": policy.lineage_id,
            "policy_version": policy.policy_version,
            "digest": policy.digest.hex(),
            "keeps_base": self._servicer.pushes.keeps_base,
            "num_running": self._servicer.sampler.num_running,
            "num_accepted": self._servicer.sampler.num_accepted,
            "paused": self._paused,
            "engine": _facts(self._engine.info) if self._started else None,
        }

    async def pause(self) -> None:
        """Refuse new rollouts until `resume`; those accepted go on."""
        self._paused = True

    async def resume(self) -> None:
        """Accept rollouts again."""
        self._paused = False

    def _refusal(self) -> str:
        if self._draining:
            return "the generation service is shutting down"
        if not self._started:
            return self._startup.stage
        if not self._engine.is_alive():
            return "the engine died"
        if self._paused:
            return "paused; resume by POST /admin/v1/resume"
        if self.config.wait_for_learner and not self._servicer.policy.lineage_id:
            return "waiting for a learner to push the weights"
        return ""

    async def _watch(self) -> None:
        """End the process when its engine is dead, or hangs."""
        limit_s = max(_HUNG_S, self._engine.info.max_model_len)
        while self._engine.is_alive():
            if self._servicer.sampler.quiet_s > limit_s:
                self.fail(f"the engine hangs: nothing has come out of it for {limit_s:.0f} s")
                return
            await asyncio.sleep(_WATCH_EVERY_S)
        self.fail("the engine died")


def _facts(info: EngineInfo) -> dict[str, Any]:
    """Return what the status shows of an engine, JSON-able."""
    return dataclasses.asdict(info) | {"tokenizer_digest": info.tokenizer_digest.hex()}


def make_engine(config: GenerationConfig, startup: Startup | None = None) -> Engine:
    """Construct the engine that the settings choose. No I/O; its libraries are imported here.

    Raises:
        ConfigError: vLLM's sockets would have too long a path.
    """
    if config.engine == "torch":
        from poise.generation.engines.transformers.engine import TorchEngine

        return TorchEngine(config, startup)
    from poise.generation.engines.vllm.launch import check_socket_folder

    check_socket_folder()
    from poise.generation.engines.vllm.engine import VllmEngine

    return VllmEngine(config, startup)


def build(config: GenerationConfig) -> GenerationApp:
    """Construct the service. No I/O; the engine's libraries are imported here, for the one chosen."""
    startup = Startup(LOADING)
    return GenerationApp(config, make_engine(config, startup), startup)
