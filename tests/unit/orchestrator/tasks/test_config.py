"""Invalid settings of tasks are rejected at load."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from poise.orchestrator.tasks.config import DigitsTask, GymTask, JsonlTask, PrimerTask, TaskConfig

TASK = TypeAdapter(TaskConfig)


def test_kind_chooses_the_settings():
    assert isinstance(TASK.validate_python({"kind": "primer"}), PrimerTask)
    assert isinstance(TASK.validate_python({"kind": "digits"}), DigitsTask)
    assert isinstance(TASK.validate_python({"kind": "jsonl", "path": "a.jsonl"}), JsonlTask)
    assert isinstance(TASK.validate_python({"kind": "gym", "name": "spell_backward"}), GymTask)


def test_defaults():
    assert len(PrimerTask().skills) == 12
    assert PrimerTask().one_shot
    assert (PrimerTask().domain, DigitsTask().domain, PrimerTask().weight) == ("primer", "digits", 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "prime"}, "'primer', 'digits', 'jsonl', 'gym'"),
        ({"kind": "primer", "skills": ["copy", "fly"]}, "unknown skills fly; known: copy,"),
        ({"kind": "primer", "skills": []}, "at least 1"),
        ({"kind": "primer", "skills": ["copy", "copy"]}, "a skill is listed twice"),
        ({"kind": "digits", "skills": ["copy"]}, "unknown skills copy; known: fst,"),
        ({"kind": "primer", "weight": 0}, "greater than 0"),
        ({"kind": "primer", "weight": float("inf")}, "finite"),
        ({"kind": "primer", "domain": "two words"}, "1 to 128 characters"),
        ({"kind": "jsonl"}, "Field required"),
        (
            {"kind": "jsonl", "path": "a", "verifier": "exakt"},
            "must be one of exact, numeric, regex, or an import path",
        ),
        ({"kind": "jsonl", "path": "a", "verifier": "module:"}, "import path such as package.module:function"),
        ({"kind": "jsonl", "path": "a", "max_prompts": 0}, "greater than or equal to 1"),
        ({"kind": "jsonl", "path": "a", "evalpath": "b"}, "Extra inputs"),
        ({"kind": "gym", "name": "spell_backward", "size": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_rejected(settings, said):
    with pytest.raises(ValidationError) as caught:
        TASK.validate_python(settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("verifier", ["exact", "numeric", "regex", "checks:score", "my.own.checks:score"])
def test_names_and_import_paths_of_verifiers_are_accepted(verifier):
    assert JsonlTask(path=Path("a.jsonl"), verifier=verifier).verifier == verifier
