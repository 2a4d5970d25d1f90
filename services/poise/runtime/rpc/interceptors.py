"""The interceptor of every RPC: authentication, concurrency limits, timing, tracing, and rich error statuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeGuard

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, Histogram

from poise.errors import BackendDown, Busy, InvalidRequest, PoiseError, Unauthenticated
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.request_stream import Parse, RequestStream
from poise.runtime.tracing import call_span
from poise_proto.v1 import errors_pb2

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300)
_BUSY_RETRY_S = 1.0

WRITE_TIMEOUT_S = 600.0
"""A call ends when its client reads nothing of a response stream for this time."""

# A client rejects headers of more than 8 KiB and then does not see our error at all. They contain the message twice,
# once with every byte beyond ASCII tripled; the details grow by a third.
_MESSAGE_BYTES, _REMEDY_BYTES, _FIELD_BYTES, _VIOLATIONS_BYTES = 600, 300, 400, 2500

Handler = Any  # a grpc.RpcMethodHandler; its stubs cover only the blocking API

_Read = Callable[[AsyncIterator[bytes]], contextlib.AbstractAsyncContextManager[Any]]


def rich_status(error: PoiseError) -> status_pb2.Status:
    """Return the gRPC status of an error, with PoiseErrorDetail and, where they apply, BadRequest and RetryInfo."""
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
    """Return as many violations as fit, and the number of the others."""
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
    """Return `text`, cut to `limit_bytes` of UTF-8."""
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: limit_bytes - len("…".encode())].decode(errors="ignore") + "…"


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Authenticates, limits, times and traces every call, and translates its errors.

    Each RPC has its own limit of concurrent calls, so that slow calls of one never block another, such as a status.
    """

    def __init__(self, service: str, auth: BearerAuth, registry: CollectorRegistry, max_concurrent_rpcs: int) -> None:
        self._auth = auth
        self._max_rpcs = max_concurrent_rpcs
        self._num_rpcs: Counter[str] = Counter()
        self._seconds = Histogram(
            f"poise_{service}_rpc_seconds",
            "Duration of an RPC.",
            ["method", "code"],
            buckets=_BUCKETS,
            registry=registry,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of a call.

        gRPC reads a single request, however large and slow, before it calls the handler. So every handler becomes one
        of a request stream without a deserializer: the caller is authenticated before anything is read, and the call
        parses its requests itself.
        """
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method: gRPC reports it
        call = _Call(self, handler_call_details, handler.request_deserializer)
        try:
            self._authenticate(handler_call_details)
        except Unauthenticated as error:
            return grpc.stream_stream_rpc_method_handler(call.rejection(error))
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        read = call.messages if handler.request_streaming else call.message
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                call.stream(behaviour, read), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(call.answer(behaviour, read), None, handler.response_serializer)

    @contextlib.contextmanager
    def admitted(self, method: str) -> Iterator[None]:
        """Count the call while the block runs. Raises `Busy` if its method has too many."""
        if self._num_rpcs[method] >= self._max_rpcs:
            raise Busy(
                f"{self._max_rpcs} calls of {method.rpartition('/')[2]} are running, the limit for one method",
                remedy="Call again later, or raise grpc.max_concurrent_rpcs.",
                retry_after_s=_BUSY_RETRY_S,
            )
        self._num_rpcs[method] += 1
        try:
            yield
        finally:
            self._num_rpcs[method] -= 1

    def _authenticate(self, details: grpc.HandlerCallDetails) -> None:
        """Raise `Unauthenticated` without the token. Health checks need none, so that probes work."""
        if details.method.startswith(_OPEN_SERVICES):
            return
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        given = values[0] if values else None
        self._auth.check(given.decode("latin-1") if isinstance(given, bytes) else given)

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Record a finished call."""
        self._seconds.labels(method=method.rpartition("/")[2], code=code).observe(seconds)


class _Call:
    """One call."""

    def __init__(self, interceptor: ServiceInterceptor, details: grpc.HandlerCallDetails, parse: Parse) -> None:
        self._interceptor = interceptor
        self._details = details
        self._parse = parse
        self._started = time.monotonic()

    def rejection(self, error: PoiseError) -> Callable[[Any, Any], Awaitable[None]]:
        """Return a handler that fails without reading anything."""

        async def call(requests: AsyncIterator[bytes], context: Any) -> None:
            await self._fail(error, context)

        return call

    @contextlib.asynccontextmanager
    async def message(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """Read the request, then count the call: incomplete requests do not count. Raises `InvalidRequest`, `Busy`."""
        try:
            request = await anext(RequestStream(self._parse, requests))
        except StopAsyncIteration:
            raise InvalidRequest.field("request", "is missing; the call ended without a message") from None
        with self._interceptor.admitted(self._details.method):
            yield request

    @contextlib.asynccontextmanager
    async def messages(self, requests: AsyncIterator[bytes]) -> AsyncIterator[RequestStream]:
        """Count the call, and yield its request stream. Raises `Busy`."""
        with self._interceptor.admitted(self._details.method):
            yield RequestStream(self._parse, requests)

    def answer(self, behaviour: Callable[[Any, Any], Awaitable[Any]], read: _Read) -> Callable[[Any, Any], Any]:
        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            try:
                async with read(requests) as request:
                    with self._traced():
                        response = await behaviour(request, context)
            except BaseException as error:
                await self._fail(error, context)
            self._done("OK")
            return response

        return call

    def stream(self, behaviour: Callable[[Any, Any], Any], read: _Read) -> Callable[[Any, Any], Awaitable[None]]:
        # Writes to the context instead of yielding. When the client disconnects during a write, gRPC abandons a
        # generator, which is closed only at the next garbage collection; the handler would keep working until then.
        async def call(requests: AsyncIterator[bytes], context: Any) -> None:
            try:
                async with read(requests) as request:
                    with self._traced():
                        responses = behaviour(request, context)
                        if hasattr(responses, "__aiter__"):
                            async with contextlib.aclosing(responses):
                                async for response in responses:
                                    await _write(context, response, self._details.method)
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
        if isinstance(error, _DISCONNECTED) or (isinstance(error, asyncio.CancelledError) and _is_cancelled()):
            self._done("CANCELLED")
            raise asyncio.CancelledError
        if isinstance(error, asyncio.CancelledError):
            # Something that the handler awaited was cancelled. If gRPC got this error, it would never answer the call.
            logger.warning("%s: cancelled inside the service", self._details.method)
            error = BackendDown("the work was cancelled inside the service", remedy="Call again.")
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
            status = rich_status(PoiseError("a bug in the service. Its log has the traceback"))
        try:
            await context.abort_with_status(rpc_status.to_status(status))
        except grpc.aio.InternalError as disconnected:
            raise asyncio.CancelledError from disconnected
        raise AssertionError("abort_with_status raises")


def is_disk_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is of a disk or folder. Network errors are `OSError`s too."""
    return isinstance(error, OSError) and not isinstance(error, (TimeoutError, ConnectionError))


def disk_error(error: OSError) -> PoiseError:
    """Return the error for a caller whose call failed on a disk or folder. It is not a bug, and worth a retry."""
    return BackendDown(
        f"the service's disk failed: {describe_disk_error(error)}", remedy="Then call again.", retry_after_s=1.0
    )


class _Disconnected(Exception):
    """The client has disconnected."""


_DISCONNECTED = (_Disconnected, grpc.aio.InternalError)
"""Errors of a call whose client has disconnected. gRPC raises the second if the call was cancelled."""


async def _write(context: Any, response: Any, method: str) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(response)
    except grpc.aio.InternalError as error:
        raise _Disconnected from error
    except TimeoutError as error:
        logger.warning("%s: the client has read nothing for %.0f s; ending the call", method, WRITE_TIMEOUT_S)
        raise _Disconnected from error


def _is_cancelled() -> bool:
    """Whether the RPC itself was cancelled, rather than something it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
