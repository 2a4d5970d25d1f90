"""Clients that vanish without closing their connection."""

from __future__ import annotations

import asyncio

from tests.support.forwarder import forwarding

from poise_client import AsyncValueClient, open_channel
from poise_proto.v1.generation_pb2 import StreamTrajectoriesRequest
from poise_proto.v1.generation_pb2_grpc import GenerationServiceStub

FREED_WITHIN_S = 60.0


async def test_vanished_clients_free_their_calls(stage) -> None:
    running = stage("grpc.max_concurrent_rpcs=2")
    address = running.addresses()["grpc"]
    async with (
        forwarding(address) as dying,
        forwarding(address) as lasting,
        AsyncValueClient(dying.address) as value,
        open_channel(dying.address) as channel,
        AsyncValueClient(lasting.address) as idle,
        AsyncValueClient(address) as other,
    ):
        await idle.get_probe()
        call = asyncio.create_task(value.get_probe("hang", timeout_s=3600))
        stream = GenerationServiceStub(channel).StreamTrajectories(StreamTrajectoriesRequest(run_id="hang"))
        await stream.read()
        await asyncio.to_thread(running.wait_for_event, "hanging")
        dying.go_silent()

        report = await other.get_probe(timeout_s=FREED_WITHIN_S)

        assert report.num_pending == 7
        await idle.get_probe()
        assert lasting.num_connections == 1
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
