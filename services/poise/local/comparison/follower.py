"""Show the progress of a run from the files in its folder, because its output goes to a log."""

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
from poise.orchestrator.budget import Usage
from poise.orchestrator.progress import format_duration
from poise.runtime.cli.broken_pipe import OutputClosed

_POLL_S = 1.0


class Tail:
    """Reads rows appended to a file of JSON lines. It reads each row once, to leave the CPU to training."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the complete rows since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            self._offset = min(
                self._offset, file.seek(0, os.SEEK_END)
            )  # a resumed run truncates the file to repeat steps
            file.seek(self._offset)
            *lines, _ = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        return [row for line in lines if (row := _row(line)) is not None]


class Follower:
    """Prints each evaluation of a run and, on a terminal, its progress. Use it as a context manager."""

    def __init__(self, run: LocalRun, where: str, console: Console) -> None:
        self._run = run
        self._where = where
        self._console = console
        self._status = console.status(f"{where}: starting its services")
        self._steps = Tail(run.dir / "metrics.jsonl")
        self._evaluations = Tail(run.dir / "evaluations.jsonl")
        self._evaluations.read()  # an earlier process has printed these
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        self._status.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._status.stop()

    def _follow(self) -> None:
        with contextlib.suppress(OutputClosed):  # the run's supervisor detects it and stops the run
            while not self._stopping.wait(_POLL_S):
                self._poll()
            self._poll()  # the last rows

    def _poll(self) -> None:
        for row in self._evaluations.read():
            self._console.print(f"{self._where}: {describe_evaluation(row)}", highlight=False, soft_wrap=True)
        if rows := self._steps.read():
            self._status.update(f"{self._where}: {self._progress(rows[-1])}")

    def _progress(self, row: dict[str, Any]) -> str:
        spent = Usage(row["step"] + 1, row["tokens"], row["wall_s"])
        share = min(1.0, self._run.train.limits.fraction(spent))
        return f"{describe_spent(spent)}, {share:.0%} of the budget, reward {row['reward']['mean']:.3f}"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # an incomplete row, because the file was rewritten
        return None
    return row if isinstance(row, dict) else None


def describe_evaluation(row: dict[str, Any]) -> str:
    """Return a row of evaluations.jsonl as text."""
    means = [sum(rewards) / len(rewards) for rewards in row["rewards"]]
    spent = Usage(row["step"], row["tokens"], row["wall_s"])
    return f"held-out reward {sum(means) / len(means):.3f} after {describe_spent(spent)}"


def describe_spent(spent: Usage) -> str:
    """Return what a run has spent as text."""
    return f"{spent.num_steps} steps, {spent.tokens} tokens, {format_duration(spent.wall_s)}"
