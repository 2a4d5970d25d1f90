"""The rows read from a data file, its bad rows, and the messages about them.

Knows neither JSON nor tokens: others find what is wrong with a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from poise.orchestrator.tasks.problem import Problem, TaskError

OnBadRow = Literal["stop", "skip"]
"""What bad rows of a data file do: stop the run before its first step, or leave it without them."""

MAX_SHOWN = 5


def printable(text: str) -> str:
    """Return a text of one line, for terminals and logs: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass(slots=True)
class BadRows:
    """The bad rows of one file."""

    num: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)
    """Line and what is wrong with it, of the first ones found."""

    def add(self, line: int, what: str) -> None:
        """Note a bad row."""
        self.num += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append((line, printable(what)))


@dataclass(frozen=True, slots=True)
class DataFile:
    """What was read of a file."""

    path: Path
    on_bad_row: OnBadRow
    sha256: str
    """Of what was read, hexadecimal."""
    num_rows: int
    """Good, bad and repeated ones."""
    problems: Sequence[Problem]
    """Of the good rows, without those that repeat another."""
    bad: BadRows
    repeats: Sequence[int] = ()
    """Lines that repeat a problem."""

    def raise_if_bad(self) -> None:
        """Raise `TaskError` for bad rows that are to stop the run."""
        if self.bad.num and self.on_bad_row == "stop":
            remedy = "Fix them, or set on_bad_row: skip to leave them out."
            raise TaskError("\n".join([*self._shown(), f"{self.path}: {self._count()} bad{self._cut()}. {remedy}"]))

    def describe_skipped(self) -> list[str]:
        """Return the lines that say which rows are left out; none where all are used."""
        lines = []
        if self.bad.num:
            lines = [f"{self.path}: {self._count()} left out (on_bad_row: skip){self._cut()}", *self._shown()]
        if self.repeats:
            first = ", ".join(map(str, self.repeats[:MAX_SHOWN])) + (", …" if len(self.repeats) > MAX_SHOWN else "")
            lines.append(f"{self.path}: {len(self.repeats)} rows repeat an earlier one and are left out: lines {first}")
        return lines

    def without(self, wrong: Sequence[tuple[Problem, str]]) -> DataFile:
        """Return it with these problems among its bad rows."""
        bad = BadRows(self.bad.num, list(self.bad.shown))
        for problem, what in wrong:
            bad.add(problem.line, what)
        keys = {problem.key for problem, _ in wrong}
        return dataclasses.replace(self, bad=bad, problems=[p for p in self.problems if p.key not in keys])

    def _count(self) -> str:
        return f"{self.bad.num} of {self.num_rows} rows {'is' if self.bad.num == 1 else 'are'}"

    def _cut(self) -> str:
        return f", showing the first {MAX_SHOWN}" if self.bad.num > MAX_SHOWN else ""

    def _shown(self) -> list[str]:
        return [f"{self.path}:{line}: {what}" for line, what in self.bad.shown]
