"""Batches that training cannot use: kept in folders for inspection, and rejected after repeated failures.

    <folder>/batch-00000042.pb      the batch as submitted; `poise_client.codec.load_batch` reads it

A failure during training leaves the policy in memory unusable, so the learner restarts before it retries the batch.
Without a limit, a batch that always fails, for example from lack of memory, would make every restart fail.
"""

from __future__ import annotations

import logging
from pathlib import Path

from poise.errors import BackendDown
from poise.learner.storage.journal import Answer, Journal
from poise.runtime.files.atomic import write_file
from poise_client.types import Batch

logger = logging.getLogger(__name__)

MAX_FAILURES = 2
"""After this many failures, each followed by a restart, a batch's rollouts are rejected."""

_REMEDY = "if memory ran out, lower micro_batch_tokens or set gradient_checkpointing"


class BatchFolder:
    """A folder of the newest `keep` batches of one kind."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, sequence: int, content: bytes) -> Path | None:
        """Write a batch and delete the oldest beyond `keep`; return its path, or None after logging a write error."""
        path = self.folder / f"batch-{sequence:08d}.pb"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
            for old in sorted(self.folder.glob("batch-*.pb"))[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.error("cannot write %s: %s", path, error)
            return None
        return path


class Quarantine:
    """Counts the failures of each batch in the journal, and keeps the batches that failed too often."""

    def __init__(self, journal: Journal, folder: BatchFolder) -> None:
        self._journal = journal
        self._folder = folder

    def must_reject(self, sequence: int, content: bytes, old_answer: Answer | None) -> bool:
        """Return whether a batch has failed too often. False if it once succeeded: replicas have its result."""
        was_trained = old_answer is not None and not old_answer.is_quarantined
        return not was_trained and self._journal.num_failures(sequence, content) >= MAX_FAILURES

    def count_failure(self, sequence: int, batch: Batch, content: bytes, error: Exception) -> BackendDown:
        """Count a failure, durable on return; return the error to raise."""
        what = f"training on batch {batch.batch_id} failed: {error}"
        try:
            count = self._journal.add_failure(sequence, content, str(error))
        except OSError as write_error:
            return BackendDown(f"{what}; the failure could not be recorded: {write_error}")
        return BackendDown(f"{what} (failure {count} of {MAX_FAILURES} before the batch is rejected; {_REMEDY})")

    def keep(self, sequence: int, batch: Batch, content: bytes) -> None:
        """Write a rejected batch to the folder and log its path."""
        logger.error(
            "training on batch %s failed %d times: all its rollouts are rejected; the batch is kept in %s; %s",
            batch.batch_id,
            self._journal.num_failures(sequence, content),
            self._folder.save(sequence, content) or "no file",
            _REMEDY,
        )
