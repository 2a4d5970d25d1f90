"""Calls to a replica that waits for the state folder, passed on to the replica that holds it.

All replicas thus answer with the same probes and the same pins, for one process alone makes them: the order invariant
needs no agreement between machines. Knows no probe, no queue and no state.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from poise.errors import BackendDown
from poise_client import TlsOptions, open_channel
from poise_proto.v1 import value_pb2 as pb

RELAYED = "poise-relayed"
"""Metadata of calls that were passed on: they are not passed on again, or two replicas would do so for ever."""

_SERVICE = pb.DESCRIPTOR.services_by_name["ValueService"]
_STATUS_KEY = "grpc-status-details-bin"
_HEALTH_TIMEOUT_S = 1.0


class Relay:
    """The way to another value service."""

    def __init__(self, target: str, tls: TlsOptions | None) -> None:
        self.target = target
        self._channel = open_channel(target, tls)

    async def pass_on(self, method: str, request: Message, context: Any) -> Any:
        """Ask the other service with the caller's token and deadline; return its answer, or end the call as it did.

        Raises:
            BackendDown: it does not answer.
        """
        described = _SERVICE.methods_by_name[method]
        ask = self._channel.unary_unary(
            f"/{_SERVICE.full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(pb, described.output_type.name).FromString,
        )
        given = context.invocation_metadata() or ()
        metadata = [(RELAYED, "1"), *((key, value) for key, value in given if key == "authorization")]
        try:
            return await ask(request, metadata=metadata, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            status = _given_status(error)
            if status is None:
                raise BackendDown(
                    f"the value service at {self.target}, which holds the state, does not answer: {error.details()}",
                    remedy="Try again: it restarts, or another takes over.",
                    retry_after_s=0.5,
                ) from error
            await context.abort_with_status(rpc_status.to_status(status))

    async def is_serving(self) -> bool:
        """Whether the other service answers and is ready."""
        try:
            answer = await health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
        serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
        return serving

    async def close(self) -> None:
        """Let go of the channel."""
        await self._channel.close(None)


def was_relayed(context: Any) -> bool:
    """Whether another replica passed a call on."""
    return any(key == RELAYED for key, _ in context.invocation_metadata() or ())


def _given_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """Return the error that the other service gave; None of one that gRPC made up on the way."""
    trailing: Any = error.trailing_metadata()
    for key, value in trailing or ():
        if key == _STATUS_KEY:
            return status_pb2.Status.FromString(value)
    return None
