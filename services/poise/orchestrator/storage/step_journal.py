"""The journal of sampled steps. A step is complete on disk before any of its labels or advantages is sent.

    step-<number>/labels.pb   labels for the probe
    step-<number>/batch.pb    the learner's training batch
    step-<number>/step.json   metrics so far, values, sampled rollouts, and state for later steps

A restarted run continues with these steps.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poise.orchestrator.errors import file_error_kind
from poise.runtime.files.atomic import check_writable, sync_folder, write_file
from poise_client.codec import CodecError, dump_batch, dump_labels, load_batch, load_labels
from poise_client.types import Batch, Group


@dataclass(frozen=True, slots=True)
class JournalledStep:
    """A sampled and scored step with its baselines, whose labels and batch are not sent yet."""

    step: int
    labels: list[Group]
    batch: Batch
    metrics: dict[str, Any]
    """Its line of metrics.jsonl, without the metrics of training."""
    values: dict[str, Any]
    """Its line of values.jsonl."""
    rollouts: list[dict[str, Any]]
    """Its lines of rollouts.jsonl."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its line of step_states.jsonl."""


_RENAMED = {"numbers": "metrics", "samples": "rollouts", "memory": "state"}
"""Keys of step.json in older releases."""


class StepJournal:
    """The journal of one run, used by one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        """Create the folder. Raises `OSError` if it is not writable."""
        self._path.mkdir(parents=True, exist_ok=True)
        writing = self._path / "writing"
        writing.mkdir(exist_ok=True)
        check_writable(writing)
        shutil.rmtree(writing)

    def write(self, step: JournalledStep) -> None:
        """Store a step. On return it is complete and durable.

        Raises:
            OSError: it is not stored. The call may be repeated.
        """
        writing, target = self._path / "writing", self._folder(step.step)
        for leftover in (writing, target):
            if leftover.exists():
                shutil.rmtree(leftover)
        writing.mkdir()
        write_file(writing / "labels.pb", dump_labels(step.labels))
        write_file(writing / "batch.pb", dump_batch(step.batch))
        content = {name: getattr(step, name) for name in ("metrics", "values", "rollouts", "state")}
        write_file(writing / "step.json", json.dumps(content).encode())
        writing.rename(target)
        sync_folder(self._path)

    def read(self, step: int) -> JournalledStep | None:
        """Return a step; None if it is not in the journal.

        Raises:
            RunError: it is damaged.
        """
        path = self._folder(step)
        if not path.exists():
            return None
        try:
            content = json.loads((path / "step.json").read_text())
            labels = load_labels((path / "labels.pb").read_bytes())
            batch = load_batch((path / "batch.pb").read_bytes())
            return JournalledStep(step, labels, batch, **{_RENAMED.get(name, name): content[name] for name in content})
        except (OSError, ValueError, TypeError, CodecError) as error:
            raise file_error_kind(error)(
                f"{path} is damaged: {error}. If nothing of step {step} was submitted, delete it to sample the step "
                "again; otherwise start a new run"
            ) from error

    def read_pending(self, first_step: int) -> dict[int, JournalledStep]:
        """Return the consecutive steps from `first_step` on. Raises the errors of `read`."""
        pending: dict[int, JournalledStep] = {}
        step = first_step
        while (journalled := self.read(step)) is not None:
            pending[step] = journalled
            step += 1
        return pending

    def drop(self, step: int) -> None:
        """Delete a step: either all of it was sent, or nothing was and it will be sampled again."""
        shutil.rmtree(self._folder(step))

    def tidy(self, next_step: int) -> None:
        """Delete everything but the consecutive steps from `next_step` on."""
        pending, step = set[Path](), next_step
        while (path := self._folder(step)).exists():
            pending.add(path)
            step += 1
        for path in self._path.glob("*"):
            if path not in pending:
                shutil.rmtree(path, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self._path / f"step-{step:08d}"
