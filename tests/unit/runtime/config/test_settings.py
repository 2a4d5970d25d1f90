"""The rules of every section: frozen, strict, and one source for a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.support.tokens import write_token
from tests.unit.runtime.config.bakery import BakeryConfig, problems_of

from poise.runtime.config.load import load_config
from poise.runtime.config.settings import AuthConfig, ConfigError


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BakeryConfig().drain_timeout_s = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        BakeryConfig().grpc.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("grpc.port=true", "--set grpc: port must be a number, not true"),
        ("oven.degrees=no", "--set oven: degrees must be a number, not false"),
        ("drain_timeout_s=yes", "settings: drain_timeout_s must be a number, not true"),
        ("drain_timeout_s=.inf", "--set drain_timeout_s: Input should be a finite number"),
        ("drain_timeout_s=.nan", "--set drain_timeout_s: Input should be"),
        ("grpc.port=abc", "--set grpc.port: Input should be a valid integer"),
        ("grpc.port=1.5", "--set grpc.port: Input should be a valid integer"),
        ("grpc.port=99999", "--set grpc.port: Input should be less than or equal to 65535"),
        ("grpc.host=127.0.0.1:5", "--set grpc.host: must be a name or an address, without scheme or port"),
    ],
)
def test_value_of_wrong_type_is_rejected(override: str, problem: str) -> None:
    [line] = problems_of({}, [override])
    assert line.startswith(problem)


def test_tls_files_go_together() -> None:
    [line] = problems_of({"grpc": {"tls_cert_file": "a.pem"}})
    assert line == "grpc: only one of tls_cert_file and tls_key_file is set. Set both or neither"


def test_token_in_file_or_on_command_line_is_rejected(file: Any) -> None:
    for path, overrides in ((file("auth: {token: hunter2}"), []), (None, ["auth.token=hunter2"])):
        with pytest.raises(ConfigError, match="POISE_BAKERY_AUTH__TOKEN") as caught:
            load_config(BakeryConfig, path, overrides)
        assert "hunter2" not in str(caught.value)


def test_token_comes_from_environment_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_token(tmp_path / "token", "of-the-file")
    config = load_config(BakeryConfig, None, [f"auth.token_file={tmp_path / 'token'}"])
    assert config.auth.read_token() == "of-the-file"
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", "hunter2")
    assert load_config(BakeryConfig, None).auth.read_token() == "hunter2"
    with pytest.raises(ConfigError, match="token and token_file are both set") as caught:
        load_config(BakeryConfig, None, [f"auth.token_file={tmp_path / 'token'}"])
    assert "hunter2" not in str(caught.value)
    assert AuthConfig().read_token() is None


@pytest.mark.parametrize("token", ["", " ", "hunter2\n", "hunter 2", "hünter2"])
def test_unusable_token_is_rejected(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", token)
    [line] = problems_of({})
    assert line.startswith("POISE_BAKERY_AUTH__TOKEN (environment): must be one or more printable ASCII")
    assert "nter" not in line


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", "hünter2".encode()])
def test_token_file_without_a_token_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = write_token(tmp_path / "token", "")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^auth.token_file: the token in .* must be one or more printable") as caught:
        AuthConfig(token_file=path).read_token()
    assert "nter" not in str(caught.value)


def test_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^auth.token_file: .*none cannot be read"):
        AuthConfig(token_file=tmp_path / "none").read_token()
