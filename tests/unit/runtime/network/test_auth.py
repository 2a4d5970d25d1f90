import pytest
from tests.support.tokens import write_token

from poise.errors import Unauthenticated
from poise.runtime.config.settings import ConfigError, ServiceConfig
from poise.runtime.network import auth
from poise.runtime.network.auth import BearerAuth, reject_open_bind
from poise_client import TokenFile


def config(**values):
    return ServiceConfig(**values)


@pytest.mark.parametrize("given", [None, "", "Bearer x", "anything"])
def test_without_a_token_every_caller_is_accepted(given):
    BearerAuth(None).check(given)


@pytest.mark.parametrize("given", ["Bearer hunter2", "bearer hunter2", "BEARER hunter2"])
def test_scheme_of_the_token_is_case_insensitive(given):
    BearerAuth("hunter2").check(given)


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer  hunter2", "Bearer hunter", "Bearer hunter22", "hunter2",
              "Basic hunter2", "Bearer HUNTER2", "Bearer hünter2", "Bearer \udcff"]
)  # fmt: skip
def test_wrong_token_is_rejected_without_showing_the_right_one(given):
    with pytest.raises(Unauthenticated) as caught:
        BearerAuth("hunter2").check(given)
    assert caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    checks = BearerAuth("hunter2")
    checks.check("Bearer hunter2")
    with pytest.raises(Unauthenticated):
        checks.check("Bearer x")
    assert compared == [(b"hunter2", b"hunter2"), (b"x", b"hunter2")]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_address_needs_no_token(host):
    reject_open_bind(config(grpc={"host": host}, admin={"host": host}), None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_other_address_needs_a_token_or_permission(host):
    beyond = {"grpc": {"host": host}, "admin": {"host": host}}
    with pytest.raises(ConfigError) as caught:
        reject_open_bind(config(**beyond), None)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["grpc.host", "admin.host"]
    assert all("auth.token_file" in line and "auth.allow_open_bind" in line for line in lines)
    reject_open_bind(config(**beyond), "hunter2")
    reject_open_bind(config(**beyond, auth={"allow_open_bind": True}), None)


def test_new_token_is_accepted_without_a_restart(tmp_path, caplog):
    path = write_token(tmp_path / "token", "first")
    checks = BearerAuth(TokenFile(path))
    checks.check("Bearer first")
    write_token(tmp_path / "new", "second").replace(path)
    checks.check("Bearer second")
    checks.check("Bearer first")  # of callers that have not seen the new one
    with pytest.raises(Unauthenticated):
        checks.check("Bearer third")
    path.chmod(0o644)
    for _ in range(3):
        checks.check("Bearer second")
    assert [record.message.partition(":")[0] for record in caplog.records] == ["the new token file cannot be used"]
