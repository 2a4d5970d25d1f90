"""Layers of settings, as plain trees: what of a lower one is left where a higher one says something else.

Sections are merged setting by setting, but for one case: a section that names its `kind` and lies under one of another
kind gives way whole, for its other settings belong to that kind. A word over such a section is its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` laid over it, section by section."""
    above = spelled_out(above, below)
    result = left_of(below, above)
    for key, value in above.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def spelled_out(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return `above` with words that stand over a section of some `kind` as the sections that they are short for."""
    spelled: dict[str, Any] = {}
    for key, value in above.items():
        under = below.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            spelled[key] = spelled_out(value, under)
        elif isinstance(under, Mapping) and isinstance(value, str) and "kind" in under:
            spelled[key] = {"kind": value}
        else:
            spelled[key] = value
    return spelled


def left_of(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` without its sections of another kind than `above` has in their place."""
    left: dict[str, Any] = {}
    for key, value in below.items():
        over = above.get(key)
        if isinstance(value, Mapping) and isinstance(over, Mapping):
            if "kind" in over and value.get("kind", over["kind"]) != over["kind"]:
                continue
            left[key] = left_of(value, over)
        else:
            left[key] = value
    return left
