"""Collecting every wrong field of a request before refusing it."""

from __future__ import annotations

import re

from poise.errors import FieldViolation, InvalidRequest

IDENTIFIER = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class Violations:
    """The wrong fields of one request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, description: str) -> None:
        """Note a wrong field."""
        self._found.append(FieldViolation(field, description))

    def check(self, condition: bool, field: str, description: str) -> bool:
        """Note `field` unless `condition`, which is returned."""
        if not condition:
            self.add(field, description)
        return condition

    def identifier(self, field: str, value: str) -> bool:
        """Note `field` unless its value may name a run, a group or a batch."""
        if IDENTIFIER.fullmatch(value):
            return True
        state = "is empty" if not value else f"is {value[:40]!r}"
        self.add(field, f"{state}; required: 1 to 128 characters of A-Z a-z 0-9 . _ : / -")
        return False

    def folder_name(self, field: str, value: str) -> bool:
        """Note `field` unless its value may name a folder."""
        if FOLDER_NAME.fullmatch(value):
            return True
        state = "is empty" if not value else f"is {value[:40]!r}"
        self.add(field, f"{state}; required: 1 to 64 characters of A-Z a-z 0-9 . _ -, not beginning with a dot")
        return False

    def raise_if_any(self) -> None:
        """Raise `InvalidRequest` naming all that was noted."""
        if self._found:
            raise InvalidRequest(self._found)
