"""The admin port of a host without rank 0."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from tests.support.ports import free_port

from poise.learner.distributed.follower_admin import serve_probes
from poise.runtime.config.settings import AdminConfig, ConfigError


@pytest.fixture
def config() -> AdminConfig:
    return AdminConfig(port=free_port())


def ask(config: AdminConfig, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_follower_is_ready_once_it_has_loaded(config: AdminConfig) -> None:
    with serve_probes(config) as loaded:
        assert ask(config, "/healthz") == (200, "ok")
        assert ask(config, "/readyz")[0] == 503
        loaded.set()
        assert ask(config, "/readyz")[0] == 200
        assert ask(config, "/metrics") == (200, "")
        assert ask(config, "/admin/v1/status")[0] == 404
    with pytest.raises(OSError, match="refused"):
        ask(config, "/healthz")


def test_port_in_use_is_named(config: AdminConfig) -> None:
    taken = serve_probes(config)
    with serve_probes(config), pytest.raises(ConfigError, match=f"admin: cannot listen on 127.0.0.1:{config.port}"):
        taken.__enter__()
