import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict
from tests.support.tokens import write_token

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.settings import (
    MAX_FILE_BYTES,
    AuthConfig,
    ConfigError,
    GrpcConfig,
    ServiceConfig,
    StrictModel,
    load_config,
    parse_config,
    parse_overrides,
    read_yaml,
)
from poise.runtime.config.text import defaults_yaml, redacted
from poise.value.config import ValueConfig


class OvenConfig(StrictModel):
    """Heat."""

    degrees: float = Field(180, gt=0)
    """How hot, °C."""
    racks: dict[str, int] = Field({"upper": 1})
    """Racks by place."""
    door_code: SecretStr | None = None
    """Opens it."""

    RENAMED: ClassVar[Mapping[str, str]] = {"heat": "degrees"}


class CakeConfig(StrictModel):
    """One kind of batter."""

    kind: Literal["cake"]
    sugar_g: int = 200


class BreadConfig(StrictModel):
    """Another."""

    kind: Literal["bread"]
    rye_share: float = 0.3


class BakeryConfig(ServiceConfig):
    """A service."""

    model_config = SettingsConfigDict(env_prefix="POISE_BAKERY_")

    grpc: GrpcConfig = GrpcConfig(port=50059)
    """Where gRPC listens."""
    oven: OvenConfig = OvenConfig(degrees=200)
    """Its oven.

    Of stone."""
    doughs: tuple[Annotated[CakeConfig | BreadConfig, Field(discriminator="kind")], ...] = ()
    """What is baked."""
    shelf: Path = Path("/srv/shelf")
    """Where it lies."""


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POISE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bakery.yaml"

    def write(text: str | bytes) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problems_of(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        parse_config(BakeryConfig, *arguments, **options)
    return str(refused.value).splitlines()


def test_defaults_hold_without_any_source():
    assert load_config(BakeryConfig, None) == BakeryConfig()
    assert BakeryConfig().grpc.port == 50059


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(file, monkeypatch):
    path = file("grpc: {port: 1, max_concurrent_rpcs: 1, host: 127.0.0.1}\nadmin: {port: 1}")
    monkeypatch.setenv("POISE_BAKERY_GRPC__PORT", "2")
    monkeypatch.setenv("POISE_BAKERY_GRPC__MAX_CONCURRENT_RPCS", "2")
    config = load_config(BakeryConfig, path, ["grpc.port=3"])
    assert (config.grpc.port, config.grpc.max_concurrent_rpcs, config.admin.port) == (3, 2, 1)
    assert config.oven.degrees == 200


@pytest.mark.parametrize("source", ["file", "environment", "command line"])
def test_naming_one_field_of_a_section_keeps_the_sections_own_defaults(file, monkeypatch, source):
    overrides = []
    if source == "file":
        file("oven: {racks: {lower: 2}}")
    elif source == "environment":
        monkeypatch.setenv("POISE_BAKERY_OVEN__RACKS", '{"lower": 2}')
    else:
        overrides = ["oven.racks={lower: 2}"]
    config = load_config(BakeryConfig, file("oven: {racks: {lower: 2}}") if source == "file" else None, overrides)
    assert config.oven.degrees == 200
    assert config.oven.racks["lower"] == 2


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        BakeryConfig().drain_timeout_s = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        BakeryConfig().grpc.port = 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grcp": {}}, "grcp: unknown; did you mean 'grpc'?"),
        ({"grpc": {"prot": 1}}, "grpc.prot: unknown; did you mean 'port'?"),
        ({"oven": {"colour": 1}}, "oven.colour: unknown; known: degrees, door_code, racks"),
        ({"oven": {"heat": 200}}, "oven.heat: unknown; it was renamed to 'degrees'"),
        ({"grpc": {"port": "x"}}, "grpc.port: Input should be a valid integer"),
        ({"oven": 5}, "oven: Input should be a valid dictionary or instance of OvenConfig"),
        ({"grpc": {1: 2}}, "grpc.1: Keys should be strings"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(values, said):
    [line] = problems_of(values)
    assert line.startswith(said)


def test_a_near_miss_is_found_within_the_chosen_kind_of_a_list():
    lines = problems_of({"doughs": [{"kind": "bread", "rye_shar": 1}]})
    assert "doughs.0.bread.rye_shar: unknown; did you mean 'rye_share'?" in lines
    lines = problems_of({"doughs": [{"kind": "bread", "sugar": 1}]})
    assert "doughs.0.bread.sugar: unknown; known: kind, rye_share" in lines


def test_a_required_setting_is_named():
    with pytest.raises(ConfigError, match=r"^state_dir: required, and set nowhere$"):
        parse_config(ValueConfig, {})


def test_all_problems_are_told_at_once_with_their_file(monkeypatch):
    monkeypatch.setenv("POISE_BAKERY_DRAIN_TIMEOUT_S", "-1")
    monkeypatch.setenv("POISE_BAKERY_GRPC_PORT", "5")
    lines = problems_of({"grcp": {}, "oven": {"degrees": 0}}, ["admin.port=99999"], source="b.yaml")
    assert len(lines) == 5
    told = "\n".join(lines)
    for name in ("b.yaml: grcp", "b.yaml: oven.degrees", "drain_timeout_s", "admin.port", "POISE_BAKERY_GRPC_PORT"):
        assert name in told


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("POISE_BAKERY_GRPC_PORT", "POISE_BAKERY_GRPC__PORT"),
        ("POISE_BAKERY_DRAIN_TIMEOT_S", "POISE_BAKERY_DRAIN_TIMEOUT_S"),
        ("POISE_BAKERY_OVEN__DEGRES", None),
    ],
)
def test_a_misspelt_variable_is_refused(monkeypatch, name, meant):
    monkeypatch.setenv(name, "5")
    [line] = problems_of({})
    assert line == (
        f"{name} (environment): unknown; did you mean {meant}?"
        if meant
        else "oven.degres: unknown; did you mean 'degrees'?"
    )


