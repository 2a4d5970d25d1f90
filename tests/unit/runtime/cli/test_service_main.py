from typing import Any

import pytest
from pydantic_settings import SettingsConfigDict

from poise.runtime.cli import service_main as runtime_main
from poise.runtime.cli.service_main import service_main
from poise.runtime.config.settings import ConfigError, ServiceConfig


class OvenConfig(ServiceConfig):
    """An oven."""

    model_config = SettingsConfigDict(env_prefix="POISE_OVEN_")


@pytest.fixture
def served(monkeypatch) -> list[Any]:
    """What was handed to `serve`, which here ends at once with status 7."""
    apps: list[Any] = []
    monkeypatch.setattr(runtime_main, "serve", lambda app: apps.append(app) or 7)
    return apps


def run(*argv, build=lambda config: config):
    return service_main("oven", OvenConfig, build, argv)


def test_file_environment_and_overrides_reach_the_service(served, monkeypatch, tmp_path):
    (tmp_path / "oven.yaml").write_text("drain_timeout_s: 5\ngrpc: {port: 5}")
    monkeypatch.setenv("POISE_OVEN_ADMIN__PORT", "6")
    assert run("-c", str(tmp_path / "oven.yaml"), "--set", "grpc.port=7", "--set", "logging.level=DEBUG") == 7
    [config] = served
    assert (config.drain_timeout_s, config.grpc.port, config.admin.port, config.logging.level) == (5, 7, 6, "DEBUG")


def test_wrong_settings_exit_with_status_2(served, capsys):
    assert run("--set", "grpc.prot=1") == 2
    assert capsys.readouterr().err == "--set grpc.prot: unknown; did you mean 'port'?\n"
    assert not served


def test_settings_rejected_by_the_service_exit_with_status_2(served, capsys):
    def build(config):
        raise ConfigError("oven.door: is missing")

    assert run(build=build) == 2
    assert capsys.readouterr().err == "oven.door: is missing\n"


def test_defaults_are_printed_without_starting(served, capsys):
    assert run("--show-defaults") == 0
    assert "drain_timeout_s: 30.0" in capsys.readouterr().out
    assert not served


def test_help_names_the_sources_of_settings(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    assert "POISE_OVEN_SECTION__FIELD" in "".join(capsys.readouterr().out.split())
