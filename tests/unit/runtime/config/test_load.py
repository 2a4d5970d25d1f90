"""Settings from the command line, the environment and a file: precedence, and errors that name the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.runtime.config.bakery import BakeryConfig, problems_of

from poise.runtime.config.load import MAX_FILE_BYTES, load_config, merged, parse_overrides, read_yaml
from poise.runtime.config.settings import ConfigError


def test_defaults_hold_without_any_source() -> None:
    assert load_config(BakeryConfig, None) == BakeryConfig()
    assert BakeryConfig().grpc.port == 50059


def test_command_line_over_environment_over_file_over_default(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file("grpc: {port: 1, max_concurrent_rpcs: 1, host: 127.0.0.1}\nadmin: {port: 1}")
    monkeypatch.setenv("POISE_BAKERY_GRPC__PORT", "2")
    monkeypatch.setenv("POISE_BAKERY_GRPC__MAX_CONCURRENT_RPCS", "2")
    config = load_config(BakeryConfig, path, ["grpc.port=3"])
    assert (config.grpc.port, config.grpc.max_concurrent_rpcs, config.admin.port) == (3, 2, 1)
    assert config.oven.degrees == 200


@pytest.mark.parametrize("source", ["file", "environment", "command line"])
def test_one_field_keeps_the_other_defaults_of_its_section(
    file: Any, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "environment":
        monkeypatch.setenv("POISE_BAKERY_OVEN__RACKS", '{"lower": 2}')
    path = file("oven: {racks: {lower: 2}}") if source == "file" else None
    config = load_config(BakeryConfig, path, ["oven.racks={lower: 2}"] if source == "command line" else [])
    assert config.oven.degrees == 200
    assert config.oven.racks["lower"] == 2


def test_constructing_settings_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_BAKERY_DRAIN_TIMEOUT_S", "5")
    assert BakeryConfig().drain_timeout_s == 30
    assert load_config(BakeryConfig, None).drain_timeout_s == 5


def test_all_problems_are_listed_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_BAKERY_DRAIN_TIMEOUT_S", "-1")
    monkeypatch.setenv("POISE_BAKERY_GRPC_PORT", "5")
    values = {"grcp": {}, "oven": {"degrees": 0}}
    lines = problems_of(values, ["admin.port=99999"], file="b.yaml", section="shop")
    assert {line.rpartition(": ")[0].partition(": Input")[0] for line in lines} == {
        "--set shop.admin.port",
        "POISE_BAKERY_DRAIN_TIMEOUT_S (environment)",
        "POISE_BAKERY_GRPC_PORT (environment)",
        "b.yaml: shop.grcp",
        "b.yaml: shop.oven.degrees",
    }


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("POISE_BAKERY_GRPC_PORT", "unknown; did you mean POISE_BAKERY_GRPC__PORT?"),
        ("POISE_BAKERY_DRAIN_TIMEOT_S", "unknown; did you mean POISE_BAKERY_DRAIN_TIMEOUT_S?"),
        ("POISE_BAKERY_OVEN__DEGRES", "unknown; did you mean 'degrees'?"),
        ("POISE_BAKERY_FURNACE__DEGREES", "unknown; sections: admin, auth, "),
        ("POISE_BAKERY_X__Y__Z", "unknown; sections: admin, auth, "),
        ("POISE_BAKERY_TILL__OPEN", "unknown; sections: admin, auth, "),
    ],
)
def test_unknown_variable_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    monkeypatch.setenv(name, "5")
    [line] = problems_of({})
    assert line.startswith(f"{name} (environment): {problem}")


def test_variables_that_kubernetes_sets_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("BAKERY", "BAKERY_GRPC", "BAKERY_ADMIN"):
        for suffix, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "50059",
            "SERVICE_PORT_GRPC": "50059",
            "PORT": "tcp://10.0.0.1:50059",
            "PORT_50059_TCP": "tcp://10.0.0.1:50059",
            "PORT_50059_TCP_PROTO": "tcp",
            "PORT_50059_TCP_PORT": "50059",
            "PORT_50059_TCP_ADDR": "10.0.0.1",
        }.items():
            monkeypatch.setenv(f"POISE_{service}_{suffix}", value)
    assert load_config(BakeryConfig, None) == BakeryConfig()


def test_variable_that_is_not_json_is_reported_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_BAKERY_AUTH", "hunter2")
    [line] = problems_of({})
    assert line.startswith("environment: ")
    assert '"auth"' in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"grpc: [", "is not YAML"),
        (b"shelf: 2024-13-45", "is not YAML: month must be in 1..12"),
        (b"[" * 50_000, "is not YAML"),
        (b"shelf: caf\xe9", "cannot be read: 'utf-8' codec"),
        (b"- grpc", "must consist of `name: value` lines, but is a list"),
        (b"grpc", "must consist of `name: value` lines, but is a str"),
        (b"on: 1", "True is not the name of a setting"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 1048576 bytes"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_file_without_settings_is_rejected(file: Any, content: bytes, problem: str) -> None:
    path = file(content)
    with pytest.raises(ConfigError) as caught:
        load_config(BakeryConfig, path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_wrong_yaml_is_reported_with_its_line(file: Any) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        read_yaml(file("grpc:\n  port: [1\n"))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(BakeryConfig, path)
        assert str(path) in str(caught.value)


def test_empty_file_sets_nothing(file: Any) -> None:
    assert load_config(BakeryConfig, file("# nothing\n")) == BakeryConfig()


def test_overrides_are_yaml() -> None:
    tree = parse_overrides(["a.b=3", "a.c=true", "d=null", "e=[1, x]", "f=", "g=a=b", "h='3'", "i={a: 1}", "j=1.5"])
    assert tree["a"] == {"b": 3, "c": True}
    rest = {"d": None, "e": [1, "x"], "f": None, "g": "a=b", "h": "3", "i": {"a": 1}, "j": 1.5}
    assert {name: tree[name] for name in rest} == rest


@pytest.mark.parametrize(
    "overrides",
    [["port"], ["=1"], ["a..b=1"], [".a=1"], ["a=["], ["a=2024-13-45"], ["a=1", "a.b=2"], ["a={b: 1}", "a.b.c=2"]],
)
def test_malformed_override_is_rejected(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides(overrides)


def test_last_of_two_overrides_wins() -> None:
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    "address", ["::", "::1", "[::1]", "fd00::", "[::1]:50051", "2001:db8::ffff:10.0.0.1", "[fe80::1%eth0]"]
)
def test_ipv6_address_in_an_override_is_a_string(address: str) -> None:
    assert parse_overrides([f"a.host={address}"]) == {"a": {"host": address}}


def test_sections_are_merged_setting_by_setting() -> None:
    below = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}
    assert merged(below, {"a": {"c": {"e": 5}}, "g": 6}) == {"a": {"b": 1, "c": {"d": 2, "e": 5}}, "f": 4, "g": 6}
    assert merged(below, {"a": 7}) == {"a": 7, "f": 4}
    assert below == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}


def test_section_of_another_kind_replaces_the_whole_section() -> None:
    below = {"x": {"a": {"kind": "one", "of_one": 1}}}
    assert merged(below, {"x": {"a": {"kind": "two", "of_two": 2}}}) == {"x": {"a": {"kind": "two", "of_two": 2}}}
    assert merged(below, {"x": {"a": {"kind": "one", "more": 2}}})["x"]["a"] == {"kind": "one", "of_one": 1, "more": 2}
    assert merged(below, {"x": {"a": {"more": 2}}})["x"]["a"] == {"kind": "one", "of_one": 1, "more": 2}


def test_string_in_place_of_a_section_is_its_kind() -> None:
    below = {"x": {"a": {"kind": "one", "of_one": 1}, "b": "word"}}
    assert merged(below, {"x": {"a": "one"}}) == below
    assert merged(below, {"x": {"a": "two", "b": "other"}}) == {"x": {"a": {"kind": "two"}, "b": "other"}}


def test_a_broken_value_is_not_quoted():
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["queue.url={[sesame"])
    assert "queue.url" in str(caught.value)
    assert "sesame" not in str(caught.value)
