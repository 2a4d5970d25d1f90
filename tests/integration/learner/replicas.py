"""A generation replica without a model that receives pushes like the service, and fails on demand."""

# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry

from poise.errors import BackendDown
from poise.generation.served_policy import ServedPolicy, must_apply
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise_client import RetryPolicy
from poise_proto.v1 import generation_pb2 as pb
from poise_proto.v1 import generation_pb2_grpc

TIMEOUT_S = 240.0

NO_RETRIES = RetryPolicy(max_attempts=1)


async def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until `condition` is true; return its value."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it never came to pass"
        await asyncio.sleep(0.01)
    return answer


def interceptors(service: str, registry: CollectorRegistry) -> list[grpc.aio.ServerInterceptor]:
    return [ServiceInterceptor(service, BearerAuth(None), registry, 64)]


class Replica(generation_pb2_grpc.GenerationServiceServicer):
    """One replica at a fixed address, where it can die and restart."""

    def __init__(self) -> None:
        self.policy = ServedPolicy()
        self.tensors: dict[str, bytes] = {}
        self.applied: list[int] = []
        """Versions, in order."""
        self.num_requests = self.num_pushes = 0
        self.release, self.answers = asyncio.Event(), asyncio.Event()
        """While unset, pushes or GetPolicy hang."""
        self.release.set()
        self.answers.set()
        self.breaks = False
        """Whether a push fails in the middle."""
        self.takes_s = 0.0
        """Minimum duration of a push, s."""
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None

    async def start(self) -> Replica:
        self._server = grpc.aio.server(
            interceptors=interceptors("generation", CollectorRegistry()), options=[("grpc.so_reuseport", 0)]
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def restart(self, policy: ServedPolicy = ServedPolicy()) -> None:  # noqa: B008 (frozen)
        """Restart without state and serve `policy`, by default the model as loaded."""
        await self.stop()
        self.policy, self.tensors = policy, {}
        await self.start()

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        self.num_requests += 1
        await self.answers.wait()
        return pb.GetPolicyResponse(
            lineage_id=self.policy.lineage_id,
            policy_version=self.policy.policy_version,
            digest=self.policy.digest,
            ready=True,
        )

    async def UpdateWeights(self, requests: Any, context: Any) -> pb.UpdateWeightsResponse:
        self.num_pushes += 1
        begin = (await anext(aiter(requests))).manifest
        data = b"".join([message.chunk.data async for message in requests])
        pushed = ServedPolicy(begin.lineage_id, begin.policy_version, begin.digest)
        if not must_apply(self.policy, pushed):
            return pb.UpdateWeightsResponse(policy_version=pushed.policy_version, already_applied=True)
        await self.release.wait()
        await asyncio.sleep(self.takes_s)
        if self.breaks:
            raise BackendDown("the engine died")
        sizes = {"DTYPE_FLOAT32": 4, "DTYPE_BFLOAT16": 2}
        offset, tensors = 0, {}
        for tensor in begin.tensors:
            size = sizes[
                pb.WeightTensor.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number[tensor.dtype].name
            ]
            for extent in tensor.shape:
                size *= extent
            tensors[tensor.name] = data[offset : offset + size]
            assert hashlib.sha256(tensors[tensor.name]).digest() == tensor.sha256
            offset += size
        assert offset == len(data)
        self.policy, self.tensors = pushed, tensors
        self.applied.append(pushed.policy_version)
        return pb.UpdateWeightsResponse(policy_version=pushed.policy_version, pause_s=0.25)
