"""The journal: each batch is written before it is trained on, and each answer before it is returned.

    <folder>/batch-00000042.pb      the batch as submitted: length-delimited messages of learner.proto, then a checksum
    <folder>/answer-00000042.json   its answer
    <folder>/failures-00000042.json how often training on it failed, if it did

A restart replays the batches after the last checkpoint, in order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.runtime.files.atomic import check_writable, write_file
from poise_client.codec import load_batch
from poise_client.types import Batch, RolloutId, StepMetrics

logger = logging.getLogger(__name__)

ANSWERS_KEPT = 4096
"""Number of answers kept. If a batch is resubmitted after its answer was deleted, all its rollouts are rejected as
duplicates."""

FAILED = "failed"
"""The rejection reason of all rollouts in a batch that failed too often."""

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one batch."""

    run_id: str
    batch_id: str
    content: str
    """SHA-256 of the batch in hexadecimal: the same id with other content is a conflict."""
    policy_version: int
    """Policy version after the batch."""
    digest: str
    """Digest of the weights after the batch, in hexadecimal."""
    metrics: StepMetrics
    rejected: tuple[tuple[RolloutId, str], ...]

    @property
    def is_quarantined(self) -> bool:
        """Whether training on the batch failed too often."""
        return any(reason == FAILED for _, reason in self.rejected)

    def to_json(self) -> str:
        """Serialize."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Answer:
        """Deserialize. Raises `ValueError` for text that `to_json` did not write."""
        values: dict[str, Any] = json.loads(text)
        try:
            metrics = values.pop("metrics")
            metrics["staleness"] = {int(age): count for age, count in metrics["staleness"].items()}
            rejected = tuple((RolloutId(**rollout), reason) for rollout, reason in values.pop("rejected"))
            return Answer(**values, metrics=StepMetrics(**metrics), rejected=rejected)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an answer: {error!r}") from error


class Journal:
    """One folder of batches and answers, numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        """Create the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def check_writable(self) -> None:
        """Write a file and delete it. Raises `OSError`."""
        check_writable(self._folder)

    def write_batch(self, sequence: int, content: bytes) -> None:
        """Write a batch, durable on return."""
        write_file(self._batch(sequence), content + hashlib.sha256(content).digest())

    def read_batch(self, sequence: int) -> Batch | None:
        """Return a batch; None if there is none.

        Raises:
            ValueError: it is damaged.
        """
        try:
            data = self._batch(sequence).read_bytes()
        except FileNotFoundError:
            return None
        content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"{self._batch(sequence)} is damaged: its checksum does not match")
        return load_batch(content)

    def write_answer(self, sequence: int, answer: Answer) -> None:
        """Write an answer, durable on return."""
        write_file(self._answer(sequence), answer.to_json().encode())

    def num_failures(self, sequence: int, content: bytes) -> int:
        """Return how often training on a batch has failed. A different batch of the same number does not count."""
        try:
            failures: dict[str, Any] = json.loads(self._failures(sequence).read_text())
            return int(failures["count"]) if failures["content"] == hashlib.sha256(content).hexdigest() else 0
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # never failed, or the file is damaged
            return 0

    def add_failure(self, sequence: int, content: bytes, why: str) -> int:
        """Add one failure, durable on return; return the count."""
        count = self.num_failures(sequence, content) + 1
        failures = {"content": hashlib.sha256(content).hexdigest(), "count": count, "last": why}
        write_file(self._failures(sequence), json.dumps(failures).encode())
        return count

    def answers(self) -> Iterator[tuple[int, Answer | None]]:
        """Yield the numbers and answers, oldest first; log a damaged answer and yield None for it."""
        for path in sorted(self._folder.glob("answer-*.json")):
            answer = None
            try:
                answer = Answer.from_json(path.read_text())
            except ValueError as error:
                logger.error("%s is damaged and is ignored: %s", path, error)
            yield int(path.stem.removeprefix("answer-")), answer

    def prune(self, before_batch: int, before_answer: int) -> None:
        """Delete batches, with their failures, and answers of lower sequence numbers."""
        for pattern, limit in (
            ("batch-*.pb", before_batch),
            ("failures-*.json", before_batch),
            ("answer-*.json", before_answer),
        ):
            for path in self._folder.glob(pattern):
                if int(path.stem.partition("-")[2]) < limit:
                    path.unlink(missing_ok=True)

    def _batch(self, sequence: int) -> Path:
        return self._folder / f"batch-{sequence:08d}.pb"

    def _failures(self, sequence: int) -> Path:
        return self._folder / f"failures-{sequence:08d}.json"

    def _answer(self, sequence: int) -> Path:
        return self._folder / f"answer-{sequence:08d}.json"
