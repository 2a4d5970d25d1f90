"""Load settings from the command line, the environment and a YAML file, in this order of precedence."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from poise.runtime.config.settings import ConfigError, Settings
from poise.runtime.config.text import dotted, models_in, problems_in

MAX_FILE_BYTES = 1024 * 1024

_IPV6 = re.compile(r"\[[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%\w+)?\](:[0-9]+)?|[0-9A-Fa-f:]*::[0-9A-Fa-f:.]*")
_NESTED = "__"

C = TypeVar("C", bound=Settings)


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Build settings from a YAML file, the environment and `a.b=value` overrides.

    Raises:
        ConfigError: names every problem, as `field.path: what is wrong`.
    """
    return parse_config(cls, read_yaml(path) if path is not None else {}, overrides, file=str(path or ""))


def parse_config(
    cls: type[C], values: Mapping[str, Any], overrides: Sequence[str] = (), *, file: str = "", section: str = ""
) -> C:
    """Build settings from the content of a file, the environment and `a.b=value` overrides.

    Errors name `file`, and `section` if `values` are only that section. Raises the errors of `load_config`.
    """
    prefix = cls.model_config.get("env_prefix", "")
    options = parse_overrides(overrides)
    environment: dict[str, Any] = {}
    problems = list(_misspelt_variables(cls, prefix, os.environ)) if prefix else []
    if any(
        isinstance(auth := place.get("auth"), Mapping) and auth.get("token") is not None for place in (values, options)
    ):
        problems.append(
            "auth.token: a secret must not be in a file or on the command line. Name a file in auth.token_file, "
            f"or set {prefix}AUTH__TOKEN"
        )
    try:
        if prefix:
            environment = EnvSettingsSource(cls)()
    except ValueError as error:  # a list or section in a variable must be JSON; the text leaves out the value
        problems.append(f"environment: {error}")

    def name(path: Sequence[int | str]) -> str:
        where = dotted([section, *path] if section else path)
        if path and _has(options, path):
            return f"--set {where}"
        if path and _has(environment, path):
            return f"{prefix}{_NESTED.join(map(str, path)).upper()} (environment)"
        return f"{file}: {where}" if file else where

    try:
        settings = cls(**merged(merged(values, environment), options))
    except ValidationError as error:
        problems[:0] = [f"{name(path)}: {text}" for path, text in problems_in(error, cls)]
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping. Raises `ConfigError` with the file's name and, for invalid YAML, the line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode() if len(content) <= MAX_FILE_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if text is None:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes. Check that it is a settings file")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date in a 13th month; too deep nesting
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must consist of `name: value` lines, but is a {type(values).__name__}")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(
            f"{path}: {odd[0]!r} is not the name of a setting; YAML reads on, off, yes and no as booleans"
        )
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=value` into a tree. Values are YAML: 3 is a number, true a boolean, [1, 2] a list.

    An IPv6 address, with or without brackets and port, is a string: YAML reads `::` as a mapping, `[::1]` as a list.

    Raises:
        ConfigError: an override does not have this form, or two contradict each other.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {override!r}: must look like section.field=value")
        try:
            value = text if _IPV6.fullmatch(text) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"--set {name}: the value is not YAML. Quote it") from None  # it may be a secret
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {name}: {part} already has a value. Set only one of them")
        node[parts[-1]] = value
    return tree


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `override`, merged section by section.

    A section of another `kind` replaces the one in `base` completely.
    A string in place of such a section is its kind.
    """
    result = dict(base)
    for key, value in override.items():
        current = base.get(key)
        if isinstance(current, Mapping) and isinstance(value, str) and "kind" in current:
            value = {"kind": value}
        if isinstance(current, Mapping) and isinstance(value, Mapping):
            is_other_kind = "kind" in value and current.get("kind", value["kind"]) != value["kind"]
            result[key] = dict(value) if is_other_kind else merged(current, value)
        else:
            result[key] = value
    return result


def _has(tree: Mapping[str, Any], path: Sequence[int | str]) -> bool:
    """Whether a tree has a value at `path`. A list index or a union's tag in the path is inside a value."""
    node: Any = tree
    for part in path:
        if not isinstance(node, Mapping):
            return True
        if part not in node:
            return False
        node = node[part]
    return True


def _misspelt_variables(cls: type[BaseModel], prefix: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each variable whose name resembles a setting's, or whose section does not exist.

    Other variables with the prefix are ignored. For example, Kubernetes sets POISE_VALUE_PORT for a Service named
    poise-value, and its `…_PORT` variables are tcp://address.
    """
    known = list(_variables(cls))
    for name, value in environment.items():
        if not name.startswith(prefix) or value.startswith(("tcp://", "udp://")):
            continue
        rest = name.removeprefix(prefix).upper()
        if any(rest == variable or rest.startswith(variable + _NESTED) for variable in known):
            continue  # a setting, or within one: pydantic checks it
        if near := difflib.get_close_matches(rest, known, n=1, cutoff=0.8):
            yield f"{name} (environment): unknown; did you mean {prefix}{near[0]}?"
        elif _NESTED in rest:  # not from Kubernetes: its variables have single underscores
            yield f"{name} (environment): unknown; sections: {', '.join(sorted(cls.model_fields))}"


def _variables(cls: type[BaseModel], section: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield section + name.upper()
        for model in models_in(field.annotation):
            yield from _variables(model, section + name.upper() + _NESTED)
