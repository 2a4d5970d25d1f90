"""Settings as text: problems with them, their defaults as commented YAML, their values without secrets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

Path = Sequence[int | str]


def problems_in(error: ValidationError, cls: type[BaseModel]) -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each problem, without secrets; with a similar known name for an unknown one."""
    for problem in error.errors():
        path, text = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield path, f"unknown{_hint(cls, path)}"
        elif problem["type"] == "missing":
            yield path, "required, but not set"
        else:
            hidden = isinstance(problem["input"], dict) or _may_contain_secret(cls, path)
            yield path, text if hidden else f"{text} (given: {problem['input']!r})"


def dotted(path: Path) -> str:
    """Return a path as in `grpc.port`; `settings` for the root."""
    return ".".join(map(str, path)) or "settings"


def redacted(config: BaseModel) -> dict[str, Any]:
    """Return settings as JSON-able values with every secret masked."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def defaults_yaml(cls: type[BaseModel], without: Collection[str] = ()) -> str:
    """Return all settings with their descriptions and defaults, as YAML to start a file from.

    `without` lists settings to leave out, as in `grpc.port`.
    """
    defaults = {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in cls.model_fields.items()
    }
    return "\n".join(_section_yaml(cls, defaults, "", without))


def _section_yaml(
    cls: type[BaseModel], values: Mapping[str, Any], section: str, without: Collection[str]
) -> Iterator[str]:
    pad = "  " * section.count(".")
    for name, field in cls.model_fields.items():
        value = values[name]
        if section + name in without:
            continue
        yield from (f"{pad}# {line}" for line in (field.description or "").splitlines())
        if isinstance(value, BaseModel):
            yield f"{pad}{name}:"
            yield from _section_yaml(type(value), dict(value), f"{section}{name}.", without)
        elif field.is_required() and value is None:
            yield f"{pad}{name}:  # required"
        else:
            yield f"{pad}{name}: {yaml_value(value)}"


def yaml_value(value: Any) -> str:
    """Return a setting's value as YAML on one line."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()  # a default is not secret
    elif isinstance(value, os.PathLike):
        value = str(value)
    elif isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a setting of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _hint(cls: type[BaseModel], path: Path) -> str:
    """Return a hint for the unknown name at the end of `path`: its new name, a similar name, or all names."""
    models = [model for annotation in _types_at(cls, path[:-1]) for model in models_in(annotation)]
    for model in models:
        if new_name := getattr(model, "RENAMED", {}).get(path[-1]):
            return f"; it was renamed to {new_name!r}"
        if instead := getattr(model, "MOVED", {}).get(path[-1]):
            return f" here; set {instead}"
    known = [name for model in models for name in model.model_fields]
    if near := difflib.get_close_matches(str(path[-1]), known, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(set(known)))}" if known else ""


def _may_contain_secret(cls: type[BaseModel], path: Path) -> bool:
    """Whether the value at `path` is a secret, or must be a section that contains one."""
    return any(map(_contains_secret, _types_at(cls, path)))


def _types_at(cls: type[BaseModel], path: Path) -> list[Any]:
    """Return the types that the value at `path` may have."""
    here: list[Any] = [cls]
    for part in path:
        models = [model for annotation in here for model in models_in(annotation)]
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        # Not a field: either a union's tag, which selects a model, or an index or key, which keeps the models.
        tagged = [m for m in models if any(part in get_args(field.annotation) for field in m.model_fields.values())]
        here = fields or [*(tagged or models)]
    return here


def _contains_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_contains_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_contains_secret(part) for part in get_args(annotation))
