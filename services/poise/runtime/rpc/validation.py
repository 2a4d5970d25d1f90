"""Collect every wrong field of a request before rejecting it."""

from __future__ import annotations

import re

from poise.errors import FieldViolation, InvalidRequest

IDENTIFIER = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

MAX_NAMED = 100
"""Wrong fields that an error names; more are only counted."""
_QUOTED_CHARS = 60


def quoted(value: object) -> str:
    """Return the `repr` of a caller's value for an error text, cut if it is long."""
    if isinstance(value, (str, bytes)) and len(value) > _QUOTED_CHARS:
        return f"{value[:_QUOTED_CHARS]!r}... ({len(value)} long)"
    text = repr(value)
    return text if len(text) <= 2 * _QUOTED_CHARS else f"{text[: 2 * _QUOTED_CHARS]}..."


class Violations:
    """The wrong fields of one request. Only the first `MAX_NAMED` are kept, so that errors stay small."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._num_unnamed = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, description: str) -> None:
        """Add a wrong field."""
        if self.is_full:
            self._num_unnamed += 1
        else:
            self._found.append(FieldViolation(field, description))

    @property
    def is_full(self) -> bool:
        """Whether further wrong fields would only be counted, so that reading the request can stop."""
        return len(self._found) >= MAX_NAMED

    def check(self, condition: bool, field: str, description: str) -> bool:
        """Add `field` unless `condition`, and return `condition`."""
        if not condition:
            self.add(field, description)
        return condition

    def identifier(self, field: str, value: str) -> bool:
        """Add `field` unless its value can name a run, a group or a batch; return whether it can."""
        if IDENTIFIER.fullmatch(value):
            return True
        state = "is empty" if not value else f"is {quoted(value)}"
        self.add(field, f"{state}; required: 1 to 128 characters of A-Z a-z 0-9 . _ : / -")
        return False

    def check_count(self, field: str, number: int, at_most: int, *, at_least: int = 0) -> None:
        """Raise `InvalidRequest` with all wrong fields unless a list's length is allowed. Call it before reading."""
        if not at_least <= number <= at_most:
            self.add(field, f"has {number}; required: {at_least} to {at_most}")
            self.raise_if_any()

    def folder_name(self, field: str, value: str) -> bool:
        """Add `field` unless its value can name a folder; return whether it can."""
        if FOLDER_NAME.fullmatch(value):
            return True
        state = "is empty" if not value else f"is {quoted(value)}"
        self.add(field, f"{state}; required: 1 to 64 characters of A-Z a-z 0-9 . _ -, not beginning with a dot")
        return False

    def error(self) -> InvalidRequest:
        """Return the error with all wrong fields. There must be at least one."""
        more = [FieldViolation("request", f"and {self._num_unnamed} more wrong fields")] if self._num_unnamed else []
        return InvalidRequest([*self._found, *more])

    def raise_if_any(self) -> None:
        """Raise `InvalidRequest` if any field is wrong."""
        if self._found:
            raise self.error()
