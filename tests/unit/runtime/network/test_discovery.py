from __future__ import annotations

import asyncio
import socket

import pytest

from poise.runtime.network import discovery as module
from poise.runtime.network.discovery import Address, Discovery, parse_name


def test_names_are_distinguished_from_addresses():
    assert parse_name("dns:///replicas.poise:50051") == ("replicas.poise", 50051)
    for address in ("host:1", "10.0.0.1:50051", "[::1]:5", "unix:/run/x"):
        assert parse_name(address) is None


@pytest.mark.parametrize(
    "target", ["dns:///host", "dns:///:1", "dns:host:1", "dns:///a/b:1", "dns:///a:0", "dns:///a:70000"]
)
def test_invalid_name_is_rejected(target):
    with pytest.raises(ValueError, match="dns:///name:port"):
        parse_name(target)


@pytest.mark.parametrize(
    "target",
    ["http://gen:50051", "gen", "gen:", "gen:http", ":50051", "gen:0", "gen:70000", "a b:1", "[::1]", "::1:5", ""],
)
def test_invalid_target_is_rejected(target):
    with pytest.raises(ValueError, match="must look like host:port, unix:path or dns:///name:port"):
        parse_name(target)


async def test_unresolvable_name_keeps_the_other_addresses():
    names = Names(a=["10.0.0.1"])
    names.answers["a..b"] = UnicodeError("label empty or too long")
    found = await Discovery(["dns:///a..b:5", "dns:///a:5"], names).find()
    assert [address.target for address in found] == ["10.0.0.1:5"]


class Names:
    """A name server with the answers of a test."""

    def __init__(self, **answers):
        self.answers = answers

    async def __call__(self, host, port):
        answer = self.answers[host]
        if isinstance(answer, Exception):
            raise answer
        return {f"{address}:{port}" for address in answer}


async def test_fixed_addresses_come_first_without_duplicates():
    names = Names(a=["10.0.0.2", "10.0.0.1"], b=["10.0.0.2"])
    found = await Discovery(["h:1", "dns:///a:5", "10.0.0.1:5", "dns:///b:5"], names).find()
    assert found == [Address("h:1"), Address("10.0.0.1:5"), Address("10.0.0.2:5", "a")]


async def test_replicas_follow_their_dns_name():
    names = Names(a=["1.1.1.1"])
    discovery = Discovery(["dns:///a:5"], names)
    assert not discovery.is_fixed
    assert [one.target for one in await discovery.find()] == ["1.1.1.1:5"]
    names.answers["a"] = ["1.1.1.2", "1.1.1.3"]
    assert [one.target for one in await discovery.find()] == ["1.1.1.2:5", "1.1.1.3:5"]
    names.answers["a"] = []
    assert await discovery.find() == []


async def test_dns_failure_keeps_replicas_and_is_logged_once(caplog):
    names = Names(a=["1.1.1.1"], b=["2.2.2.2"])
    discovery = Discovery(["dns:///a:5", "dns:///b:6"], names)
    before = await discovery.find()
    names.answers |= {"a": socket.gaierror("no answer"), "b": ["2.2.2.3"]}
    for _ in range(3):
        assert await discovery.find() == [before[0], Address("2.2.2.3:6", "b")]
    assert caplog.text.count("cannot resolve dns:///a:5: no answer") == 1
    names.answers["a"] = ["1.1.1.9"]
    assert (await discovery.find())[0].target == "1.1.1.9:5"


async def test_discovery_without_names_is_fixed():
    discovery = Discovery(["h:1", "h:2"], Names())
    assert discovery.is_fixed
    assert await discovery.find() == [Address("h:1"), Address("h:2")]


async def test_name_resolves_to_all_its_targets(monkeypatch):
    async def getaddrinfo(*requested, **kind):
        assert (requested, kind) == (("replicas", 7), {"type": socket.SOCK_STREAM})
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 7)),
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 7, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 7)),
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await module.resolve("replicas", 7) == {"10.0.0.1:7", "[fd00::1]:7"}
