import pytest

from poise_client import AsyncGenerationClient, GenerationClient, TlsOptions
from poise_client._transport.channel import is_loopback


@pytest.mark.parametrize(
    "target",
    [
        *("localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"),
        *("dns:///localhost:1", "unix:/run/poise.sock", "unix:///run/poise.sock", "unix-abstract:poise"),
    ],
)
def test_this_machine_is_recognised(target):
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    [
        *("value:1", "10.0.0.1:1", "0.0.0.0:1", "[::]:1", "localhost.example.org:1", "127.0.0.1.example.org:1"),
        *("dns:///value:1", "dns://8.8.8.8/localhost:1", "[2001:db8::1]:1"),
    ],
)
def test_other_machines_are_not_loopback(target):
    assert not is_loopback(target)


@pytest.mark.parametrize("client", [AsyncGenerationClient, GenerationClient])
def test_a_token_is_not_sent_in_plaintext_to_other_machines(client):
    with pytest.raises(ValueError, match="would be sent in plaintext") as caught:
        client("value.example.org:1", token="hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_token_may_be_sent_encrypted_or_if_allowed():
    AsyncGenerationClient("value.example.org:1", token="t", tls=TlsOptions())
    AsyncGenerationClient("localhost:1", token="t")
    AsyncGenerationClient("value.example.org:1", token="t", allow_insecure_token=True)


@pytest.mark.parametrize("token", ["", "a b", "line\n", "kü"])
def test_an_invalid_token_is_rejected_without_showing_it(token):
    with pytest.raises(ValueError, match="token must be") as caught:
        AsyncGenerationClient("localhost:1", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("target", ["", "http://localhost:1", "grpc://localhost:1"])
def test_a_url_is_rejected_as_a_target(target):
    with pytest.raises(ValueError, match="host:port"):
        AsyncGenerationClient(target)


def test_a_client_never_shows_its_token():
    assert "hunter2" not in repr(AsyncGenerationClient("localhost:1", token="hunter2"))
    assert "hunter2" not in repr(GenerationClient("localhost:1", token="hunter2"))


def test_a_client_certificate_needs_its_key():
    with pytest.raises(ValueError, match="Set both or neither"):
        TlsOptions(client_cert_file="a.pem")


def test_a_missing_tls_file_is_reported_before_any_call(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pem"):
        AsyncGenerationClient("localhost:1", tls=TlsOptions(root_certs_file=tmp_path / "absent.pem"))
