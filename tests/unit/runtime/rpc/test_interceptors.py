"""The interceptor without a network; tests/integration/runtime tests it with one."""

import asyncio
import types

import grpc
import pytest
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry

from poise.errors import Busy, Unauthenticated
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise.runtime.rpc.request_stream import MAX_MESSAGE_BYTES


class Order:
    """What the oven is asked for; like a generated message, it cannot be read from just any bytes."""

    DESCRIPTOR = types.SimpleNamespace(full_name="poise.Order")

    @classmethod
    def read(cls, data):
        if data == b"\xff":
            raise DecodeError("Wire format was corrupt")
        return data.decode()


class Context:
    """Notes what a call ended with."""

    def __init__(self):
        self.written, self.status = [], None

    async def write(self, message):
        self.written.append(message)

    async def abort_with_status(self, status):
        self.status = status
        raise grpc.aio.AbortError

    def code(self):
        return grpc.StatusCode.DATA_LOSS


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def wrapped(registry):
    """Wraps a behaviour as the server would have it."""
    interceptor = ServiceInterceptor("oven", BearerAuth("hunter2"), registry, max_concurrent_rpcs=2)

    def wrap(behaviour, kind="unary_unary", method="/poise.Oven/Bake", metadata=(("authorization", "Bearer hunter2"),)):
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(behaviour, Order.read, bytes.decode)
        details = types.SimpleNamespace(method=method, invocation_metadata=metadata)

        async def continuation(_):
            return handler

        async def call(requests=b"", context=None):
            around = await interceptor.intercept_service(continuation, details)
            assert around.request_deserializer is None
            answer = around.stream_unary or around.stream_stream
            return await answer(sent(requests) if isinstance(requests, bytes) else requests, context or Context())

        return call

    return wrap


def num_calls(registry, code, method="Bake"):
    return registry.get_sample_value("poise_oven_rpc_seconds_count", {"method": method, "code": code}) or 0


@pytest.mark.parametrize("kind", ["unary_unary", "stream_unary"])
async def test_response_is_returned_and_timed(wrapped, registry, kind):
    async def bake(request, context):
        requests = [request] if kind == "unary_unary" else [one async for one in request]
        return " and ".join(requests) + " baked"

    if kind == "unary_unary":
        assert await wrapped(bake, kind)(b"bread") == "bread baked"
    else:
        assert await wrapped(bake, kind)(sent(b"bread", b"cake")) == "bread and cake baked"
    assert num_calls(registry, "OK") == 1


async def sent(*messages):
    for message in messages:
        yield message


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b"\xff", "request: is not a poise.Order: Wire format was corrupt"),
        (bytes(MAX_MESSAGE_BYTES + 1), "request: has 4194305 bytes; the limit is 4194304"),
    ],
)
async def test_unparsable_request_is_rejected_after_authentication(wrapped, registry, kind, wrong, said):
    async def answer(request, context):
        if not kind.startswith("stream"):
            raise AssertionError("it was reached")
        assert await anext(request) == "bread"
        await anext(request)

    async def stream(request, context):
        await answer(request, context)
        yield

    behaviour = answer if kind.endswith("unary") else stream

    def request():
        return sent(b"bread", wrong) if kind.startswith("stream") else wrong

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(behaviour, kind)(request(), context)
    assert (context.status.code, context.status.details) == (grpc.StatusCode.INVALID_ARGUMENT, said)
    assert num_calls(registry, "INVALID_ARGUMENT") == 1
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(behaviour, kind, metadata=())(request(), context)
    assert context.status.code == grpc.StatusCode.UNAUTHENTICATED


async def test_wait_for_a_message_can_be_cancelled_and_repeated(wrapped):
    came = asyncio.Event()

    class Requests:
        def __aiter__(self):
            return self

        async def __anext__(self):
            await came.wait()
            return b"bread"

    async def bake(requests, context):
        waiting = asyncio.create_task(anext(requests))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        came.set()
        return await anext(requests)

    assert await wrapped(bake, "stream_unary")(Requests()) == "bread"


@pytest.mark.parametrize("kind", ["unary_stream", "stream_stream"])
async def test_response_stream_is_written_in_order(wrapped, registry, kind):
    async def bake(request, context):
        for number in range(3):
            yield number

    async def bake_by_writing(request, context):
        for number in range(3):
            await context.write(number)

    for behaviour in (bake, bake_by_writing):
        context = Context()
        await wrapped(behaviour, kind)(b"", context)
        assert context.written == [0, 1, 2]
    assert num_calls(registry, "OK") == 2


async def test_unknown_method_is_left_to_grpc(registry):
    async def continuation(_):
        return None

    interceptor = ServiceInterceptor("oven", BearerAuth(None), registry, 1)
    assert await interceptor.intercept_service(continuation, types.SimpleNamespace(method="/x/Y")) is None


async def test_cancelled_call_cancels_the_handler(wrapped, registry):
    began, reached = asyncio.Event(), asyncio.Event()

    async def bake(request, context):
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            reached.set()
            raise

    context = Context()
    task = asyncio.create_task(wrapped(bake)(b"", context))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reached.is_set()
    assert context.status is None
    assert num_calls(registry, "CANCELLED") == 1


