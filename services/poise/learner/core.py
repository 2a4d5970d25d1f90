"""The learner's state machine: each batch is journalled, trained on and answered exactly once, even across crashes.

    submit ─► journal ─► train ─► answer (durable) ─► publish ─► every few batches: checkpoint, on a thread

A restart loads the last checkpoint and replays the journal: the same versions with the same weights. If something fails
between journal and answer, the weights in memory are unreliable but the disk is not. The core then rejects every call,
and the service restarts. A batch on which training fails repeatedly is quarantined and changes nothing.

All methods block and must be called from one thread at a time, except those that say otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from poise.errors import BackendDown, Conflict, PoiseError, TrainingStopped, Unusable
from poise.learner.admission import admit
from poise.learner.config import LearnerConfig
from poise.learner.distributed.coordinator import make_trainer
from poise.learner.distributed.rank_health import RankEvents, RankLost
from poise.learner.models import lora
from poise.learner.publishing.weight_version import WeightVersion
from poise.learner.quarantine import BatchFolder, Quarantine
from poise.learner.resume_checks import check_batch, check_checkpoint, origin_of
from poise.learner.storage import export
from poise.learner.storage.capacity import SpaceNeed, missing_space
from poise.learner.storage.checkpoint import Checkpoint, CheckpointStore, Progress, StateError
from poise.learner.storage.journal import ANSWERS_KEPT, FAILED, Answer, Journal
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.startup import Startup
from poise_client.codec import dump_batch
from poise_client.types import Adapter, Batch, ModelExport, RolloutId, StepMetrics

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Pause between two attempts to write an answer."""
_CHECK_NAME = "poise-check"
_CHECKPOINT_BYTES, _EXPORT_BYTES = 12, 4
"""Bytes per parameter, all float32: value and two moments in a checkpoint, value in an export."""
_NO_WEIGHTS = WeightVersion("", 0, {}, {}, b"")


