"""What people see of a run that says nothing itself: how far it is, read from its folder while it is made."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from poise.local.run_file import LocalRun
from poise.orchestrator.budget import Spent
from poise.orchestrator.progress import clock

_LOOK_EVERY_S = 1.0


class Follower:
    """Tells of each evaluation of a run, and on a terminal, live, how far it is. Use as a context manager."""

    def __init__(self, run: LocalRun, where: str, console: Console) -> None:
        self._run = run
        self._where = where
        self._console = console
        self._status = console.status(f"{where}: starting its services")
        self._num_told = len(_rows(run.dir / "evaluations.jsonl"))
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
        while not self._leaving.wait(_LOOK_EVERY_S):
            self._look()
        self._look()  # what came last

    def _look(self) -> None:
        evaluations = _rows(self._run.dir / "evaluations.jsonl")
        for row in evaluations[self._num_told :]:
            self._console.print(f"{self._where}: {describe_evaluation(row)}", highlight=False, soft_wrap=True)
        self._num_told = max(self._num_told, len(evaluations))
        if rows := _rows(self._run.dir / "metrics.jsonl"):
            self._status.update(f"{self._where}: {self._how_far(rows[-1])}")

    def _how_far(self, row: dict[str, Any]) -> str:
        spent = Spent(row["step"] + 1, row["tokens"], row["wall_s"])
        share = min(1.0, self._run.train.limits.share(spent))
        return f"{describe_spent(spent)}, {share:.0%} of the budget, reward {row['reward']['mean']:.3f}"


def describe_evaluation(row: dict[str, Any]) -> str:
    """Say what a line of evaluations.jsonl holds."""
    means = [sum(rewards) / len(rewards) for rewards in row["rewards"]]
    spent = Spent(row["step"], row["tokens"], row["wall_s"])
    return f"held-out reward {sum(means) / len(means):.3f} after {describe_spent(spent)}"


def describe_spent(spent: Spent) -> str:
    """Say what a run has spent."""
    return f"{spent.num_steps} steps, {spent.tokens} tokens, {clock(spent.wall_s)}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are whole."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]
