"""What people see of a run that says nothing itself: how far it is, read from its folder while it is made."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from poise.local.run_file import LocalRun
from poise.orchestrator.budget import Spent
from poise.orchestrator.progress import clock
from poise.runtime.cli.broken_pipe import OutputClosed

_LOOK_EVERY_S = 1.0


class Tail:
    """Rows that are added to a file of JSON lines. Training may need all of the machine: nothing is read twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the rows that were finished since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            self._offset = min(self._offset, file.seek(0, os.SEEK_END))  # a resumed run drops what it does again
            file.seek(self._offset)
            *lines, _ = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        return [row for line in lines if (row := _row(line)) is not None]


class Follower:
    """Tells of each evaluation of a run, and on a terminal, live, how far it is. Use as a context manager."""

    def __init__(self, run: LocalRun, where: str, console: Console) -> None:
        self._run = run
        self._where = where
        self._console = console
        self._status = console.status(f"{where}: starting its services")
        self._steps = Tail(run.dir / "metrics.jsonl")
        self._evaluations = Tail(run.dir / "evaluations.jsonl")
        self._evaluations.read()  # an earlier process has told of these
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        self._status.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        self._status.stop()

    def _follow(self) -> None:
        with contextlib.suppress(OutputClosed):  # the supervisor of the run notices, and stops it
            while not self._leaving.wait(_LOOK_EVERY_S):
                self._look()
            self._look()  # what came last

    def _look(self) -> None:
        for row in self._evaluations.read():
            self._console.print(f"{self._where}: {describe_evaluation(row)}", highlight=False, soft_wrap=True)
        if rows := self._steps.read():
            self._status.update(f"{self._where}: {self._how_far(rows[-1])}")

    def _how_far(self, row: dict[str, Any]) -> str:
        spent = Spent(row["step"] + 1, row["tokens"], row["wall_s"])
        share = min(1.0, self._run.train.limits.share(spent))
        return f"{describe_spent(spent)}, {share:.0%} of the budget, reward {row['reward']['mean']:.3f}"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # the rest of one, where the file was written anew
        return None
    return row if isinstance(row, dict) else None


def describe_evaluation(row: dict[str, Any]) -> str:
    """Say what a line of evaluations.jsonl holds."""
    means = [sum(rewards) / len(rewards) for rewards in row["rewards"]]
    spent = Spent(row["step"], row["tokens"], row["wall_s"])
    return f"held-out reward {sum(means) / len(means):.3f} after {describe_spent(spent)}"


def describe_spent(spent: Spent) -> str:
    """Say what a run has spent."""
    return f"{spent.num_steps} steps, {spent.tokens} tokens, {clock(spent.wall_s)}"
