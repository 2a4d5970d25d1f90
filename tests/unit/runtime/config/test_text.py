"""Settings as text: problems with hints, commented defaults, masked secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from tests.unit.runtime.config.bakery import BakeryConfig, problems_of

from poise.generation.config import GenerationConfig
from poise.learner.config import LearnerConfig
from poise.orchestrator.config import OrchestratorConfig
from poise.runtime.config.load import load_config, parse_config
from poise.runtime.config.settings import ConfigError, Settings, StrictModel
from poise.runtime.config.text import defaults_yaml, redacted
from poise.value.config import ValueConfig

PROGRAMS: list[type[Settings]] = [ValueConfig, GenerationConfig, LearnerConfig, OrchestratorConfig]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"grcp": {}}, "grcp: unknown; did you mean 'grpc'?"),
        ({"grpc": {"prot": 1}}, "grpc.prot: unknown; did you mean 'port'?"),
        ({"oven": {"colour": 1}}, "oven.colour: unknown; known: degrees, door_code, racks"),
        ({"oven": {"heat": 200}}, "oven.heat: unknown; it was renamed to 'degrees'"),
        ({"oven": {"flour": 200}}, "oven.flour: unknown here; set `doughs`"),
        ({"grpc": {"port": "x"}}, "grpc.port: Input should be a valid integer"),
        ({"oven": 5}, "oven: Input should be a valid dictionary or instance of OvenConfig"),
        ({"grpc": {1: 2}}, "grpc.1: Keys should be strings"),
    ],
)
def test_problem_names_the_setting_and_the_remedy(values: dict[str, Any], problem: str) -> None:
    [line] = problems_of(values)
    assert line.startswith(problem)


def test_hint_is_from_the_chosen_kind_of_a_list() -> None:
    lines = problems_of({"doughs": [{"kind": "bread", "rye_shar": 1}]})
    assert "doughs.0.bread.rye_shar: unknown; did you mean 'rye_share'?" in lines
    lines = problems_of({"doughs": [{"kind": "bread", "sugar": 1}]})
    assert "doughs.0.bread.sugar: unknown; known: kind, rye_share" in lines


def test_missing_required_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^state_dir: required, but not set$"):
        parse_config(ValueConfig, {})


@pytest.mark.parametrize(
    "values",
    [{"auth": "hunter2"}, {"oven": {"door_code": ["hunter2"]}}, {"oven": "hunter2"}, {"auth": ["hunter2"]}],
)
def test_wrong_value_that_may_be_secret_is_not_shown(values: dict[str, Any]) -> None:
    [line] = problems_of(values)
    assert "hunter2" not in line


def test_redacted_settings_are_json_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_BAKERY_AUTH__TOKEN", "hunter2")
    shown = redacted(parse_config(BakeryConfig, {"oven": {"door_code": "hunter3"}}))
    assert "hunter" not in json.dumps(shown)
    assert shown["auth"]["token"] == shown["oven"]["door_code"] == "**********"
    assert shown["shelf"] == "/srv/shelf"
    assert "hunter" not in repr(parse_config(BakeryConfig, {"oven": {"door_code": "hunter3"}}))


def test_printed_defaults_load_as_the_defaults(file: Any) -> None:
    assert load_config(BakeryConfig, file(defaults_yaml(BakeryConfig))) == BakeryConfig()


def test_printed_defaults_describe_every_field() -> None:
    text = defaults_yaml(BakeryConfig)
    assert "oven:\n  # How hot, °C.\n  degrees: 200.0\n" in text
    assert "# Its oven.\n# \n# Of stone.\noven:" in text
    assert "  port: 50059\n" in text
    assert "port: 50059" not in defaults_yaml(BakeryConfig, without=["grpc.port"])


@pytest.mark.parametrize(
    ("cls", "required"),
    [
        (ValueConfig, {"state_dir": "state"}),
        (GenerationConfig, {"model": "model"}),
        (LearnerConfig, {"model": "model", "state_dir": "state"}),
        (OrchestratorConfig, {"run_dir": "run", "tasks": [{"kind": "digits"}]}),
    ],
)
def test_printed_defaults_of_a_program_load_with_required_ones(
    file: Any, cls: type[Settings], required: dict[str, Any]
) -> None:
    text = defaults_yaml(cls)
    assert {name for name in yaml.safe_load(text) if f"\n{name}:  # required" in f"\n{text}"} == required.keys()
    values = yaml.safe_load(text) | required
    assert load_config(cls, file(yaml.safe_dump(values))) == parse_config(cls, required)


@pytest.mark.parametrize("cls", PROGRAMS)
def test_every_setting_of_a_program_has_a_description(cls: type[Settings]) -> None:
    def undescribed(model: type[BaseModel], path: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            if not field.description:
                yield path + name
            if isinstance(field.default, StrictModel):
                yield from undescribed(type(field.default), f"{path}{name}.")

    assert not list(undescribed(cls))
