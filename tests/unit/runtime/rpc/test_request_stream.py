import asyncio

import pytest

from poise.errors import InvalidRequest
from poise.runtime.rpc import request_stream as parsing
from poise.runtime.rpc.request_stream import RequestStream, read_rest


def text(data):
    return data.decode()


async def sent(*messages, every_s=0.0):
    for message in messages:
        await asyncio.sleep(every_s)
        yield message


async def silent():
    await asyncio.Event().wait()
    yield b""


async def test_messages_arrive_in_order():
    assert [one async for one in RequestStream(text, sent(b"a", b"b"))] == ["a", "b"]


async def test_silent_client_is_disconnected():
    with pytest.raises(InvalidRequest, match=r"client fell more than 0\.01 s behind"):
        await anext(RequestStream(text, silent(), budget_s=0.01))


class Clock:
    """A clock that advances by a fixed time at each reading, so that every wait takes as long."""

    def __init__(self, step_s):
        self.now_s, self.step_s = 0.0, step_s

    def monotonic(self):
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def each_wait_takes(monkeypatch):
    def take(step_s):
        clock = Clock(step_s)
        monkeypatch.setattr(parsing, "time", clock)
        return clock

    return take


async def test_slow_client_is_disconnected(each_wait_takes):
    """Each wait is below the patience; together they are not."""
    each_wait_takes(40.0)
    num_read = 0
    with pytest.raises(InvalidRequest, match="client fell more than 60 s behind"):
        async for _ in RequestStream(text, sent(*[b"x"] * 9, every_s=0.001), budget_s=60.0):
            num_read += 1
    assert num_read == 2


async def test_client_that_sends_fast_enough_is_kept(each_wait_takes):
    each_wait_takes(10.0)
    enough = bytes(10 * parsing.MIN_BYTES_PER_S)
    stream = RequestStream(bytes, sent(*[enough] * 20, every_s=0.001), budget_s=60.0)
    assert len([one async for one in stream]) == 20


async def test_early_bytes_do_not_extend_the_time_budget(each_wait_takes):
    clock = each_wait_takes(0.0)
    stream = RequestStream(bytes, sent(*[bytes(2**21)] * 100, b"x", b"x", every_s=0.001), budget_s=60.0)
    for _ in range(100):
        await anext(stream)
    clock.step_s = 61.0
    await anext(stream)
    with pytest.raises(InvalidRequest, match="too slowly"):
        await anext(stream)


async def test_time_of_the_service_does_not_count(each_wait_takes):
    clock = each_wait_takes(0.0)
    stream = RequestStream(text, sent(b"a", b"b", every_s=0.001), budget_s=60.0)
    assert await anext(stream) == "a"
    clock.now_s += 1000.0
    assert await anext(stream) == "b"


async def test_stream_has_a_message_limit(monkeypatch):
    monkeypatch.setattr(parsing, "MAX_MESSAGES", 3)
    with pytest.raises(InvalidRequest, match="more than 3 messages"):
        [one async for one in RequestStream(text, sent(*[b"x"] * 4))]


@pytest.mark.parametrize("requests", [sent(b"a"), sent(b"x" * (parsing.MAX_MESSAGE_BYTES + 1))])
async def test_rest_of_a_rejected_stream_is_read(requests):
    await read_rest(RequestStream(text, requests))


async def test_rest_of_a_rejected_stream_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(parsing, "UNREAD_TIMEOUT_S", 0.01)
    await read_rest(silent())