class LearnerCore:
    """The learner's state in memory and on disk."""

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        self.trainer = make_trainer(config)
        self._journal = Journal(config.state_dir / "journal")
        self.checkpoints = CheckpointStore(config.state_dir, config.keep_checkpoints, self._checkpoint_saved)
        self._nonfinite = BatchFolder(config.state_dir / "nonfinite", config.keep_nonfinite)
        self._quarantine = Quarantine(self._journal, BatchFolder(config.state_dir / "failed", config.keep_nonfinite))
        self._answers: dict[tuple[str, str], Answer] = {}
        """The last answers by run and batch id."""
        self._seen: set[bytes] = set()
        """Digests of the rollouts trained on."""
        self._lineage_id = ""
        self._weights = _NO_WEIGHTS
        """The trainer's current weights, published once the batch is answered."""
        self._adapter: Adapter | None = None
        """Describes the adapter if only the adapter's weights are published."""
        self._training: tuple[int, Batch, bytes] | None = None
        """Sequence number, batch and content of the batch in training."""
        self._stop_waiting = threading.Event()
        self.startup = Startup("recovering")
        """The progress of `recover`."""
        self.progress = Progress()
        self.published: WeightVersion | None = None
        """The current version; None until recovered."""
        self.failure = ""
        """Why the weights in memory are unreliable; empty while they are reliable."""
        self.disk_error = ""
        """Why `state_dir` is not writable; empty while it is."""
        self.checkpoint_version = 0
        """The policy version of the last durable checkpoint."""

    @property
    def is_stopped(self) -> bool:
        """Whether training has stopped after too many updates in a row that were not finite."""
        return self.progress.num_skipped_in_a_row >= self.config.max_nonfinite_in_a_row

    def listen(self, on_lost: Callable[[str], object], on_leaving: Callable[[str], object]) -> None:
        """Call `on_lost` when a rank is lost, `on_leaving` when one gets a stop signal; both on another thread."""
        self.trainer.listen(RankEvents(lambda loss: on_lost(str(loss)), on_leaving, self._count_remote_failure))

    def ping(self) -> None:
        """Check that the other ranks, if any, still take commands.

        Raises:
            RankLost: one does not; see `failure`.
        """
        with self._failing_with_ranks():
            self.trainer.ping()

    def stop_waiting(self) -> None:
        """Stop waiting for a disk that cannot be written. May be called from any thread."""
        self._stop_waiting.set()

    def recover(self) -> None:
        """Lock the state folder, load the last checkpoint and replay the journal.

        Raises:
            StateError: the folder is in use or damaged, or was written with another model, adapters or critic.
            BackendDown: the model cannot be loaded or exported, or training failed again.
        """
        self.checkpoints.open()
        self._journal.open()
        self.startup.begin("loading weights")
        self.trainer.load()
        self.startup.begin("checking that exports and checkpoints can be written")
        self._check_outputs()
        self.startup.begin("copying and hashing weights")
        if self.config.lora is not None and self.config.push.transport == "lora":
            self._adapter = lora.describe(self.config.lora, self.config.model)
        self._lineage_id = self.checkpoints.lineage()
        self._take_weights(0)
        self.progress = Progress(origin=origin_of(self.config, self._weights))
        self.startup.begin("reading the last checkpoint")
        if (checkpoint := self.checkpoints.load()) is not None:
            self._restore(checkpoint)
        self._replay(dict(self._journal.answers()))
        self.published = dataclasses.replace(self._weights, lineage_id=self._lineage_id)

    def submit(self, batch: Batch) -> tuple[Answer, bool]:
        """Train on a batch and return its durable answer. A batch trained on before gets its stored answer.

        The second value is True for a stored answer.

        Raises:
            Conflict: a batch with this id but other content was trained on before.
            TrainingStopped: too many updates in a row were not finite; nothing has changed.
            BackendDown: the batch cannot be journalled, and nothing has changed; or the learner must restart, see
                `failure`.
        """
        self._check_healthy()
        assert self.published is not None  # noqa: S101 (recovered)
        content = dump_batch(batch)
        if (stored := self._stored_answer(batch, content)) is not None:
            return stored, True
        self._check_not_stopped()
        sequence = self.progress.num_batches
        self._write_batch(sequence, content)
        try:
            answer = self._train(batch, content)
        except Exception as error:
            self._fail(str(error))
        try:
            self._write_answer(sequence, answer)
        except Exception as error:
            self._fail(f"the answer to batch {batch.batch_id} cannot be written: {error}")
        if answer.policy_version != self.published.policy_version:
            self.published = self._weights
        if self.progress.num_batches % self.config.checkpoint_every_steps == 0:
            self._start_checkpoint()
        return answer, False

    def checkpoint(self) -> Path:
        """Write a checkpoint of the current state, durable on return; return its folder.

        Raises:
            BackendDown: see `failure`.
            OSError: it cannot be written; nothing is lost.
        """
        self._check_healthy()
        self._start_checkpoint()
        path = self.checkpoints.finish_saving()
        assert path is not None  # noqa: S101 (started)
        return path

    def export(self, name: str) -> ModelExport:
        """Write the policy as a Hugging Face folder, replacing an earlier export of the same name.

        Raises:
            InvalidRequest: a file or folder of that name exists and is not an export.
            BackendDown: it cannot be written, and nothing is lost; or see `failure`.
        """
        self._check_healthy()
        version = self.progress.policy_version
        with (
            self._failing_with_ranks(),
            export.describing_errors(f"version {version}", self._export_dir, collective=self.trainer.has_other_ranks),
        ):
            path = export.write_export(self._export_dir, name, version, self.trainer.save_model)
        return ModelExport(str(path), version)

    def check_export(self, name: str) -> ModelExport:
        """Return or raise what `export` would, by writing and deleting an export without parameters."""
        self._check_healthy()
        with export.describing_errors(f"model {self.config.model}", self._export_dir):
            path = export.check_export(self._export_dir, name, self.trainer.policy.save_without_parameters)
        return ModelExport(str(path), self.progress.policy_version)

    def check_disk(self) -> None:
        """Clear `disk_error` if `state_dir` can be written again."""
        if not self.disk_error:
            return
        try:
            self._journal.check_writable()
        except OSError as error:
            self._set_disk_error(error)
        else:
            self.disk_error = ""
            logger.info("state_dir %s can be written again", self.config.state_dir)

    def close(self) -> None:
        """Wait for the checkpoint being written, unlock the state folder and leave the process group."""
        try:
            self.checkpoints.close()
        finally:
            self.trainer.close()

    def _restore(self, checkpoint: Checkpoint) -> None:
        origin, progress = self.progress.origin, checkpoint.progress
        check_checkpoint(checkpoint, self.config, origin, self.trainer.trained_shapes())
        self.trainer.restore(checkpoint.tensors, progress.num_updates)
        self.trainer.num_skipped_in_a_row = progress.num_skipped_in_a_row
        self.progress, self._seen = dataclasses.replace(progress, origin=origin), checkpoint.seen
        self.checkpoint_version = progress.policy_version
        self._take_weights(progress.policy_version)

    def _replay(self, answers: dict[int, Answer | None]) -> None:
        """Train again on the batches journalled after the checkpoint; start a new lineage if the weights differ."""
        first = self.progress.num_batches
        for sequence, answer in answers.items():
            if sequence < first and answer is not None:
                self._answers[answer.run_id, answer.batch_id] = answer
        while (batch := self._read_batch(self.progress.num_batches)) is not None:
            sequence = self.progress.num_batches
            check_batch(batch, self.config)
            logger.info("replaying batch %s (%d after the checkpoint)", batch.batch_id, sequence - first + 1)
            self.startup.begin(f"replaying batch {sequence - first + 1} after the checkpoint")
            old = answers.get(sequence)
            new = self._train(batch, dump_batch(batch), old)
            if sequence in answers and (old is None or old.digest != new.digest):
                # Another machine, library or setting: replicas may serve other weights under this version number.
                # Start the lineage before the new answer hides the difference from the next restart.
                self._lineage_id = self.checkpoints.new_lineage()
                logger.warning(
                    "replaying gave other weights for version %d: publishing them as new lineage %s",
                    new.policy_version,
                    self._lineage_id[:8],
                )
            self._write_answer(sequence, new)

    def _read_batch(self, sequence: int) -> Batch | None:
        try:
            return self._journal.read_batch(sequence)
        except ValueError as error:
            raise StateError(
                f"{error}. Restore it from a backup. Or delete it, all later batches, and the file lineage beside the "
                "checkpoints; the learner then resumes after the previous batch"
            ) from error

    def _stored_answer(self, batch: Batch, content: bytes) -> Answer | None:
        answer = self._answers.get((batch.run_id, batch.batch_id))
        if answer is not None and answer.content != hashlib.sha256(content).hexdigest():
            raise Conflict(
                f"batch {batch.batch_id} of run {batch.run_id} was already trained on with other content",
                remedy="Use a new id for every batch. A resumed run must resubmit exactly what it submitted.",
            )
        return answer

    def _write_batch(self, sequence: int, content: bytes) -> None:
        try:
            self._journal.write_batch(sequence, content)
        except OSError as error:
            self._set_disk_error(error)
            raise BackendDown(
                f"nothing was trained on: {self.disk_error}",
                remedy="Submit the batch again once state_dir is writable.",
                retry_after_s=1.0,
            ) from error
        self.disk_error = ""

    def _train(self, batch: Batch, content: bytes, old_answer: Answer | None = None) -> Answer:
        """Train on the admitted rollouts of a journalled batch; return the answer.

        Raises:
            BackendDown: training failed. The failure counts against the batch unless another rank was lost.
        """
        sequence = self.progress.num_batches
        if self._quarantine.must_reject(sequence, content, old_answer):
            self._quarantine.keep(sequence, batch, content)
            return self._advance(batch, content, StepMetrics(), [(rollout.id, FAILED) for rollout in batch.rollouts])
        self._training = sequence, batch, content
        try:
            version, metrics = self.progress.policy_version, StepMetrics()
            admission = admit(batch, self._seen, version, self.config.max_staleness)
            if admission.accepted:
                metrics = self.trainer.train(admission.accepted, batch.temperature)
                metrics = dataclasses.replace(metrics, staleness=dict(admission.ages))
            if metrics.num_skipped_updates:
                logger.error(
                    "batch %s: skipped %d mini-batches whose loss or gradient was not finite; the batch is kept in %s",
                    batch.batch_id,
                    metrics.num_skipped_updates,
                    self._nonfinite.save(sequence, content) or "no file",
                )
            self._seen |= admission.digests
            if admission.accepted:
                self._take_weights(version + 1)
            return self._advance(batch, content, metrics, admission.rejected)
        except Exception as error:
            if isinstance(error, RankLost) and not error.in_training:
                raise  # the batch did not cause it
            raise self._quarantine.count_failure(sequence, batch, content, error) from error
        finally:
            self._training = None

    def _advance(
        self, batch: Batch, content: bytes, metrics: StepMetrics, rejected: Sequence[tuple[RolloutId, str]]
    ) -> Answer:
        """Count a batch as processed, with a new version if any rollout was trained on; return the answer."""
        progress = self.progress
        num_accepted = len(batch.rollouts) - len(rejected)
        self.progress = dataclasses.replace(
            progress,
            policy_version=progress.policy_version + (num_accepted > 0),
            num_updates=progress.num_updates + metrics.num_updates,
            num_batches=progress.num_batches + 1,
            num_rollouts=progress.num_rollouts + num_accepted,
            num_rejected=dict(Counter(progress.num_rejected) + Counter(reason for _, reason in rejected)),
            last_batch_id=batch.batch_id,
            num_skipped_in_a_row=self.trainer.num_skipped_in_a_row,
        )
        return Answer(
            run_id=batch.run_id,
            batch_id=batch.batch_id,
            content=hashlib.sha256(content).hexdigest(),
            policy_version=self.progress.policy_version,
            digest=self._weights.digest.hex(),
            metrics=metrics,
            rejected=tuple(rejected),
        )

    def _take_weights(self, policy_version: int) -> None:
        self._weights = _NO_WEIGHTS  # free the old ones first: they are as large as the model
        self._weights = WeightVersion.of(self._lineage_id, policy_version, self.trainer.weights(), self._adapter)

    def _write_answer(self, sequence: int, answer: Answer) -> None:
        """Make an answer durable. Wait while the disk cannot be written: the weights in memory stay correct."""
        while True:
            try:
                self._journal.write_answer(sequence, answer)
                break
            except OSError as error:
                self._set_disk_error(error)
                if self._stop_waiting.wait(_RETRY_S):
                    raise
        self.disk_error = ""
        self._answers[answer.run_id, answer.batch_id] = answer
        if len(self._answers) > ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]

    def _start_checkpoint(self) -> None:
        try:
            tensors, num_updates = self.trainer.state()
        except Exception as error:
            # Everything is journalled and answered, but another rank or its memory is lost.
            self._fail(f"the state for a checkpoint cannot be read: {type(error).__name__}: {error}")
        self.progress = dataclasses.replace(self.progress, num_updates=num_updates)
        self.checkpoints.start_saving(self.progress, tensors, self._seen)

    def _checkpoint_saved(self, progress: Progress) -> None:
        """Delete journal files that a durable checkpoint replaces. Called on the writing thread."""
        self.checkpoint_version = progress.policy_version
        oldest = self.checkpoints.sequences()[0]
        self._journal.prune(before_batch=oldest, before_answer=progress.num_batches - ANSWERS_KEPT)

    def _set_disk_error(self, error: OSError) -> None:
        previous = self.disk_error
        self.disk_error = f"state_dir {self.config.state_dir} cannot be written: {describe_disk_error(error)}"
        if self.disk_error != previous:
            logger.error("%s", self.disk_error)

    def _fail(self, reason: str) -> NoReturn:
        self.failure = reason
        logger.exception("the learner must restart: %s", reason)
        self._check_healthy()
        raise AssertionError("unreachable")

    def _check_healthy(self) -> None:
        if self.failure:
            remedy = "The learner restarts from its checkpoint and journal, and trains on unanswered batches."
            raise BackendDown(self.failure, remedy=remedy, retry_after_s=1.0)

    def _check_not_stopped(self) -> None:
        if self.is_stopped:
            raise TrainingStopped(
                f"the last {self.progress.num_skipped_in_a_row} updates were not finite, so training has stopped",
                remedy=f"Check the log and the batches in {self._nonfinite.folder}. Restart the learner with a lower "
                "optimizer.learning_rate or, if the batches caused it, with a higher max_nonfinite_in_a_row.",
            )

    @contextlib.contextmanager
    def _failing_with_ranks(self) -> Iterator[None]:
        try:
            yield
        except RankLost as error:
            self.failure = str(error)
            raise

    def _count_remote_failure(self, loss: RankLost) -> None:
        """Count a failure of the current batch that another rank reported while this one is stuck in a collective."""
        if loss.in_training and self._training is not None:
            self._quarantine.count_failure(*self._training, loss)

    @property
    def _export_dir(self) -> Path:
        return self.config.export_dir or self.config.state_dir / "exports"

    def _check_outputs(self) -> None:
        """Write and delete an export, a checkpoint and a journal file, to find problems before training.

        Raises:
            StateError: a folder cannot be written, or has too little space.
            BackendDown: `export_dir` cannot be written.
            Unusable: the model cannot be exported.
        """
        try:
            self.checkpoints.check_writable()
            self._journal.check_writable()
        except OSError as error:
            raise StateError(
                f"state_dir {self.config.state_dir} cannot be written: {describe_disk_error(error)}"
            ) from error
        try:
            self.check_export(_CHECK_NAME)
        except BackendDown:
            raise
        except PoiseError as error:
            raise Unusable(str(error), remedy=error.remedy) from error
        num_parameters = self.trainer.num_parameters()
        num_trained = sum(math.prod(shape) for shape in self.trainer.trained_shapes().values())
        num_trained += num_parameters if self.config.critic else 0
        needs = [
            SpaceNeed("state_dir", self.config.state_dir, num_trained * _CHECKPOINT_BYTES, "a checkpoint"),
            SpaceNeed("export_dir", self._export_dir, num_parameters * _EXPORT_BYTES, "an export"),
        ]
        for problem in missing_space(needs):
            if not self.checkpoints.sequences():
                raise StateError(problem)
            logger.error("%s", problem)  # a resumed run continues, because space may be freed before it is needed
