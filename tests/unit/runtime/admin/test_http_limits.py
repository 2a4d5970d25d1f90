"""Time limits of connections to the admin app."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn

from poise.runtime.admin import http_limits as http_protocol
from poise.runtime.admin.http_limits import DeadlineProtocol

ANSWER = bytes(2**20)
"""Larger than what the kernel takes for a client that reads nothing."""


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(ANSWER))]})
    await send({"type": "http.response.body", "body": ANSWER})


@pytest.fixture
async def server(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_protocol, "READ_TIMEOUT_S", 0.2)
    config = uvicorn.Config(answer, http=DeadlineProtocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited by its connections
    listener.bind(("127.0.0.1", 0))
    serving = asyncio.create_task(server._serve([listener]))  # `serve` would take the signals of the tests
    while not server.started:
        await asyncio.sleep(0.01)
    server.address = listener.getsockname()
    yield server
    server.should_exit = True
    await serving


@contextlib.contextmanager
def client(server):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.setblocking(False)
        yield connection


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
async def test_connection_with_unread_response_is_closed(server, connection):
    with client(server) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: " + connection + b"\r\n\r\n")
        await until(lambda: server.server_state.total_requests == 1)
        await until(lambda: not server.server_state.connections)


async def test_half_closed_connection_is_closed(server):
    with client(server) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        stream.shutdown(socket.SHUT_WR)
        await until(lambda: server.server_state.total_requests == 1)
        await until(lambda: not server.server_state.connections)


async def test_slow_second_request_closes_the_connection(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "READ_TIMEOUT_S", 60.0)
    loop = asyncio.get_running_loop()
    with client(server) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        received = 0
        while received < len(ANSWER):
            received += len(await loop.sock_recv(stream, 65536))
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError):
                while server.server_state.connections:
                    await loop.sock_sendall(stream, b"G")
                    await asyncio.sleep(0.01)
