import asyncio

import pytest

from poise.errors import InvalidRequest
from poise.runtime import parsing
from poise.runtime.parsing import RequestStream, read_rest


def text(data):
    return data.decode()


async def sent(*messages, every_s=0.0):
    for message in messages:
        await asyncio.sleep(every_s)
        yield message


async def silent():
    await asyncio.Event().wait()
    yield b""


async def test_messages_come_in_order():
    assert [one async for one in RequestStream(text, sent(b"a", b"b"))] == ["a", "b"]


async def test_a_silent_client_is_given_up():
    with pytest.raises(InvalidRequest, match="brought 0 bytes while the service waited 0 s"):
        await anext(RequestStream(text, silent(), patience_s=0.01))


async def test_a_trickling_client_is_given_up():
    """Each wait is below the patience; together they are not."""
    num_read = 0
    with pytest.raises(InvalidRequest, match="the call is given up"):
        async for _ in RequestStream(text, sent(*[b"x"] * 1000, every_s=0.02), patience_s=0.05):
            num_read += 1
    assert num_read < 5


async def test_bytes_buy_time(monkeypatch):
    monkeypatch.setattr(parsing, "MIN_BYTES_PER_S", 1)
    stream = RequestStream(text, sent(*[b"x" * 1000] * 5, every_s=0.02), patience_s=60.0)
    assert len([one async for one in stream]) == 5
    monkeypatch.setattr(parsing, "PATIENCE_S", 0.0)
    with pytest.raises(InvalidRequest):
        await anext(RequestStream(text, silent(), patience_s=0.0))


async def test_time_that_the_service_takes_does_not_count():
    stream = RequestStream(text, sent(b"a", b"b"), patience_s=0.05)
    assert await anext(stream) == "a"
    await asyncio.sleep(0.1)
    assert await anext(stream) == "b"


async def test_a_stream_has_a_bounded_number_of_messages(monkeypatch):
    monkeypatch.setattr(parsing, "MAX_MESSAGES", 3)
    with pytest.raises(InvalidRequest, match="more than 3 messages"):
        [one async for one in RequestStream(text, sent(*[b"x"] * 4))]


@pytest.mark.parametrize("requests", [sent(b"a"), sent(b"x" * (parsing.MAX_MESSAGE_BYTES + 1))])
async def test_the_rest_is_read_whatever_it_is(requests):
    await read_rest(RequestStream(text, requests))


async def test_the_rest_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(parsing, "_UNREAD_PATIENCE_S", 0.01)
    await read_rest(silent())