async def leave():
    raise grpc.aio.InternalError("nobody reads")


@pytest.mark.parametrize("read", [leave, asyncio.Event().wait], ids=["gone", "reads nothing"])
async def test_unread_stream_is_closed_before_the_call_ends(wrapped, registry, monkeypatch, read):
    monkeypatch.setattr("poise.runtime.rpc.interceptors.WRITE_TIMEOUT_S", 0.01)
    closed = []

    class Gone(Context):
        async def write(self, message):
            await read()

    async def bake(request, context):
        try:
            yield 1
        finally:
            closed.append(True)

    with pytest.raises(asyncio.CancelledError):
        await wrapped(bake, "unary_stream")(b"", Gone())
    assert closed == [True]
    assert num_calls(registry, "CANCELLED") == 1


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_client_gone_before_its_error_is_not_a_bug(wrapped, registry, caplog, kind):
    class Gone(Context):
        async def abort_with_status(self, status):
            raise grpc.aio.InternalError("the call is over")

    async def refuse(request, context):
        raise Busy("too hot")

    async def abort(request, context):
        raise grpc.aio.InternalError("the call is over")

    for behaviour in (refuse, abort):
        with pytest.raises(asyncio.CancelledError):
            await wrapped(behaviour, kind)(b"", Gone())
    assert caplog.records == []
    assert num_calls(registry, "INTERNAL") == 0


async def test_failing_stream_keeps_its_written_messages(wrapped, registry):
    async def bake(request, context):
        yield 1
        raise Busy("too hot")

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(bake, "unary_stream")(b"", context)
    assert context.written == [1]
    assert context.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert num_calls(registry, "RESOURCE_EXHAUSTED") == 1


async def test_status_set_by_a_handler_is_kept(wrapped, registry):
    async def bake(request, context):
        raise grpc.aio.AbortError

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(bake)(b"", context)
    assert context.status is None
    assert num_calls(registry, "DATA_LOSS") == 1


async def test_slot_is_released_however_a_call_ends(wrapped):
    async def bake(request, context):
        if request == "defect":
            raise RuntimeError("burnt")
        if request == "refused":
            raise Busy("too hot")
        return "baked"

    for request in (b"defect", b"refused", b"bread") * 3:
        context = Context()
        if request == b"bread":
            assert await wrapped(bake)(request, context) == "baked"
        else:
            with pytest.raises(grpc.aio.AbortError):
                await wrapped(bake)(request, context)
            assert (context.status.code == grpc.StatusCode.INTERNAL) == (request == b"defect")


async def test_unauthenticated_call_takes_no_slot(wrapped, registry):
    async def bake(request, context):
        raise AssertionError("it was reached")

    for metadata in ((), None, (("authorization", "Bearer x"),), (("authorization", b"Bearer x"),)):
        context = Context()
        with pytest.raises(grpc.aio.AbortError):
            await wrapped(bake, metadata=metadata)(b"", context)
        assert context.status.code == grpc.StatusCode.UNAUTHENTICATED
    assert num_calls(registry, Unauthenticated.status) == 4


async def hold_places(wrapped, method="/poise.Oven/Bake"):
    """Occupy both places of a method; return the calls, and what ends them."""
    began, hot = asyncio.Semaphore(0), asyncio.Event()

    async def bake(request, context):
        began.release()
        await hot.wait()

    calls = [asyncio.create_task(wrapped(bake, method=method)()) for _ in range(2)]
    for _ in calls:
        await began.acquire()
    return calls, hot


async def check(request, context):
    return "healthy"


async def test_each_method_has_its_own_limit(wrapped):
    calls, hot = await hold_places(wrapped)
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(check)(b"", context)
    assert context.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 calls of Bake" in context.status.details
    assert await wrapped(check, method="/poise.Oven/GetStatus")() == "healthy"
    hot.set()
    await asyncio.gather(*calls)
    assert await wrapped(check)() == "healthy"


async def test_health_needs_no_token(wrapped):
    assert await wrapped(check, method="/grpc.health.v1.Health/Check", metadata=())() == "healthy"
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(check, method="/grpc.health.v1.HealthX/Check", metadata=())()


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_unauthenticated_request_is_not_read(wrapped, kind):
    async def requests():
        raise AssertionError("it was read")
        yield b""

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(check, kind, metadata=())(requests(), context)
    assert context.status.code == grpc.StatusCode.UNAUTHENTICATED


async def test_incomplete_request_takes_no_slot(wrapped):
    async def never():
        await asyncio.Event().wait()
        yield b""

    halves = [asyncio.create_task(wrapped(check)(never())) for _ in range(5)]
    await asyncio.sleep(0)
    assert await wrapped(check)() == "healthy"
    for half in halves:
        half.cancel()
    await asyncio.gather(*halves, return_exceptions=True)


async def test_call_without_a_request_is_rejected(wrapped):
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await wrapped(check)(sent(), context)
    assert context.status.code == grpc.StatusCode.INVALID_ARGUMENT
