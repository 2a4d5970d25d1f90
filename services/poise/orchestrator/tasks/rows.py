"""The rows of a data file: problems, invalid rows, and the messages about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from poise.orchestrator.tasks.problem import Problem, TaskError

OnBadRow = Literal["stop", "skip"]
"""How to handle invalid rows: fail before the first step, or leave them out."""

MAX_SHOWN = 5


def printable(text: str) -> str:
    """Return a text with unprintable characters escaped, for terminals and logs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass(slots=True)
class BadRows:
    """The invalid rows of one file."""

    num: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)
    """Line and problem of the first ones."""

    def add(self, line: int, what: str) -> None:
        """Add an invalid row."""
        self.num += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append((line, printable(what)))


@dataclass(frozen=True, slots=True)
class DataFile:
    """The content of a data file."""

    path: Path
    on_bad_row: OnBadRow
    sha256: str
    """SHA-256 of the lines read, hexadecimal."""
    num_rows: int
    """All rows: valid, invalid and repeated."""
    problems: Sequence[Problem]
    """Problems of the valid rows, without repeated ones."""
    bad: BadRows
    repeats: Sequence[int] = ()
    """Lines that repeat an earlier problem."""

    def raise_if_bad(self) -> None:
        """Raise `TaskError` if there are invalid rows and `on_bad_row` is `stop`."""
        if self.bad.num and self.on_bad_row == "stop":
            remedy = "Fix them, or set on_bad_row: skip to leave them out."
            raise TaskError("\n".join([*self._shown(), f"{self.path}: {self._count()} invalid{self._cut()}. {remedy}"]))

    def describe_skipped(self) -> list[str]:
        """Return messages about the rows that are left out; empty if there are none."""
        lines = []
        if self.bad.num:
            lines = [f"{self.path}: {self._count()} left out (on_bad_row: skip){self._cut()}", *self._shown()]
        if self.repeats:
            first = ", ".join(map(str, self.repeats[:MAX_SHOWN])) + (", …" if len(self.repeats) > MAX_SHOWN else "")
            lines.append(f"{self.path}: {len(self.repeats)} rows repeat an earlier one and are left out: lines {first}")
        return lines

    def without(self, invalid: Sequence[tuple[Problem, str]]) -> DataFile:
        """Return the file with these problems moved to its invalid rows."""
        bad = BadRows(self.bad.num, list(self.bad.shown))
        for problem, what in invalid:
            bad.add(problem.line, what)
        keys = {problem.key for problem, _ in invalid}
        return dataclasses.replace(self, bad=bad, problems=[p for p in self.problems if p.key not in keys])

    def _count(self) -> str:
        return f"{self.bad.num} of {self.num_rows} rows {'is' if self.bad.num == 1 else 'are'}"

    def _cut(self) -> str:
        return f", showing the first {MAX_SHOWN}" if self.bad.num > MAX_SHOWN else ""

    def _shown(self) -> list[str]:
        return [f"{self.path}:{line}: {what}" for line, what in self.bad.shown]
