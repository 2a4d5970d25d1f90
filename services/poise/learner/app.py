"""The learner service: wires the core, the publisher and the servicer together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from poise.errors import BackendDown, Draining
from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.metrics import LearnerMetrics, ReplicaCollector
from poise.learner.publishing.publisher import Publisher
from poise.learner.publishing.transports import make_transport
from poise.learner.servicer import LearnerServicer
from poise.runtime.config.settings import check_readable, open_token_file
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.network.discovery import Address, Discovery
from poise.runtime.service import Readiness, ServiceApp
from poise_client import AsyncGenerationClient, RetryPolicy, TlsOptions
from poise_proto.v1 import learner_pb2, learner_pb2_grpc

logger = logging.getLogger(__name__)


class LearnerApp(ServiceApp):
    """The learner service."""

    config: LearnerConfig

    def __init__(self, config: LearnerConfig, core: LearnerCore, publisher: Publisher) -> None:
        super().__init__(config, CollectorRegistry())
        self._core = core
        self._publisher = publisher
        self._metrics = LearnerMetrics(self.registry, lambda: core.is_stopped)
        self._servicer = LearnerServicer(config, core, publisher, self._metrics, self.fail)
        self.registry.register(ReplicaCollector(lambda: publisher.results))

    @property
    def name(self) -> str:
        """See `ServiceApp`."""
        return "learner"

    @property
    def grpc_services(self) -> Sequence[str]:
        """See `ServiceApp`."""
        return [learner_pb2.DESCRIPTOR.services_by_name["LearnerService"].full_name]

    def register(self, server: grpc.aio.Server) -> None:
        """See `ServiceApp`."""
        learner_pb2_grpc.add_LearnerServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Recover the state. Replaying the batches since the last checkpoint may take minutes."""
        loop = asyncio.get_running_loop()

        def drain(reason: str) -> None:
            logger.warning("%s: the learner drains, and all its ranks exit", reason)
            self.stop_requested.set()

        self._core.listen(
            on_lost=lambda reason: loop.call_soon_threadsafe(self.fail, reason),
            on_leaving=lambda reason: loop.call_soon_threadsafe(drain, reason),
        )
        await self._servicer.recover()

    async def drain(self) -> None:
        """Finish the current batch and write a checkpoint."""
        await self._servicer.close()
        core = self._core
        if core.published and not core.failure and core.checkpoint_version != core.progress.policy_version:
            await self._servicer.on_thread(core.checkpoint)

    async def stop(self) -> None:
        """See `ServiceApp`."""
        try:
            await self._publisher.stop()
        finally:
            await self._servicer.stop()

    def readiness(self) -> Readiness:
        """Ready while batches are accepted."""
        reason = self._servicer.not_ready_reason or self._core.disk_error
        return Readiness(not reason, reason, self._servicer.starting_s)

    def status(self) -> dict[str, Any]:
        """See `ServiceApp`."""
        if self._core.published is None:
            return {"state": "recovering"}
        facts = dataclasses.asdict(self._servicer.status())
        replicas = [replica | {"digest": replica["digest"].hex()} for replica in facts["replicas"]]
        return facts | {"digest": facts["digest"].hex(), "replicas": replicas}

    async def pause(self) -> None:
        """Reject batches until `resume`; finish the current one."""
        self._check_recovered()
        self._servicer.paused = True

    async def resume(self) -> None:
        """Accept batches again."""
        self._check_recovered()
        self._servicer.paused = False
        self._metrics.resumed()

    async def checkpoint(self) -> dict[str, Any]:
        """Write a checkpoint after the current batch."""
        self._check_recovered()
        try:
            path = await self._servicer.on_thread(self._core.checkpoint)
        except OSError as error:
            raise BackendDown(
                f"the checkpoint cannot be written to state_dir {self.config.state_dir}: {describe_disk_error(error)}",
                remedy="Nothing is lost: the journal has all batches since the last checkpoint.",
            ) from error
        return {"path": str(path), "policy_version": self._core.checkpoint_version}

    def _check_recovered(self) -> None:
        if self._core.published is None:
            raise Draining("the learner is recovering", retry_after_s=1.0)


def build(config: LearnerConfig) -> LearnerApp:
    """Return the service. Reads only the replicas' token and CA file."""
    secret = open_token_file(config.replica_token_file, "replica_token_file")
    check_readable(config.replica_ca_file, "replica_ca_file")
    retries = RetryPolicy(max_attempts=1)  # the publisher retries, and a step waits for only one attempt

    def connect(address: Address) -> AsyncGenerationClient:
        authorities = config.replica_ca_file
        tls = TlsOptions(root_certs_file=authorities, server_name=address.server_name) if authorities else None
        return AsyncGenerationClient(
            address.target, token_file=secret, tls=tls, retries=retries, allow_insecure_token=True
        )

    publisher = Publisher(Discovery(config.replicas), connect, make_transport(config.push, config.device), config.push)
    return LearnerApp(config, LearnerCore(config), publisher)
