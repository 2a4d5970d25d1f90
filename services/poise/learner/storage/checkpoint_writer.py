"""Checkpoints beside training: copied between two batches, written while the next is trained on.

Owns when a checkpoint is durable, and what becomes superfluous then. Knows no policy. One checkpoint is written at a
time; whoever begins another waits for the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from poise.learner.storage.checkpoint import CheckpointStore, Progress
from poise.learner.storage.journal import Journal

logger = logging.getLogger(__name__)

ANSWERS_KEPT = 4096
"""Answers remembered; a batch resubmitted later than that finds all its rollouts duplicates."""


class Checkpointer:
    """Of one state folder. Its calls must not overlap."""

    def __init__(self, store: CheckpointStore, journal: Journal) -> None:
        self._store = store
        self._journal = journal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self.version = 0
        """The policy version of the last durable checkpoint."""

    def begin(self, progress: Progress, tensors: Mapping[str, torch.Tensor], seen: Set[bytes]) -> None:
        """Copy the state of now, and write it from here on. A checkpoint before it that failed is told in the log."""
        self._settle()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._writing = self._thread.submit(self._write, progress, copies, frozenset(seen))

    def finish(self) -> Path | None:
        """Wait for what is being written; return its folder, None where nothing is.

        Raises:
            OSError: it could not be written; nothing is lost, and the journal goes on without it.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def close(self) -> None:
        """End, after what is being written."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _settle(self) -> None:
        try:
            self.finish()
        except OSError as error:
            logger.error("no checkpoint was taken, and the journal goes on without: %s", error)

    def _write(self, progress: Progress, tensors: dict[str, torch.Tensor], seen: Set[bytes]) -> Path:
        path = self._store.save(progress, tensors, seen)
        self.version = progress.policy_version
        self._journal.prune(before_batch=self._store.sequences()[0], before_answer=progress.num_batches - ANSWERS_KEPT)
        return path
