"""What people read of settings: what is wrong with them, their defaults as YAML, their values without secrets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from poise.runtime.config.tree import hint, holds_secret


def explain(error: ValidationError, cls: type[BaseModel]) -> Iterator[str]:
    """Yield one line a problem: `field.path: what is wrong`, with the nearest known name for an unknown one."""
    for problem in error.errors():
        path = problem["loc"]
        name = ".".join(map(str, path)) or "settings"
        if problem["type"] == "extra_forbidden":
            yield f"{name}: unknown{hint(cls, path)}"
        elif problem["type"] == "missing":
            yield f"{name}: required, and set nowhere"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            hidden = isinstance(problem["input"], dict) or holds_secret(cls, path)
            yield f"{name}: {message}" + ("" if hidden else f" (given: {problem['input']!r})")


def redacted(config: BaseModel) -> dict[str, Any]:
    """Return the settings as JSON-able values with every secret masked."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def defaults_yaml(cls: type[BaseModel], indent: int = 0) -> str:
    """Return all settings with their defaults and their descriptions, as YAML to start a file from."""
    defaults = {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in cls.model_fields.items()
    }
    return _section_yaml(cls, defaults, indent)


def _section_yaml(cls: type[BaseModel], values: Mapping[str, Any], indent: int) -> str:
    lines: list[str] = []
    pad = "  " * indent
    for name, field in cls.model_fields.items():
        lines += [f"{pad}# {line}" for line in (field.description or "").splitlines()]
        value = values[name]
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", _section_yaml(type(value), dict(value), indent + 1)]
        elif field.is_required() and value is None:
            lines.append(f"{pad}{name}:  # required")
        else:
            lines.append(f"{pad}{name}: {_yaml_value(value)}")
    return "\n".join(lines)


def _yaml_value(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()  # a default is no secret
    elif isinstance(value, os.PathLike):
        value = str(value)
    elif isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return dumped.removesuffix("...\n").strip()
