"""Proxies from the environment are ignored unless `use_proxy` is set."""

import asyncio

import pytest

from poise_client import AsyncLearnerClient, AsyncValueClient, RetryPolicy, errors, open_channel
from poise_proto.v1.value_pb2 import GetProbeRequest
from poise_proto.v1.value_pb2_grpc import ValueServiceStub

NO_PROXY = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.mark.parametrize("variable", VARIABLES)
async def test_a_client_reaches_its_service_directly(target, monkeypatch, variable):
    monkeypatch.setenv(variable, NO_PROXY)
    async with AsyncValueClient(target) as client:
        assert (await client.get_probe(timeout_s=20)).num_pending == 4


async def test_grpcs_own_proxy_for_addresses_is_ignored(target, monkeypatch):
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", "127.0.0.1:9")
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
    async with AsyncLearnerClient(target) as client:
        assert (await client.get_status(timeout_s=20)).state == "idle"


async def test_a_channel_from_open_channel_ignores_proxies(target, monkeypatch):
    monkeypatch.setenv("http_proxy", NO_PROXY)
    async with open_channel(target) as channel:
        assert (await ValueServiceStub(channel).GetProbe(GetProbeRequest(), timeout=20)).num_pending == 4


async def test_use_proxy_sends_calls_through_the_proxy(target, monkeypatch):
    request = asyncio.get_running_loop().create_future()

    async def refuse(reader, writer):
        if not request.done():
            request.set_result(await reader.readline())
        writer.close()

    proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    async with proxy, AsyncValueClient(target, use_proxy=True, retries=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(errors.UnavailableError):
            await client.get_probe(timeout_s=20)
    assert (await request).startswith(f"CONNECT {target} ".encode())
