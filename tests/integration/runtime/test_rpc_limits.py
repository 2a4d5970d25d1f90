"""Limits of the gRPC port against unauthenticated and slow clients."""

import socket
import threading
import time

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.runtime.process import TIMEOUT_S, run_stage

TOKEN = "hunter2-hunter2"
AUTHORISED = (("authorization", f"Bearer {TOKEN}"),)
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))

METHODS = {
    "unary": ("unary_unary", "/poise.v1.ValueService/GetProbe"),
    "answers": ("unary_stream", "/poise.v1.GenerationService/StreamTrajectories"),
    "upload": ("stream_unary", "/poise.v1.GenerationService/UpdateWeights"),
    "both": ("stream_stream", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with run_stage(tmp_path_factory.mktemp("stage"), token=TOKEN) as stage:
        stage.wait_until_ready()
        yield stage


def start(channel, kind, content, metadata=()):
    """Call with one message and leave the stream open; return the call."""
    shape, method = METHODS[kind]
    request = (part for part in (content,)) if shape.startswith("stream") else content
    call = getattr(channel, shape)(method)
    return (
        call(request, timeout=TIMEOUT_S, metadata=metadata)
        if shape.endswith("stream")
        else call.future(request, timeout=TIMEOUT_S, metadata=metadata)
    )


def is_healthy(channel):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status


@pytest.mark.parametrize("kind", METHODS)
def test_large_unauthenticated_message_is_not_buffered(running, kind):
    process = psutil.Process(running.process.pid)
    before = process.memory_info().rss
    channels = [grpc.insecure_channel(running.addresses()["grpc"], options=OPTIONS) for _ in range(12)]
    calls = [start(channel, kind, bytes(30 * 2**20)) for channel in channels]
    assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    assert process.memory_info().rss - before < 100 * 2**20  # of 360 MiB that were sent
    for channel in channels:
        channel.close()


def test_large_authenticated_message_is_rejected(running):
    with grpc.insecure_channel(running.addresses()["grpc"], options=OPTIONS) as channel:
        call = start(channel, "unary", bytes(30 * 2**20), AUTHORISED)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in call.details()


def test_large_metadata_is_rejected(running):
    with running.channel() as channel:
        for size in (20_000, 1_000_000):
            call = start(channel, "unary", b"", (*AUTHORISED, ("x-large", "x" * size)))
            assert call.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        assert start(channel, "unary", b"", AUTHORISED).code() is grpc.StatusCode.OK


@pytest.mark.parametrize("kind", ["upload", "unary"])
def test_silent_calls_block_no_others(running, kind):
    """Of another RPC; and of the same one, where a place is taken by a whole request only."""
    release = threading.Event()

    def never():
        release.wait(TIMEOUT_S)
        yield b""

    with running.channel() as channel:
        half = channel.stream_unary(METHODS[kind][1])
        calls = [half.future(never(), timeout=TIMEOUT_S, metadata=AUTHORISED) for _ in range(300)]
        assert start(channel, "unary", b"", AUTHORISED).code() is grpc.StatusCode.OK
        assert is_healthy(channel)
        for call in calls:
            call.cancel()
        release.set()


def test_silent_connections_are_closed(running):
    host, port = running.addresses()["grpc"].rsplit(":", 1)
    silent = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(50)]
    deadline = time.monotonic() + TIMEOUT_S
    for connection in silent:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        while connection.recv(1000):  # its settings, then the end
            pass
        connection.close()


def test_number_of_connections_is_limited(running):
    host, port = running.addresses()["grpc"].rsplit(":", 1)
    before = len(psutil.Process(running.process.pid).net_connections())
    many = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(1200)]
    try:
        held = len(psutil.Process(running.process.pid).net_connections()) - before
        assert held <= 1024
    finally:
        for connection in many:
            connection.close()
    with running.channel() as channel:
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        assert is_healthy(channel)
