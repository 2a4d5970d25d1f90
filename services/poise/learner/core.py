"""The learner without its wire: batches in order, each once, over any crash.

A batch is journalled, then trained on, then answered; a checkpoint follows every few. A restart loads the last
checkpoint and trains again on the batches journalled since: the same versions, the same weights. What fails between
journal and answer leaves the memory in doubt, not the disk: the core refuses all from then on, for a restart to mend.

Owns versions, what was trained on, and what was answered. Knows neither gRPC nor replicas. All its methods block and
must be called from one thread at a time, but for the read-only properties.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from poise.errors import BackendDown, Conflict, TrainingStopped
from poise.learner import adapters
from poise.learner.admission import admit
from poise.learner.checkpoint import CheckpointStore, Progress, StateError
from poise.learner.checkpointing import ANSWERS_KEPT, Checkpointer
from poise.learner.config import LearnerConfig
from poise.learner.journal import Answer, Journal
from poise.learner.nonfinite import NonfiniteBatches
from poise.learner.team import make_trainer
from poise_client import combine_digests, hash_weights
from poise_client.codec import dump_batch
from poise_client.types import Adapter, Batch, ModelExport, StepMetrics, WeightArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """One version's weights, as they are to be served. Never changed once made."""

    lineage_id: str
    policy_version: int
    weights: dict[str, WeightArray]
    sha256_by_name: dict[str, bytes]
    digest: bytes
    adapter: Adapter | None = None
    """What the weights are, if an adapter's rather than the model's."""


