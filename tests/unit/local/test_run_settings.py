"""run.yaml as one typed tree: shared settings reach every program, and nothing contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.local.test_run_file import MINIMAL, load

from poise.local.run_file import preset_names, preset_path
from poise.local.run_settings import CONFIGS, FILLED_IN, SHARED
from poise.local.show_config import schema_text
from poise.runtime.config.settings import ConfigError


def test_shared_settings_reach_every_program(tmp_path: Path) -> None:
    shared = {"seed": 7, "dtype": "bfloat16", "max_staleness": 2, "lora": {"rank": 4}, "engine": "torch"}
    run = load(tmp_path, MINIMAL | shared)
    assert run.learner.seed == run.train.seed == 7
    assert run.generation.dtype == run.learner.dtype == "bfloat16"
    assert run.learner.max_staleness == run.train.max_staleness == 2
    assert run.learner.lora is not None and run.learner.lora.rank == 4
    assert run.generation.engine == "torch"


def test_null_dtype_leaves_each_program_its_default(tmp_path: Path) -> None:
    run = load(tmp_path)
    assert (run.generation.dtype, run.learner.dtype) == ("auto", "float32")


def test_replicas_serve_adapters_only_if_pushed(tmp_path: Path) -> None:
    merged = load(tmp_path, MINIMAL | {"lora": {"rank": 4}})
    pushed = load(tmp_path, MINIMAL | {"lora": {"rank": 4}}, "learner.push.transport=lora")
    assert merged.generation.lora is None
    assert pushed.generation.lora is not None and pushed.generation.lora.max_rank == 4


SETTINGS = [(setting, name) for name, settings in SHARED.items() for setting in settings]


@pytest.mark.parametrize(("setting", "name"), SETTINGS)
@pytest.mark.parametrize("source", ["file", "command line"])
def test_shared_setting_in_a_section_is_rejected(tmp_path: Path, source: str, setting: str, name: str) -> None:
    program, _, field = setting.partition(".")
    values, overrides = MINIMAL, [f"{setting}=5"]
    if source == "file":
        values, overrides = MINIMAL | {program: {**MINIMAL.get(program, {}), field: 5}}, []
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, values, *overrides)
    assert f"{setting}: unknown here; set `{name}` at the top level, which reaches every program" in str(caught.value)


@pytest.mark.parametrize(("setting", "name"), SETTINGS)
def test_shared_setting_in_the_environment_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, name: str
) -> None:
    variable = f"POISE_{setting.replace('.', '_').upper()}"
    monkeypatch.setenv(variable, "5")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{variable} (environment): sets {setting} of one program only. Set `{name}`")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"run": {"seed": 3}}, "run.seed: unknown here; set `seed` at the top level"),
        ({"num_steps": 3}, "num_steps: unknown here; set `train.num_steps`"),
        ({"drain_timeout_s": 3}, "set `generation.drain_timeout_s` or `value.drain_timeout_s` or `learner.drain_ti"),
    ],
)
def test_misplaced_setting_is_rejected_with_its_place(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL | values)
    assert f"{tmp_path / 'run.yaml'}: " in str(caught.value)
    assert problem in str(caught.value)


def test_settings_in_the_tables_exist() -> None:
    filled_in = [f"{program}.{setting}" for program, settings in FILLED_IN.items() for setting in settings]
    for path in [*filled_in, *(setting for setting, _ in SETTINGS)]:
        program, field, *rest = path.split(".")
        annotation = CONFIGS[program].model_fields[field].annotation
        assert not rest or rest[0] in annotation.model_fields  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(json.loads(schema_text()))


@pytest.mark.parametrize("preset", preset_names())
def test_presets_match_the_schema(validator: Any, preset: str) -> None:
    assert not list(validator.iter_errors(yaml.safe_load(preset_path(preset).read_text())))


@pytest.mark.parametrize("algorithm", ["grpo", {"kind": "poise", "bootstrap": "batch_mean"}])
def test_schema_accepts_both_forms_of_an_algorithm(validator: Any, algorithm: Any) -> None:
    assert not list(validator.iter_errors({"model": "tiny", "train": {"algorithm": algorithm}}))


@pytest.mark.parametrize(
    "section",
    [
        {"train": {"num_stpes": 3}},
        {"learner": {"push": {"transprot": "grpc"}}},
        {"train": {"algorithm": "rlo"}},
        {"train": {"tasks": [{"kind": "digits", "skils": []}]}},
        {"learner": {"seed": 3}},
        {"value": {"probe": {"alpha": -1}}},
        {"modle": "tiny"},
    ],
)
def test_schema_rejects_what_loading_rejects(validator: Any, section: dict[str, Any]) -> None:
    assert list(validator.iter_errors({"model": "tiny"} | section))
