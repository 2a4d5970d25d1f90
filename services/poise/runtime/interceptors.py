"""What happens around every RPC: the token, the time taken, and errors turned into rich statuses.

Owns the one mapping of the PoiseError family to the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from poise_proto.v1 import errors_pb2
from prometheus_client import CollectorRegistry, Histogram

from poise.errors import InvalidRequest, PoiseError
from poise.runtime.auth import BearerAuth

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300)

Handler = Any  # a grpc.RpcMethodHandler; its stubs know the blocking API alone


def rich_status(error: PoiseError) -> status_pb2.Status:
    """Return what goes over the wire: PoiseErrorDetail, then BadRequest and RetryInfo where they apply."""
    details: list[Any] = [
        errors_pb2.PoiseErrorDetail(
            reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
            retryable=error.retryable,
            remedy=error.remedy,
        )
    ]
    if isinstance(error, InvalidRequest):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations[:100]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    # Headers have room for about 8 KiB in all.
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message[:1000], details=packed)


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Authenticates, times and translates the errors of every RPC."""

    def __init__(self, service: str, auth: BearerAuth, registry: CollectorRegistry) -> None:
        self._auth = auth
        self._seconds = Histogram(
            f"poise_{service}_rpc_seconds",
            "Time from accepting an RPC to its end.",
            ["method", "code"],
            buckets=_BUCKETS,
            registry=registry,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method: gRPC says so
        around = _Around(self, handler_call_details)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                around.answer(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                around.stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                around.answer(handler.stream_unary), handler.request_deserializer, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            around.stream(handler.stream_stream), handler.request_deserializer, handler.response_serializer
        )

    def authenticate(self, details: grpc.HandlerCallDetails) -> None:
        """Raise `Unauthenticated` unless the call may be made."""
        if details.method.startswith(_OPEN_SERVICES):
            return
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        given = values[0] if values else None
        self._auth.check(given.decode("latin-1") if isinstance(given, bytes) else given)

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Record a finished call."""
        self._seconds.labels(method=method.rpartition("/")[2], code=code).observe(seconds)


class _Around:
    """One call."""

    def __init__(self, interceptor: ServiceInterceptor, details: grpc.HandlerCallDetails) -> None:
        self._interceptor = interceptor
        self._details = details
        self._started = time.monotonic()

    def answer(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            try:
                self._interceptor.authenticate(self._details)
                response = await behaviour(request, context)
            except BaseException as error:
                await self._fail(error, context)
            self._done("OK")
            return response

        return call

    def stream(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._interceptor.authenticate(self._details)
                responses = behaviour(request, context)
                if hasattr(responses, "__aiter__"):
                    async for response in responses:
                        yield response
                else:
                    await responses  # handlers that write to the context, such as reflection's
            except BaseException as error:
                await self._fail(error, context)
            self._done("OK")

        return call

    def _done(self, code: str) -> None:
        self._interceptor.observe(self._details.method, code, time.monotonic() - self._started)

    async def _fail(self, error: BaseException, context: Any) -> NoReturn:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._done("CANCELLED")
            raise error
        if isinstance(error, grpc.aio.AbortError):
            self._done(str(context.code()))
            raise error
        if isinstance(error, PoiseError):
            self._done(error.status)
            status = rich_status(error)
        else:
            self._done("INTERNAL")
            logger.error("%s failed", self._details.method, exc_info=error)
            status = rich_status(PoiseError("a defect in the service; its log holds the traceback"))
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort_with_status raises")
