"""What becomes of batches on which training fails: each failure is counted, and after a few the batch is set aside.

Training fails in the midst, so a restart must mend the policy in memory before the next attempt; a batch that always
fails (it takes more memory than there is) would keep the learner from ever coming up again. Knows no policy.
"""

from __future__ import annotations

import logging

from poise.errors import BackendDown
from poise.learner.kept_batches import KeptBatches
from poise.learner.storage.journal import Answer, Journal
from poise_client.types import Batch

logger = logging.getLogger(__name__)

MAX_FAILURES = 2
"""Times that training on a batch may fail, with a restart after each, before it is set aside."""

_OUT_OF_MEMORY = "where memory ran out, lower micro_batch_tokens or set gradient_checkpointing"


class Attempts:
    """At the batches of one journal."""

    def __init__(self, journal: Journal, kept: KeptBatches) -> None:
        self._journal = journal
        self._kept = kept

    def are_over(self, sequence: int, content: bytes, answered: Answer | None) -> bool:
        """Whether a batch is to be set aside. Never one that was trained on: its effect was served."""
        may_be = answered is None or answered.is_set_aside
        return may_be and self._journal.num_failures(sequence, content) >= MAX_FAILURES

    def failed(self, sequence: int, batch: Batch, content: bytes, error: Exception) -> BackendDown:
        """Count a failure, durable on return; return the error that tells of it."""
        why = f"training on batch {batch.batch_id} failed midway: {error}"
        try:
            count = self._journal.add_failure(sequence, content, str(error))
        except OSError as unwritten:
            return BackendDown(f"{why}; and this cannot be noted: {unwritten}")
        return BackendDown(f"{why} (failure {count} of {MAX_FAILURES}, then it is set aside; {_OUT_OF_MEMORY})")

    def set_aside(self, sequence: int, batch: Batch, content: bytes) -> None:
        """Keep a batch for inspection, and say so."""
        logger.error(
            "training on batch %s failed %d times: its rollouts are rejected, and it is kept as %s; %s",
            batch.batch_id,
            self._journal.num_failures(sequence, content),
            self._kept.save(sequence, content) or "nothing",
            _OUT_OF_MEMORY,
        )