class LearnerCore:
    """The learner's state, in memory and on disk."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._trainer = make_trainer(config)
        self._store = CheckpointStore(config.state_dir, config.keep_checkpoints)
        self._journal = Journal(config.state_dir / "journal")
        self._checkpoints = Checkpointer(self._store, self._journal)
        self._nonfinite = NonfiniteBatches(config.state_dir / "nonfinite", config.keep_nonfinite)
        self._answers: dict[tuple[str, str], Answer] = {}
        self._seen: set[bytes] = set()
        self._weights: dict[str, WeightArray] = {}
        self._sha256_by_name: dict[str, bytes] = {}
        self._digest = b""
        self._adapter: Adapter | None = None
        self.progress = Progress()
        self.published: Published | None = None
        """The current version; None until recovered."""
        self.failure = ""
        """Why the state in memory is not to be trusted any more; empty while it is."""

    @property
    def checkpoint_version(self) -> int:
        """The policy version of the last durable checkpoint."""
        return self._checkpoints.version

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        return self._trainer.max_tokens

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return self._trainer.vocabulary_size

    def recover(self) -> None:
        """Take the state folder and bring the policy to where it was.

        Raises:
            StateError: the folder is in use, or damaged beyond its spares.
            BackendDown: the model cannot be loaded.
        """
        self._store.open()
        self._journal.open()
        self._trainer.load()
        if self._config.lora is not None and self._config.push.transport == "lora":
            self._adapter = adapters.describe(self._config.lora, self._config.model)
        lineage_id = self._store.lineage()
        checkpoint = self._store.load()
        if checkpoint is not None:
            self._trainer.restore(checkpoint.tensors, checkpoint.progress.num_updates)
            self._trainer.num_skipped_in_a_row = checkpoint.progress.num_skipped_in_a_row
            self.progress, self._seen = checkpoint.progress, checkpoint.seen
            self._checkpoints.version = self.progress.policy_version
        answered = dict(self._journal.answers())
        first = self.progress.num_batches
        for sequence, answer in answered.items():
            if sequence < first and answer is not None:
                self._answers[answer.run_id, answer.batch_id] = answer
        self._take_weights()
        while (batch := self._journalled(self.progress.num_batches)) is not None:
            sequence = self.progress.num_batches
            logger.info("training again on batch %s (%d after the checkpoint)", batch.batch_id, sequence - first + 1)
            again = self._train(batch, dump_batch(batch))
            before = answered.get(sequence)
            if sequence in answered and (before is None or before.digest != again.digest):
                # Another machine, library or setting: the versions that were served are not these, or may not be.
                # Before the new answer hides it: a restart in between must see it again.
                lineage_id = self._store.new_lineage()
                logger.warning(
                    "training again gave other weights for version %d: they go out as new lineage %s",
                    again.policy_version,
                    lineage_id[:8],
                )
            self._keep(sequence, again)
        self._publish(lineage_id)

    def close(self) -> None:
        """Let go of the state folder, after the checkpoint that is being written."""
        self._checkpoints.close()
        self._trainer.close()
        self._store.close()

    def answer_of(self, batch: Batch) -> Answer | None:
        """Return the stored answer of a batch that was trained on.

        Raises:
            Conflict: its id was used for other content.
        """
        return self._known(batch, hashlib.sha256(dump_batch(batch)).hexdigest())

    def submit(self, batch: Batch) -> tuple[Answer, bool]:
        """Train on a batch unless it was trained on; return the answer, durable, and whether it is a stored one.

        Raises:
            Conflict: its id was used for other content.
            TrainingStopped: the last updates in a row were not finite; nothing has changed.
            BackendDown: it cannot be journalled, and nothing has changed; or `failure` says what went wrong.
        """
        self._refuse_if_failed()
        content = dump_batch(batch)
        known = self._known(batch, hashlib.sha256(content).hexdigest())
        if known is not None:
            return known, True
        self._refuse_if_stopped()
        assert self.published is not None  # noqa: S101 (recovered)
        sequence = self.progress.num_batches
        try:
            self._journal.write_batch(sequence, content)
        except OSError as error:
            raise BackendDown(
                f"state_dir cannot be written, and nothing was trained on: {error}", remedy="Make room for it."
            ) from error
        try:
            answer = self._train(batch, content)
            self._keep(sequence, answer)
        except Exception as error:
            self.failure = f"training on batch {batch.batch_id} failed midway: {error}"
            logger.exception("training on batch %s failed midway", batch.batch_id)
            self._refuse_if_failed()
        if answer.policy_version != self.published.policy_version:
            self._publish(self.published.lineage_id)
        if self.progress.num_batches % self._config.checkpoint_every_steps == 0:
            self._begin_checkpoint()
        return answer, False

    def checkpoint(self) -> Path:
        """Make the state of now durable by itself; return its folder.

        Raises:
            BackendDown: see `failure`.
            OSError: it cannot be written; nothing is lost.
        """
        self._refuse_if_failed()
        self._begin_checkpoint()
        path = self._checkpoints.finish()
        assert path is not None  # noqa: S101 (begun)
        return path

    def _begin_checkpoint(self) -> None:
        tensors, num_updates = self._trainer.state()
        self.progress = dataclasses.replace(self.progress, num_updates=num_updates)
        self._checkpoints.begin(self.progress, tensors, self._seen)

    def export(self, name: str) -> ModelExport:
        """Write the policy as a Hugging Face folder; one of the same name is replaced. Raises as `checkpoint` does."""
        self._refuse_if_failed()
        folder = self._config.export_dir or self._config.state_dir / "exports"
        folder.mkdir(parents=True, exist_ok=True)
        target, writing, old = folder / name, folder / f".{name}.writing", folder / f".{name}.old"
        for leftover in (writing, old):
            shutil.rmtree(leftover, ignore_errors=True)
        self._trainer.save_model(str(writing))
        if target.exists():
            target.rename(old)
        writing.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return ModelExport(str(target.resolve()), self.progress.policy_version)

    def _known(self, batch: Batch, content: str) -> Answer | None:
        known = self._answers.get((batch.run_id, batch.batch_id))
        if known is not None and known.content != content:
            raise Conflict(
                f"batch {batch.batch_id} of run {batch.run_id} was trained on with other content",
                remedy="Give every batch an id of its own; a resumed run must resubmit what it submitted.",
            )
        return known

    def _journalled(self, sequence: int) -> Batch | None:
        try:
            return self._journal.read_batch(sequence)
        except ValueError as error:
            raise StateError(
                f"{error}; restore it from a backup, or delete it, those after it and the file lineage beside the "
                "checkpoints: the learner then goes on from before it"
            ) from error

    def _refuse_if_failed(self) -> None:
        if self.failure:
            raise BackendDown(self.failure, remedy="The learner restarts and trains on it again.", retry_after_s=1.0)

    def _refuse_if_stopped(self) -> None:
        in_a_row = self.progress.num_skipped_in_a_row
        if in_a_row >= self._config.max_nonfinite_in_a_row:
            raise TrainingStopped(
                f"the last {in_a_row} updates were not finite, and nothing is trained on any more",
                remedy=f"Look at the log, and at the batches in {self._nonfinite.folder}. Start the learner with a "
                "lower optimiser.learning_rate, or, where batches are to blame, with a higher max_nonfinite_in_a_row.",
            )

    def _train(self, batch: Batch, content: bytes) -> Answer:
        """Train on what of a journalled batch may be trained on."""
        progress = self.progress
        split = admit(batch, self._seen, progress.policy_version, self._config.max_staleness)
        metrics = StepMetrics()
        version = progress.policy_version
        if split.accepted:
            metrics = self._trainer.train(split.accepted, batch.temperature)
            metrics = dataclasses.replace(metrics, staleness=dict(split.ages))
            version += 1
        if metrics.num_skipped_updates:
            logger.error(
                "batch %s: %d of its mini-batches changed nothing, for their loss or gradient was not finite; it is "
                "kept as %s",
                batch.batch_id,
                metrics.num_skipped_updates,
                self._nonfinite.save(progress.num_batches, content) or "nothing",
            )
        self._seen |= split.names
        reasons = Counter(progress.num_rejected) + Counter(reason for _, reason in split.rejected)
        self.progress = Progress(
            policy_version=version,
            num_updates=progress.num_updates + metrics.num_updates,
            num_batches=progress.num_batches + 1,
            num_rollouts=progress.num_rollouts + len(split.accepted),
            num_rejected=dict(reasons),
            last_batch_id=batch.batch_id,
            num_skipped_in_a_row=self._trainer.num_skipped_in_a_row,
        )
        if split.accepted:
            self._take_weights()
        return Answer(
            run_id=batch.run_id,
            batch_id=batch.batch_id,
            content=hashlib.sha256(content).hexdigest(),
            policy_version=version,
            digest=self._digest.hex(),
            metrics=metrics,
            rejected=tuple(split.rejected),
        )

    def _keep(self, sequence: int, answer: Answer) -> None:
        self._journal.write_answer(sequence, answer)
        self._answers[answer.run_id, answer.batch_id] = answer
        if len(self._answers) > ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]

    def _take_weights(self) -> None:
        self._weights = {}  # let go of the last ones first: these are as large as the model
        self._weights = self._trainer.weights()
        self._sha256_by_name = hash_weights(self._weights)
        self._digest = combine_digests(self._sha256_by_name, self._adapter)

    def _publish(self, lineage_id: str) -> None:
        self.published = Published(
            lineage_id, self.progress.policy_version, self._weights, self._sha256_by_name, self._digest, self._adapter
        )
