"""A service whose RPCs, start and drain are scripted. The tests in this folder run it as a process."""

# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import grpc
from fastapi import APIRouter
from pydantic_settings import SettingsConfigDict

from poise import errors
from poise.runtime.cli.service_main import service_main
from poise.runtime.config.settings import ConfigError, ServiceConfig
from poise.runtime.service import Readiness, ServiceApp
from poise_proto.v1 import generation_pb2, generation_pb2_grpc, value_pb2, value_pb2_grpc


class StageConfig(ServiceConfig):
    """What the service does."""

    model_config = SettingsConfigDict(env_prefix="POISE_STAGE_")

    start: Literal["ok", "hang", "give-up", "backend-down", "misconfigured", "unusable", "defect", "unreadable"] = "ok"
    drain: Literal["ok", "hang", "defect", "until-released"] = "ok"
    release: Path | None = None


class StageApp(value_pb2_grpc.ValueServiceServicer, generation_pb2_grpc.GenerationServiceServicer, ServiceApp):
    config: StageConfig

    def __init__(self, config: StageConfig) -> None:
        ServiceApp.__init__(self, config)
        self.state = "starting"
        self.events: list[str] = []
        self.draining = asyncio.Event()

    name = "stage"

    @property
    def grpc_services(self) -> Sequence[str]:
        return ["poise.v1.ValueService", "poise.v1.GenerationService"]

    def register(self, server: Any) -> None:
        value_pb2_grpc.add_ValueServiceServicer_to_server(self, server)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server)

    async def start(self) -> None:
        match self.config.start:
            case "hang":
                await asyncio.Event().wait()
            case "give-up":
                self.fail("the engine died while it was loading")
                await asyncio.Event().wait()
            case "backend-down":
                raise errors.BackendDown("the cupboard does not answer")
            case "misconfigured":
                raise ConfigError("cupboard.key: fits no lock; set another")
            case "unusable":
                raise errors.Unusable("the cupboard is of another make", remedy="Name one of ours.")
            case "defect":
                raise RuntimeError("a slip of the pen")
        self.state = ""

    async def drain(self) -> None:
        self.draining.set()
        match self.config.drain:
            case "hang":
                await asyncio.Event().wait()
            case "defect":
                raise RuntimeError("a slip of the pen")
            case "until-released":
                assert self.config.release is not None
                while not self.config.release.exists():
                    await asyncio.sleep(0.01)

    async def stop(self) -> None:
        print("released everything", file=sys.stderr)

    def readiness(self) -> Readiness:
        if self.config.start == "unreadable":
            raise RuntimeError("a slip of the pen")
        return Readiness(not self.state, self.state)

    def status(self) -> dict[str, Any]:
        return {"events": self.events}

    async def pause(self) -> None:
        self.state = "paused"

    async def resume(self) -> None:
        self.state = ""

    async def checkpoint(self) -> dict[str, Any]:
        return {"path": "somewhere"}

    async def GetProbe(self, request: value_pb2.GetProbeRequest, context: Any) -> value_pb2.GetProbeResponse:
        match request.domain:
            case "defect":
                raise RuntimeError("the s3cret of the pharaohs")
            case "hang":
                await self._hang()
            case "until-draining":
                self.events.append("waiting")
                await self.draining.wait()
            case "inner-cancel":
                inner = asyncio.create_task(asyncio.Event().wait())
                asyncio.get_running_loop().call_soon(inner.cancel)
                await inner
            case "fail":
                self.fail("the engine died")
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")
            case "many-wrong-fields":
                raise errors.InvalidRequest(
                    [errors.FieldViolation(f"groups[{i}].domain", "is wrong, naïvely " * 20) for i in range(500)]
                )
            case "long-message":
                raise errors.NotFound("长" * 5000, remedy="也" * 5000, retry_after_s=2.5)
        return value_pb2.GetProbeResponse(estimator=value_pb2.ESTIMATOR_PROBE, num_pending=7)

    async def StreamTrajectories(self, request: generation_pb2.StreamTrajectoriesRequest, context: Any) -> Any:
        self.events.append("streaming")
        try:
            # Each message is larger than what HTTP/2 lets be sent unread: the second write waits for the reader.
            while True:
                yield generation_pb2.StreamTrajectoriesResponse(group_id="x" * 3_000_000)
                if request.run_id == "hang":
                    await asyncio.Event().wait()
        finally:
            self.events.append("closed")

    async def UpdateWeights(self, requests: Any, context: Any) -> generation_pb2.UpdateWeightsResponse:
        num_chunks = 0
        try:
            async for _ in requests:
                num_chunks += 1
                self.events.append(f"chunk {num_chunks}")
        finally:
            self.events.append("push over")
        return generation_pb2.UpdateWeightsResponse(policy_version=num_chunks)

    async def _hang(self) -> None:
        self.events.append("hanging")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise

    def admin_routes(self) -> APIRouter:
        router = APIRouter()

        @router.get("/raise/{name}", summary="Raise the error of that name.")
        async def raise_error(name: str, retry_after_s: float | None = None) -> None:
            if name == "InvalidRequest":
                raise errors.InvalidRequest.field("name", "is refused", remedy="Ask for another.")
            if name == "Defect":
                raise RuntimeError("the s3cret of the pharaohs")
            raise getattr(errors, name)("on demand", remedy="Ask for another.", retry_after_s=retry_after_s)

        return router


if __name__ == "__main__":
    sys.exit(service_main("stage", StageConfig, StageApp))
