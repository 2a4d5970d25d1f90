from __future__ import annotations

import socket

import pytest

from poise.local.addresses import address
from poise.runtime.config.settings import AdminConfig, GrpcConfig
from poise.runtime.network.addresses import join_address, listen, split_address
from poise.runtime.network.discovery import parse_name

has_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


@pytest.mark.parametrize(
    ("host", "port", "joined"),
    [
        ("127.0.0.1", 5, "127.0.0.1:5"),
        ("::1", 5, "[::1]:5"),
        ("a.b", 5, "a.b:5"),
        ("fe80::1%eth0", 5, "[fe80::1%eth0]:5"),
    ],
)
def test_address_is_joined_and_split(host, port, joined):
    assert join_address(host, port) == joined
    assert split_address(joined) == (host, port)


@pytest.mark.parametrize("wrong", ["", "host", "[::1]", "::1", ":5"])
def test_address_without_host_or_port_is_rejected(wrong):
    with pytest.raises(ValueError, match=r"must look like host:port or \[IPv6 address\]:port|Port could not|Invalid"):
        split_address(wrong)


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1:5"),
        ("0.0.0.0", "127.0.0.1:5"),
        ("::1", "[::1]:5"),
        ("[::1]", "[::1]:5"),
        ("::", "[::1]:5"),
        ("localhost", "localhost:5"),
    ],
)
def test_every_bound_host_is_reachable(host, reached):
    for config in (GrpcConfig(host=host, port=5), AdminConfig(host=host, port=5)):
        assert address(config) == reached


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5", "[::1]:5", "::g", "[127.0.0.1]", "http://a", "a b", "999.1.1.1", "1.2.3", "*"]
)
def test_host_with_a_port_or_scheme_is_rejected(host):
    with pytest.raises(ValueError, match="must be a name or an address"):
        GrpcConfig(host=host)


@pytest.mark.parametrize("host", ["", ".", "*", "*.example.com", "a:80", "http://a", "a/b", "[::1]:80", "10.0.0.0.1"])
def test_allowed_host_that_matches_nothing_is_rejected(host):
    with pytest.raises(ValueError, match="must be a name or an address"):
        AdminConfig(allowed_hosts=(host,))


@pytest.mark.parametrize("host", ["a", "a.b-c_d.example", ".example.com", "10.0.0.1", "[fd00::1]", "fd00::1"])
def test_allowed_host_is_a_name_or_an_address(host):
    assert AdminConfig(allowed_hosts=(host,)).allowed_hosts == (host.strip("[]"),)


@has_ipv6
@pytest.mark.parametrize(
    ("host", "callers"),
    [("::", ("127.0.0.1", "::1")), ("", ("127.0.0.1", "::1")), ("::1", ("::1",)), ("127.0.0.1", ("127.0.0.1",))],
)
def test_all_addresses_of_a_host_are_bound(host, callers):
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        for caller in callers:
            socket.create_connection((caller, port), timeout=10).close()


@pytest.mark.parametrize(
    ("target", "name"),
    [("dns:///[::1]:5", ("::1", 5)), ("[::1]:5", None), ("[fe80::1%eth0]:5", None), ("dns:///a:5", ("a", 5))],
)
def test_replica_target_may_be_ipv6(target, name):
    assert parse_name(target) == name


@pytest.mark.parametrize("target", ["::1:5", "[::g]:5", "[::1]", "dns:///::1:5", "[a]:5", "[1.2.3.4]:5"])
def test_target_with_wrong_brackets_is_rejected(target):
    with pytest.raises(ValueError, match="must look like host:port"):
        parse_name(target)
