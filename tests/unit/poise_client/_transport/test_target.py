import pytest

from poise_client import AsyncValueClient, ValueClient


@pytest.mark.parametrize(
    "target",
    [
        *("localhost:1", "10.0.0.1:50051", "value.poise.svc:50052", "my_host:65535"),
        *("[::1]:50051", "[2001:db8::1]:1", "[::ffff:10.0.0.1]:1", "[fe80::1%eth0]:1"),
        *("dns:///value:1", "dns:///[::1]:1", "dns:value:1", "dns://8.8.8.8/value:1"),
        *("unix:/run/x", "unix:///run/x", "ipv4:10.0.0.1:1", "ipv6:[::1]:1"),
    ],
)
def test_valid_targets_are_accepted(target):
    assert ValueClient(target).target == target


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("::1:50051", r"an IPv6 address needs brackets, such as \[::1\]:50051"),
        ("2001:db8::1", "needs brackets|required: a number from 1 to 65535"),
        ("[::1]", "must be host:port|required: a number"),
        ("[::1", "an IPv6 address needs brackets"),
        ("[1.2.3.4]:1", "'1.2.3.4' is not an IPv6 address"),
        ("[::g]:1", "'::g' is not an IPv6 address"),
        ("localhost", "must be host:port"),
        ("localhost:", "required: a number from 1 to 65535"),
        ("localhost:http", "required: a number from 1 to 65535"),
        ("localhost:0", "required: a number from 1 to 65535"),
        ("localhost:99999", "'99999'; required: a number from 1 to 65535"),
        (":50051", "must be host:port"),
        ("dns:///localhost", "must be host:port"),
        ("dns:///a/b:1", "must be host:port"),
        ("", "must be host:port"),
    ],
)
def test_targets_that_grpc_misreads_are_rejected(target, said):
    with pytest.raises(ValueError, match=said):
        AsyncValueClient(target)
