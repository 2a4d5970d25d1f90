"""What happens around every RPC: the token, the time taken, and errors turned into rich statuses.

Owns the one mapping of the PoiseError family to the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeGuard

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, Histogram

from poise.errors import BackendDown, Busy, InvalidRequest, PoiseError
from poise.runtime.auth import BearerAuth
from poise.runtime.files import describe_disk_error
from poise.runtime.parsing import Parse, ParsedStream, parsed
from poise.runtime.tracing import call_span
from poise_proto.v1 import errors_pb2

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300)
_BUSY_RETRY_S = 1.0

# A client refuses headers of more than 8 KiB and then sees no error of ours at all. The message goes there twice, once
# with every byte beyond ASCII tripled; the details grow by a third.
_MESSAGE_BYTES, _REMEDY_BYTES, _FIELD_BYTES, _VIOLATIONS_BYTES = 600, 300, 400, 2500

Handler = Any  # a grpc.RpcMethodHandler; its stubs know the blocking API alone


def rich_status(error: PoiseError) -> status_pb2.Status:
    """Return what goes over the wire: PoiseErrorDetail, then BadRequest and RetryInfo where they apply."""
    details: list[Any] = [
        errors_pb2.PoiseErrorDetail(
            reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
            retryable=error.retryable,
            remedy=_shortened(error.remedy, _REMEDY_BYTES),
            starting=error.starting,
        )
    ]
    if isinstance(error, InvalidRequest):
        details.append(_bad_request(error))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    message = _shortened(error.message, _MESSAGE_BYTES)
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=message, details=packed)


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    """Name as many violations as there is room for, and say how many more there are."""
    answer = error_details_pb2.BadRequest()
    for index, violation in enumerate(error.violations):
        answer.field_violations.add(
            field=_shortened(violation.field, _FIELD_BYTES),
            description=_shortened(violation.description, _FIELD_BYTES),
        )
        if answer.ByteSize() > _VIOLATIONS_BYTES and index > 0:
            left_out = len(error.violations) - index
            answer.field_violations[index].CopyFrom(
                error_details_pb2.BadRequest.FieldViolation(description=f"and {left_out} more wrong fields")
            )
            break
    return answer


def _shortened(text: str, limit_bytes: int) -> str:
    """Return what can be sent of `text`, cut to so many bytes of UTF-8."""
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: limit_bytes - len("…".encode())].decode(errors="ignore") + "…"


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Authenticates, counts, times and translates the errors of every RPC."""

    def __init__(self, service: str, auth: BearerAuth, registry: CollectorRegistry, max_concurrent_rpcs: int) -> None:
        self._auth = auth
        self._max_rpcs = max_concurrent_rpcs
        self._num_rpcs = 0
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
        # Without a deserialiser of its own, gRPC hands over bytes: they are parsed once the call is admitted.
        around = _Around(self, handler_call_details, handler.request_deserializer)
        serialise = handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                around.answer(handler.unary_unary, around.message), None, serialise
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                around.stream(handler.unary_stream, around.message), None, serialise
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                around.answer(handler.stream_unary, around.messages), None, serialise
            )
        return grpc.stream_stream_rpc_method_handler(
            around.stream(handler.stream_stream, around.messages), None, serialise
        )

    @contextlib.contextmanager
    def admitted(self, details: grpc.HandlerCallDetails) -> Iterator[None]:
        """Hold a place for the call. Raises `Unauthenticated`, or `Busy` when all places are taken.

        Health answers whoever asks, however busy the service: else a probe would kill it for being in demand.
        """
        if details.method.startswith(_OPEN_SERVICES):
            yield
            return
        self._authenticate(details)
        if self._num_rpcs >= self._max_rpcs:
            raise Busy(
                f"{self._max_rpcs} calls are being served, the most at a time",
                remedy="Call again later, or raise grpc.max_concurrent_rpcs.",
                retry_after_s=_BUSY_RETRY_S,
            )
        self._num_rpcs += 1
        try:
            yield
        finally:
            self._num_rpcs -= 1

    def _authenticate(self, details: grpc.HandlerCallDetails) -> None:
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        given = values[0] if values else None
        self._auth.check(given.decode("latin-1") if isinstance(given, bytes) else given)

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Record a finished call."""
        self._seconds.labels(method=method.rpartition("/")[2], code=code).observe(seconds)


class _Around:
    """One call."""

    def __init__(self, interceptor: ServiceInterceptor, details: grpc.HandlerCallDetails, parse: Parse) -> None:
        self._interceptor = interceptor
        self._details = details
        self._parse = parse
        self._started = time.monotonic()

    def message(self, request: bytes) -> Any:
        """Return the one request. Raises `InvalidRequest`."""
        return parsed(self._parse, request)

    def messages(self, requests: AsyncIterator[bytes]) -> ParsedStream:
        """Return the requests of a stream."""
        return ParsedStream(self._parse, requests)

    def answer(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], read: Callable[[Any], Any]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            try:
                with self._interceptor.admitted(self._details), self._traced():
                    response = await behaviour(read(request), context)
            except BaseException as error:
                await self._fail(error, context)
            self._done("OK")
            return response

        return call

    def stream(
        self, behaviour: Callable[[Any, Any], Any], read: Callable[[Any], Any]
    ) -> Callable[[Any, Any], Awaitable[None]]:
        # Writes to the context instead of yielding: a generator that gRPC abandons, because the client went away
        # during a write, is closed at the next garbage collection only, and the handler would work on until then.
        async def call(request: Any, context: Any) -> None:
            try:
                with self._interceptor.admitted(self._details), self._traced():
                    responses = behaviour(read(request), context)
                    if hasattr(responses, "__aiter__"):
                        async with contextlib.aclosing(responses):
                            async for response in responses:
                                await _write(context, response)
                    else:
                        await responses  # handlers that write to the context, such as reflection's
            except BaseException as error:
                await self._fail(error, context)
            self._done("OK")

        return call

    def _traced(self) -> contextlib.AbstractContextManager[None]:
        method = self._details.method
        if method.startswith(_OPEN_SERVICES):
            return contextlib.nullcontext()
        return call_span(method.removeprefix("/"), tuple(self._details.invocation_metadata or ()))

    def _done(self, code: str) -> None:
        self._interceptor.observe(self._details.method, code, time.monotonic() - self._started)

    async def _fail(self, error: BaseException, context: Any) -> NoReturn:
        if isinstance(error, _ClientGone) or (isinstance(error, asyncio.CancelledError) and _is_cancelled()):
            self._done("CANCELLED")
            raise asyncio.CancelledError
        if isinstance(error, asyncio.CancelledError):
            # Something that the handler waited for was cancelled. Passed on, gRPC would never answer the call.
            logger.warning("%s: its work was cancelled within the service", self._details.method)
            error = BackendDown("the work was cancelled within the service", remedy="Call again.")
        if isinstance(error, grpc.aio.AbortError):
            self._done(context.code().name)
            raise error
        if is_disk_error(error):
            logger.error("%s failed: %s", self._details.method, error)
            error = disk_error(error)
        if isinstance(error, PoiseError):
            self._done(error.status)
            status = rich_status(error)
        else:
            self._done("INTERNAL")
            logger.error("%s failed", self._details.method, exc_info=error)
            status = rich_status(PoiseError("a defect in the service; its log holds the traceback"))
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort_with_status raises")


def is_disk_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether a disk or folder refused. Python counts what networks do among these errors, too."""
    return isinstance(error, OSError) and not isinstance(error, (TimeoutError, ConnectionError))


def disk_error(error: OSError) -> PoiseError:
    """Return what a caller is told of a disk or folder that refused: no defect, and it may pass."""
    return BackendDown(
        f"the service's disk refused: {describe_disk_error(error)}", remedy="Then call again.", retry_after_s=1.0
    )


class _ClientGone(Exception):
    """There is nobody to write to."""


async def _write(context: Any, response: Any) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise _ClientGone from error


def _is_cancelled() -> bool:
    """Whether the RPC itself was cancelled, rather than something it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
