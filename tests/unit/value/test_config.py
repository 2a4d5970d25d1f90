from __future__ import annotations

import pytest

from poise.runtime.config.load import load_config
from poise.runtime.config.settings import ConfigError
from poise.value.config import ValueConfig

STATE = ["state_dir=/nowhere"]


def loaded(*settings: str) -> ValueConfig:
    return load_config(ValueConfig, None, [*STATE, *settings])


def rejection(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host:6380/3",
        "redis://:secret@host:1/",
        "rediss://user:p%2Fss@[::1]:6379/0",
        "unix:///run/valkey.sock",
        "unix://user:secret@/run/valkey.sock?db=1",
        "rediss://host?ssl_ca_certs=/ca.pem&ssl_cert_reqs=required&ssl_check_hostname=False",
    ],
)
def test_the_url_of_a_redis_server_is_accepted(url: str) -> None:
    assert loaded(f"queue.url={url}").queue.url.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "s3cret",
        "http://user:s3cret@host",
        "redis://user:s3cret@",
        "redis://user:s3cret@host:port",
        "redis://user:s3cret@host:70000",
        "redis://user:s3/cret@host:6379",
        "redis://user:s3cret#@host:6379",
        "redis://user:s3cret@host:6379/labels",
        "redis://user:s3cret@[::1:6379",
        "unix://user:s3cret@",
        "redis://user:s3cret@ho st",
        "redis://host/9999999999999999999999s3cret",
    ],
)
def test_an_invalid_url_is_rejected_and_not_quoted(url: str) -> None:
    text = rejection(f"queue.url={url}")
    assert "queue.url: is not the URL of a Redis server" in text
    assert "percent-encoded" in text
    assert "cret" not in text


@pytest.mark.parametrize(
    "url",
    [
        "redis://host?s3cret=1",
        "redis://host?s3cret",
        "redis://host?socket_timeout=0.001",
        "redis://host?decode_responses=true",
        "redis://host?db=s3cret",
        "redis://host?ssl_ca_certs=/ca.pem",
        "rediss://host?ssl_cert_reqs=maybe",
        "rediss://host?ssl_check_hostname=",
        "unix:///run/valkey.sock?max_connections=1",
    ],
)
def test_unknown_options_of_the_url_are_rejected(url: str) -> None:
    text = rejection(f"queue.url={url}")
    assert "queue.url: has an unknown option after ?" in text
    assert "ssl_ca_certs" in text
    assert "cret=" not in text


def test_a_window_smaller_than_min_rows_is_rejected() -> None:
    assert "window_rows = 10 must be at least min_rows = 64" in rejection("probe.window_rows=10")
    text = rejection('probe.window_rows_by_domain={"chess": 63}')
    assert "window_rows_by_domain.chess = 63 must be at least min_rows = 64" in text


@pytest.mark.parametrize(
    "setting",
    [
        "queue.max_entries=0",
        "queue.claim_idle_s=0",
        "probe.alpha=0",
        "probe.warmup_steps=0",
        "probe.min_rows=1",
        "probe.inputs=[]",
        'probe.inputs=["entropi"]',
        "horizon_steps=0",
        "pinned_steps=0",
    ],
)
def test_values_out_of_range_are_rejected_by_path(setting: str) -> None:
    assert setting.split("=")[0] in rejection(setting)


def test_the_state_folder_has_no_default() -> None:
    with pytest.raises(ConfigError, match="state_dir"):
        load_config(ValueConfig, None, [])


def test_a_queue_too_small_for_a_group_is_rejected() -> None:
    assert "the largest group would never fit" in rejection("queue.max_bytes=5000000")
    assert loaded("queue.max_bytes=5000000", "queue.max_entry_bytes=2500000").queue.max_bytes == 5_000_000
