"""What `poise config` prints."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from tests.unit.local.test_run_file import MINIMAL, load

from poise.local.run_settings import PROGRAMS
from poise.local.show_config import KEY_SETTINGS, defaults_text, key_settings_text, resolved_text
from poise.runtime.config.settings import ConfigError


def test_key_settings_are_a_file_that_loads_the_same(tmp_path: Path) -> None:
    values = MINIMAL | {"seed": 3, "lora": {"rank": 4}, "train": {**MINIMAL["train"], "algorithm": "grpo"}}
    run = load(tmp_path, values)
    shown = yaml.safe_load(key_settings_text(run))
    again = load(tmp_path, shown)
    for program in PROGRAMS:
        assert getattr(again, program) == getattr(run, program)


def test_each_key_setting_has_a_line_of_description(tmp_path: Path) -> None:
    lines = key_settings_text(load(tmp_path)).splitlines()
    described = [name for above, name in itertools.pairwise(lines) if above.lstrip().startswith("# ")]
    assert len(KEY_SETTINGS) == 20
    names = {line.split(":")[0].strip() for line in described}
    assert names >= {path.rpartition(".")[2] for path in KEY_SETTINGS}


def test_printed_defaults_load_with_the_required_settings(tmp_path: Path) -> None:
    values = yaml.safe_load(defaults_text(None))
    with pytest.raises(ConfigError, match=r"model: "):
        load(tmp_path, values)
    values |= {"model": "org/model", "run": {"name": "mine", "dir": str(tmp_path / "run")}}
    with pytest.raises(ConfigError, match=r"train\.tasks: required, but not set"):
        load(tmp_path, values)
    values["train"]["tasks"] = [{"kind": "digits"}]
    printed, bare = load(tmp_path, values), load(tmp_path)
    for program in PROGRAMS:  # no setting that the run fills in was printed
        assert getattr(printed, program) == getattr(bare, program)


def test_resolved_settings_hide_secrets(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL | {"value": {"queue": {"url": "redis://user:pa55word@host:1/0"}}})
    shown = resolved_text(run, None)
    assert "pa55word" not in shown
    assert yaml.safe_load(shown)["train"]["run_id"] == "mine"
