"""The settings in compare.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.local.comparison.file import BudgetSection, CompareFile, RunEntry, example_text, read_compare_file
from poise.local.comparison.plan import make_plan
from poise.runtime.config.settings import ConfigError

GOOD: dict[str, Any] = {
    "name": "trial",
    "base": "tiny",
    "budget": {"tokens": 1000},
    "runs": {"rloo": {"algorithm": "rloo"}, "poise": {"algorithm": "poise"}},
}


def read(folder: Path, **changes: Any) -> CompareFile:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
    return read_compare_file(path)


def test_omitted_settings_have_defaults(tmp_path: Path) -> None:
    file = read(tmp_path)
    assert (file.seeds, file.num_evaluations, file.reference_name) == ((0, 1, 2), 8, "rloo")
    assert file.folder == Path.cwd() / "compare" / "trial"
    assert read(tmp_path, dir=str(tmp_path / "here"), reference="poise").folder == tmp_path / "here"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "seed: unknown; did you mean 'seeds'?"),
        ({"runs": {"a": {"algoritm": "rloo"}}}, "runs.a.algoritm: unknown; did you mean 'algorithm'?"),
        ({"runs": {}}, "runs: "),
        ({"runs": {"a/b": {"algorithm": "rloo"}}}, "runs.a/b"),
        ({"budget": {}}, "budget: set exactly one of tokens, wall_s and updates"),
        ({"budget": {"tokens": 5, "updates": 5}}, "budget: set exactly one of"),
        ({"budget": {"token": 5}}, "budget.token: unknown; did you mean 'tokens'?"),
        ({"budget": {"tokens": 0}}, "budget.tokens: "),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds: one is listed twice"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"runs": {"a": {"algorithm": "rloo", "seeds": [2, 2]}}}, "runs.a.seeds: one is listed twice"),
        ({"reference": "grpo"}, "reference: 'grpo' is not a run; runs: rloo, poise"),
        ({"name": "a b"}, "name: "),
    ],
)
def test_wrong_setting_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **changes)
    assert message in str(caught.value)
    assert "compare.yaml" in str(caught.value)


def test_example_loads_and_explains_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "compare.yaml"
    path.write_text(example_text())
    file = read_compare_file(path)
    assert len(make_plan(file, path).runs) == len(file.runs) * len(file.seeds)
    for name, field in CompareFile.model_fields.items():
        assert f"\n{name}:" in example_text()
        if name not in ("budget", "runs", "seeds"):
            assert str(field.description).split(":")[0].split(".")[0] in example_text(), name
    for name in (*BudgetSection.model_fields, *RunEntry.model_fields):
        assert name in example_text()
    defaults = {name: field.default for name, field in CompareFile.model_fields.items() if not field.is_required()}
    assert {name: getattr(file, name) for name in defaults if name != "reference"} == {
        name: value for name, value in defaults.items() if name != "reference"
    }
