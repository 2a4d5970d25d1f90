"""Output of `poise config`: the key settings, all settings, their defaults, the JSON Schema of run.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

import yaml
from pydantic import BaseModel

from poise.local.run_file import LocalRun
from poise.local.run_settings import CONFIGS, FILLED_IN, PROGRAMS, RunFile
from poise.runtime.config.text import defaults_yaml, redacted, yaml_value

KEY_SETTINGS = (
    *("run.name", "run.dir", "model", "engine", "seed", "dtype", "max_staleness", "lora"),
    *("train.tasks", "train.algorithm", "train.num_steps", "train.prompts_per_step", "train.rollouts_per_prompt"),
    *("train.sampling.max_tokens", "train.sampling.temperature", "train.evaluation.num_prompts"),
    *("learner.optimizer.learning_rate", "learner.mini_batch_prompts", "learner.device", "generation.max_model_len"),
)
"""The twenty most important settings of a run, in the order in which they are shown."""

_SCHEMA_LINES = """\
# yaml-language-server: $schema=run.schema.json
# Editors complete and check this file after `poise config --schema > run.schema.json` in the same folder."""


def key_settings_text(run: LocalRun) -> str:
    """Return the key settings with descriptions and values, as a valid run.yaml."""
    return "\n".join(
        [
            _SCHEMA_LINES,
            "# The key settings. `poise config --all` shows the value of every setting, `--show-defaults` its meaning.",
            *_key_setting_lines(run),
        ]
    )


def _key_setting_lines(run: LocalRun) -> Iterator[str]:
    shown: list[str] = []
    for path in KEY_SETTINGS:
        *sections, name = path.split(".")
        for depth, section in enumerate(sections):
            if shown[: depth + 1] != sections[: depth + 1]:
                shown = sections[: depth + 1]
                yield f"{'  ' * depth}{section}:"
        shown = sections
        root: Any = run if path.startswith(tuple(f"{program}." for program in PROGRAMS)) else run.shared
        parent: Any = reduce(getattr, sections, root)
        pad = "  " * len(sections)
        yield f"{pad}# {_first_sentence(type(parent).model_fields[name].description or '')}"
        yield f"{pad}{name}: {yaml_value(_brief(getattr(parent, name)))}"


def _brief(value: Any) -> Any:
    """Return a value without the defaults of its sections, which `--all` shows."""
    if isinstance(value, tuple):
        return [_brief(item) for item in value]
    if isinstance(value, BaseModel):
        kind = {"kind": kind} if (kind := getattr(value, "kind", None)) else {}
        return kind | value.model_dump(mode="json", exclude_unset=True)
    return value


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


def resolved_text(run: LocalRun, program: str | None) -> str:
    """Return all settings of the programs, or of one of them, with secrets masked."""
    names = [program] if program else PROGRAMS
    return yaml.safe_dump({name: redacted(getattr(run, name)) for name in names}, sort_keys=False).rstrip()


def defaults_text(program: str | None) -> str:
    """Return every setting of run.yaml, or of one program, with its meaning and default."""
    if program is not None:
        return defaults_yaml(CONFIGS[program])
    filled_in = [f"{program}.{setting}" for program, settings in FILLED_IN.items() for setting in settings]
    return f"{_SCHEMA_LINES}\n{defaults_yaml(RunFile, without=filled_in)}"


def schema_text() -> str:
    """Return the JSON Schema of run.yaml."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunFile.model_json_schema(),
        "title": "run.yaml of POISE served",
    }
    return json.dumps(schema, indent=1, ensure_ascii=False)