def test_variables_that_kubernetes_sets_for_a_service_of_the_same_name_are_let_pass(monkeypatch):
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


def test_a_variable_that_is_no_json_is_said_without_its_value(monkeypatch):
    monkeypatch.setenv("POISE_BAKERY_AUTH", "hunter2")
    [line] = problems_of({})
    assert line.startswith("environment: ")
    assert '"auth"' in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"grpc: [", "is not YAML"),
        (b"shelf: 2024-13-45", "is not YAML: month must be in 1..12"),
        (b"[" * 50_000, "is not YAML"),
        (b"shelf: caf\xe9", "cannot be read: 'utf-8' codec"),
        (b"- grpc", "must hold `name: value` lines at its top, not a list"),
        (b"grpc", "must hold `name: value` lines at its top, not a str"),
        (b"on: 1", "True is no name of a setting"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 1048576 bytes"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_named_with_the_reason(file, content, said):
    path = file(content)
    with pytest.raises(ConfigError) as refused:
        load_config(BakeryConfig, path)
    assert str(refused.value).startswith(f"{path}: {said}")


def test_bad_yaml_is_said_with_its_line(file):
    with pytest.raises(ConfigError, match="line 2"):
        read_yaml(file("grpc:\n  port: [1\n"))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as refused:
            load_config(BakeryConfig, path)
        assert str(path) in str(refused.value)


def test_an_empty_file_changes_nothing(file):
    assert load_config(BakeryConfig, file("# nothing\n")) == BakeryConfig()


def test_one_load_leaves_nothing_for_the_next(file):
    assert load_config(BakeryConfig, file("drain_timeout_s: 5")).drain_timeout_s == 5
    assert load_config(BakeryConfig, None).drain_timeout_s == 30
    with pytest.raises(ConfigError):
        load_config(BakeryConfig, file("drain_timeout_s: -5"))
    assert BakeryConfig().drain_timeout_s == 30


def test_overrides_are_read_as_yaml():
    tree = parse_overrides(["a.b=3", "a.c=true", "d=null", "e=[1, x]", "f=", "g=a=b", "h='3'"])
    assert tree == {"a": {"b": 3, "c": True}, "d": None, "e": [1, "x"], "f": None, "g": "a=b", "h": "3"}


@pytest.mark.parametrize(
    "overrides",
    [["port"], ["=1"], ["a..b=1"], [".a=1"], ["a=["], ["a=2024-13-45"], ["a=1", "a.b=2"], ["a={b: 1}", "a.b.c=2"]],
)
def test_a_malformed_override_is_named(overrides):
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides(overrides)


def test_the_last_of_two_overrides_wins():
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_a_token_in_a_file_or_on_the_command_line_is_refused_and_not_repeated(file):
    for path, overrides in ((file("auth: {token: hunter2}"), []), (None, ["auth.token=hunter2"])):
        with pytest.raises(ConfigError, match="POISE_BAKERY_AUTH__TOKEN") as refused:
            load_config(BakeryConfig, path, overrides)
        assert "hunter2" not in str(refused.value)


def test_a_token_comes_from_the_environment_or_from_a_file(monkeypatch, tmp_path):
    write_token(tmp_path / "token", "of-the-file")
    config = load_config(BakeryConfig, None, [f"auth.token_file={tmp_path / 'token'}"])
    assert config.auth.read_token() == "of-the-file"
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", "hunter2")
    assert load_config(BakeryConfig, None).auth.read_token() == "hunter2"
    with pytest.raises(ConfigError, match="token and token_file are both set") as refused:
        load_config(BakeryConfig, None, [f"auth.token_file={tmp_path / 'token'}"])
    assert "hunter2" not in str(refused.value)
    assert AuthConfig().read_token() is None


@pytest.mark.parametrize("token", ["", " ", "hunter2\n", "hunter 2", "hünter2"])
def test_a_token_that_cannot_be_sent_or_would_let_everybody_in_is_refused(monkeypatch, tmp_path, token):
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", token)
    [line] = problems_of({})
    assert line.startswith("auth.token: must be visible ASCII")
    assert "nter" not in line


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", "hünter2".encode()])
def test_a_token_file_that_holds_no_token_is_refused(tmp_path, content):
    path = write_token(tmp_path / "token", "")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^auth.token_file: the token in .* must be visible ASCII") as refused:
        AuthConfig(token_file=path).read_token()
    assert "nter" not in str(refused.value)


def test_a_token_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^auth.token_file: .*none cannot be read"):
        AuthConfig(token_file=tmp_path / "none").read_token()


@pytest.mark.parametrize(
    "values",
    [{"auth": "hunter2"}, {"oven": {"door_code": ["hunter2"]}}, {"oven": "hunter2"}, {"auth": ["hunter2"]}],
)
def test_a_wrong_value_where_a_secret_may_stand_is_not_repeated(values):
    [line] = problems_of(values)
    assert "hunter2" not in line


def test_redacted_settings_show_no_secret_and_are_json(monkeypatch):
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", "hunter2")
    shown = redacted(parse_config(BakeryConfig, {"oven": {"door_code": "hunter3"}}))
    assert "hunter" not in json.dumps(shown)
    assert shown["auth"]["token"] == shown["oven"]["door_code"] == "**********"
    assert shown["shelf"] == "/srv/shelf"
    assert "hunter" not in repr(parse_config(BakeryConfig, {"oven": {"door_code": "hunter3"}}))


def test_tls_files_go_together():
    [line] = problems_of({"grpc": {"tls_cert_file": "a.pem"}})
    assert line == "grpc: tls_cert_file and tls_key_file go together: set both or neither"


def test_the_printed_defaults_are_the_defaults(file):
    assert load_config(BakeryConfig, file(defaults_yaml(BakeryConfig))) == BakeryConfig()


def test_the_printed_defaults_hold_every_field_with_its_description():
    text = defaults_yaml(BakeryConfig)
    assert "oven:\n  # How hot, °C.\n  degrees: 200.0\n" in text
    assert "# Its oven.\n# \n# Of stone.\noven:" in text
    assert "  port: 50059\n" in text
    assert all(line.startswith("  ") for line in defaults_yaml(BakeryConfig, indent=1).splitlines())


@pytest.mark.parametrize(
    ("cls", "required"),
    [
        (ValueConfig, {"state_dir": "state"}),
        (GenerationConfig, {"model": "model"}),
        (LearnerConfig, {"model": "model", "state_dir": "state"}),
        (OrchestratorConfig, {"run_dir": "run", "tasks": [{"kind": "digits"}]}),
    ],
)
def test_the_printed_defaults_of_each_program_load_once_the_required_ones_are_filled_in(file, cls, required):
    text = defaults_yaml(cls)
    assert {name for name in yaml.safe_load(text) if f"\n{name}:  # required" in f"\n{text}"} == required.keys()
    values = yaml.safe_load(text) | required
    assert load_config(cls, file(yaml.safe_dump(values))) == parse_config(cls, required)


@pytest.mark.parametrize("cls", [ValueConfig, GenerationConfig, LearnerConfig, OrchestratorConfig])
def test_every_setting_of_each_program_has_a_description(cls):
    def undescribed(model, path=""):
        for name, field in model.model_fields.items():
            if not field.description:
                yield path + name
            if isinstance(field.default, StrictModel):
                yield from undescribed(type(field.default), f"{path}{name}.")

    assert not list(undescribed(cls))


@pytest.mark.parametrize(
    "address", ["::", "::1", "[::1]", "fd00::", "[::1]:50051", "2001:db8::ffff:10.0.0.1", "[fe80::1%eth0]"]
)
def test_an_ipv6_address_on_the_command_line_is_a_string(address):
    assert parse_overrides([f"a.host={address}"]) == {"a": {"host": address}}


@pytest.mark.parametrize(("text", "value"), [("[1]", [1]), ("[1, 2]", [1, 2]), ("{a: 1}", {"a": 1}), ("1.5", 1.5)])
def test_other_values_on_the_command_line_are_yaml(text, value):
    assert parse_overrides([f"a={text}"]) == {"a": value}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpc.port=true", "grpc: port must be a number, not true"),
        ("oven.degrees=no", "oven: degrees must be a number, not false"),
        ("drain_timeout_s=yes", "settings: drain_timeout_s must be a number, not true"),
        ("drain_timeout_s=.inf", "drain_timeout_s: Input should be a finite number"),
        ("drain_timeout_s=.nan", "drain_timeout_s: Input should be"),
        ("grpc.port=abc", "grpc.port: Input should be a valid integer"),
        ("grpc.port=1.5", "grpc.port: Input should be a valid integer"),
        ("grpc.port=99999", "grpc.port: Input should be less than or equal to 65535"),
        ("grpc.host=127.0.0.1:5", "grpc.host: must be a name or an address, without scheme or port"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_setting(override, said):
    [line] = problems_of({}, [override])
    assert line.startswith(said)


@pytest.mark.parametrize("name", ["POISE_BAKERY_FURNACE__DEGREES", "POISE_BAKERY_X__Y__Z", "POISE_BAKERY_TILL__OPEN"])
def test_a_variable_of_a_section_that_there_is_not_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "5")
    [line] = problems_of({})
    assert line.startswith(f"{name} (environment): unknown; sections: admin, auth, ")
