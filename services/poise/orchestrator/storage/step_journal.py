"""The steps in hand: what is whole on disk before any label or advantage of a step leaves.

    step-<number>/labels.pb   what the probe learns from
    step-<number>/batch.pb    what the learner trains on
    step-<number>/step.json   its numbers, and what else is shown and remembered of it

Owns these folders. A restart takes up there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poise.orchestrator.errors import kind_of_error
from poise.runtime.files.atomic import check_writable, sync_folder, write_file
from poise_client.codec import CodecError, dump_batch, dump_labels, load_batch, load_labels
from poise_client.types import Batch, Group


@dataclass(frozen=True, slots=True)
class JournalledStep:
    """A step whose rollouts are verified and valued, before any of it leaves."""

    step: int
    labels: list[Group]
    batch: Batch
    numbers: dict[str, Any]
    """Its line of metrics.jsonl, as far as known."""
    values: dict[str, Any]
    """Its line of values.jsonl."""
    samples: list[dict[str, Any]]
    """Its lines of trajectories.jsonl."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Its line of memory.jsonl, without the step."""


class StepJournal:
    """The journal of one run, used by one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        """Make the folder. Raises `OSError` if it cannot be written."""
        self._path.mkdir(parents=True, exist_ok=True)
        writing = self._path / "writing"
        writing.mkdir(exist_ok=True)
        check_writable(writing)
        shutil.rmtree(writing)

    def write(self, step: JournalledStep) -> None:
        """Keep a step, durable and whole on return.

        Raises:
            OSError: it is not kept. The same call may be made again.
        """
        writing, target = self._path / "writing", self._folder(step.step)
        for leftover in (writing, target):
            if leftover.exists():
                shutil.rmtree(leftover)
        writing.mkdir()
        write_file(writing / "labels.pb", dump_labels(step.labels))
        write_file(writing / "batch.pb", dump_batch(step.batch))
        about = {"numbers": step.numbers, "values": step.values, "samples": step.samples, "memory": step.memory}
        write_file(writing / "step.json", json.dumps(about).encode())
        writing.rename(target)
        sync_folder(self._path)

    def read(self, step: int) -> JournalledStep | None:
        """Return a step that was journalled; None when it was not.

        Raises:
            RunError: it is damaged.
        """
        path = self._folder(step)
        if not path.exists():
            return None
        try:
            about = json.loads((path / "step.json").read_text())
            labels = load_labels((path / "labels.pb").read_bytes())
            batch = load_batch((path / "batch.pb").read_bytes())
            return JournalledStep(step, labels, batch, **about)
        except (OSError, ValueError, TypeError, CodecError) as error:
            raise kind_of_error(error)(
                f"{path} is damaged: {error}. If none of step {step} was submitted, delete it to sample the step anew; "
                "else start a new run"
            ) from error

    def read_pending(self, first_step: int) -> dict[int, JournalledStep]:
        """Return the steps in hand, from `first_step` on without a gap. Raises as `read` does."""
        pending: dict[int, JournalledStep] = {}
        step = first_step
        while (journalled := self.read(step)) is not None:
            pending[step] = journalled
            step += 1
        return pending

    def drop(self, step: int) -> None:
        """Forget a step none of which has left, to be sampled anew, or all of which has."""
        shutil.rmtree(self._folder(step))

    def tidy(self, next_step: int) -> None:
        """Forget all but the steps in hand: those from `next_step` on without a gap."""
        in_hand, step = set[Path](), next_step
        while (path := self._folder(step)).exists():
            in_hand.add(path)
            step += 1
        for path in self._path.glob("*"):
            if path not in in_hand:
                shutil.rmtree(path, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self._path / f"step-{step:08d}"
