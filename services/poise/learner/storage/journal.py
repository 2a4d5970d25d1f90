"""The journal: every batch on disk before it is trained on, and every answer before it is given.

    <folder>/batch-00000042.pb      the batch as it came: length-delimited messages of learner.proto, then a checksum
    <folder>/answer-00000042.json   what came of it
    <folder>/failures-00000042.json how often training on it failed, where it did

Owns the files. A restart trains again on the batches after the last checkpoint, in order.
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

FAILED = "failed"
"""Why the rollouts of a batch are rejected on which training failed for good."""

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one batch."""

    run_id: str
    batch_id: str
    content: str
    """SHA-256 of the batch, hexadecimal: the same id with other content is a conflict."""
    policy_version: int
    """After it."""
    digest: str
    """Of the weights after it, hexadecimal."""
    metrics: StepMetrics
    rejected: tuple[tuple[RolloutId, str], ...]

    @property
    def is_set_aside(self) -> bool:
        """Whether training on the batch failed for good."""
        return any(reason == FAILED for _, reason in self.rejected)

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Answer:
        """Deserialise. Raises `ValueError` for what `to_json` never wrote."""
        values: dict[str, Any] = json.loads(text)
        try:
            metrics = values.pop("metrics")
            metrics["staleness"] = {int(age): count for age, count in metrics["staleness"].items()}
            rejected = tuple((RolloutId(**rollout), reason) for rollout, reason in values.pop("rejected"))
            return Answer(**values, metrics=StepMetrics(**metrics), rejected=rejected)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{error!r} in what should be an answer") from error


class Journal:
    """One folder of batches and answers, numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def try_writing(self) -> None:
        """Write a file and remove it. Raises `OSError`."""
        check_writable(self._folder)

    def write_batch(self, sequence: int, content: bytes) -> None:
        """Keep a batch, durable on return."""
        write_file(self._batch(sequence), content + hashlib.sha256(content).digest())

    def read_batch(self, sequence: int) -> Batch | None:
        """Return a batch; None when there is none.

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
        """Keep an answer, durable on return."""
        write_file(self._answer(sequence), answer.to_json().encode())

    def num_failures(self, sequence: int, content: bytes) -> int:
        """Return how often training on a batch has failed. Its number alone may have been another batch's once."""
        try:
            failures: dict[str, Any] = json.loads(self._failures(sequence).read_text())
            return int(failures["count"]) if failures["content"] == hashlib.sha256(content).hexdigest() else 0
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged
            return 0

    def add_failure(self, sequence: int, content: bytes, why: str) -> int:
        """Count one more, durable on return; return how many there are."""
        count = self.num_failures(sequence, content) + 1
        failures = {"content": hashlib.sha256(content).hexdigest(), "count": count, "last": why}
        write_file(self._failures(sequence), json.dumps(failures).encode())
        return count

    def answers(self) -> Iterator[tuple[int, Answer | None]]:
        """Yield all answers kept, oldest first; None in place of one that is damaged, which the log names."""
        for path in sorted(self._folder.glob("answer-*.json")):
            answer = None
            try:
                answer = Answer.from_json(path.read_text())
            except ValueError as error:
                logger.error("%s is damaged and of no use: %s", path, error)
            yield int(path.stem.removeprefix("answer-")), answer

    def prune(self, before_batch: int, before_answer: int) -> None:
        """Drop batches, with their failures, and answers of lower sequence numbers."""
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
