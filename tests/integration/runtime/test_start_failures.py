"""Exit statuses of services that cannot start, and hosts of both IP families."""

from __future__ import annotations

import asyncio
import socket

import pytest

from poise.local.processes.process import poll_readyz
from poise_client import ValueClient

MISCONFIGURED = 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["start=unusable"], "the cupboard is of another make. Name one of ours."),
        (["grpc.host=192.0.2.1", "auth.allow_open_bind=true"], "cannot listen on 192.0.2.1:0"),
        (["admin.host=192.0.2.1", "auth.allow_open_bind=true"], "Name an address of this machine"),
        (["grpc.host=[2001:db8::1]", "auth.allow_open_bind=true"], "cannot listen on [2001:db8::1]:0"),
        (["grpc.port=99999"], "grpc.port"),
    ],
)
def test_wrong_settings_give_status_2(stage, settings, said) -> None:
    running = stage(*settings)
    assert running.exit_status() == MISCONFIGURED
    assert said in running.log


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize(
    ("host", "callers"), [("::1", ["[::1]"]), ("[::1]", ["[::1]"]), ("::", ["[::1]", "127.0.0.1", "localhost"])]
)
def test_service_is_reachable_over_ipv4_and_ipv6(stage, host, callers) -> None:
    running = stage(f"grpc.host={host}", f"admin.host={host}", "auth.allow_open_bind=true")
    running.wait_for_log("stage: ready")
    ports = {kind: address.rpartition(":")[2] for kind, address in running.addresses().items() if kind != "pid"}
    for caller in callers:
        with ValueClient(f"{caller}:{ports['grpc']}") as client:
            assert client.get_probe(timeout_s=20).num_pending == 7
        assert asyncio.run(poll_readyz(f"{caller}:{ports['admin']}", 20.0))[0]
