"""Finding one's way in a tree of settings: which names there are, which hold secrets, what the environment calls them.

Knows types alone, no values of settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, SecretStr

_NESTED = "__"


def hint(cls: type[BaseModel], path: Sequence[int | str]) -> str:
    """Return what the unknown name at the end of `path` may have meant: its new name, a similar name, or all names."""
    models = _models_at(cls, path[:-1])
    for model in models:
        if new_name := getattr(model, "RENAMED", {}).get(path[-1]):
            return f"; it was renamed to {new_name!r}"
    known = [name for model in models for name in model.model_fields]
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(set(known)))}" if known else ""


def holds_secret(cls: type[BaseModel], path: Sequence[int | str]) -> bool:
    """Whether the value at `path` is a secret, or should be a section with one in it."""
    here: list[Any] = [cls]
    for part in path:
        here = _step(here, part)
    return any(_mentions_secret(annotation) for annotation in here)


def takes_number(annotation: Any) -> bool:
    """Whether a setting of this type is a number, or may be one, and never true or false."""
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


def misspelt_variables(cls: type[BaseModel], prefix: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each variable that is nearly a setting's, such as one with a single underscore for a double.

    So is one with a double underscore for a section that there is not. Others of that prefix are let pass: the
    environment is shared. Kubernetes, for one, sets POISE_VALUE_PORT for a Service called poise-value, and its
    `…_PORT` variables hold tcp://address.
    """
    known = list(_variables(cls))
    for name, value in environment.items():
        if not name.startswith(prefix) or value.startswith(("tcp://", "udp://")):
            continue
        rest = name.removeprefix(prefix).upper()
        if any(rest == variable or rest.startswith(variable + _NESTED) for variable in known):
            continue  # a setting, or within one: pydantic looks at it
        if near := difflib.get_close_matches(rest, known, n=1, cutoff=0.8):
            yield f"{name} (environment): unknown; did you mean {prefix}{near[0]}?"
        elif _NESTED in rest:  # nobody else's: a Service's variables have single underscores
            yield f"{name} (environment): unknown; sections: {', '.join(sorted(cls.model_fields))}"


def _variables(cls: type[BaseModel], section: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield section + name.upper()
        for model in _models_in(field.annotation):
            yield from _variables(model, section + name.upper() + _NESTED)


def _models_at(cls: type[BaseModel], path: Sequence[int | str]) -> list[type[BaseModel]]:
    here: list[Any] = [cls]
    for part in path:
        here = _step(here, part)
    return [model for annotation in here for model in _models_in(annotation)]


def _step(annotations: Sequence[Any], part: int | str) -> list[Any]:
    models = [model for annotation in annotations for model in _models_in(annotation)]
    fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
    if fields:
        return fields
    # A tag that chooses among models; else an index or a key, after which the same models are meant.
    tagged = [m for m in models if any(part in get_args(field.annotation) for field in m.model_fields.values())]
    return [*(tagged or models)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _mentions_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_mentions_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_mentions_secret(part) for part in get_args(annotation))
