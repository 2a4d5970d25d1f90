"""The learner without its wire: batches in order, each once, over any crash.

A batch is journalled, then trained on, then answered; a checkpoint follows every few. A restart loads the last
checkpoint and trains again on the batches journalled since: the same versions, the same weights. What fails between
journal and answer leaves the memory in doubt, not the disk: the core refuses all from then on, for a restart to mend.
A batch on which training fails again and again is set aside, and changes nothing.

Owns versions, what was trained on, and what was answered. Knows neither gRPC nor replicas. All its methods block and
must be called from one thread at a time, but for the read-only properties.
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

from poise.errors import BackendDown, Conflict, PoiseError, TrainingStopped, Unusable
from poise.learner.admission import admit
from poise.learner.config import LearnerConfig
from poise.learner.continuity import check_checkpoint, check_journalled
from poise.learner.distributed.coordinator import make_trainer
from poise.learner.distributed.rank_health import RankEvents, RankLost
from poise.learner.kept_batches import KeptBatches
from poise.learner.models import lora as adapters
from poise.learner.publishing.published import HashedWeights, Published
from poise.learner.quarantine import Attempts
from poise.learner.resume_checks import misfit, origin_of
from poise.learner.storage.capacity import Room, lacking_room
from poise.learner.storage.checkpoint import Checkpoint, CheckpointStore, Progress, StateError, StateMismatchError
from poise.learner.storage.checkpoint_writer import ANSWERS_KEPT, Checkpointer
from poise.learner.storage.export_folder import try_export, write_export
from poise.learner.storage.journal import FAILED, Answer, Journal
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.startup import Startup
from poise_client.codec import dump_batch
from poise_client.types import Adapter, Batch, ModelExport, RolloutId, StepMetrics

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Between two attempts to write what must be durable."""
_CHECK_NAME = "poise-check"
_CHECKPOINT_BYTES, _EXPORT_BYTES = 12, 4
"""Of a parameter: its value and two moments; its value. All float32."""


class LearnerCore:
    """The learner's state, in memory and on disk."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._trainer = make_trainer(config)
        self._store = CheckpointStore(config.state_dir, config.keep_checkpoints)
        self._journal = Journal(config.state_dir / "journal")
        self._checkpoints = Checkpointer(self._store, self._journal)
        self._nonfinite = KeptBatches(config.state_dir / "nonfinite", config.keep_nonfinite)
        self._attempts = Attempts(self._journal, KeptBatches(config.state_dir / "failed", config.keep_nonfinite))
        self._answers: dict[tuple[str, str], Answer] = {}
        self._seen: set[bytes] = set()
        self._weights = HashedWeights({}, {}, b"")
        self._adapter: Adapter | None = None
        """What is published, where that is adapters alone."""
        self.startup = Startup("recovering")
        """What `recover` does."""
        self.progress = Progress()
        self.published: Published | None = None
        """The current version; None until recovered."""
        self._in_hand: tuple[int, Batch, bytes] | None = None
        """The batch that is being trained on."""
        self.failure = ""
        """Why the state in memory is not to be trusted any more; empty while it is."""
        self.problem = ""
        """Why `state_dir` cannot be written; empty while it can."""
        self._leaving = threading.Event()

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is trained on any more, for the last updates in a row were not finite."""
        return self.progress.num_skipped_in_a_row >= self._config.max_nonfinite_in_a_row

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

    @property
    def has_other_processes(self) -> bool:
        """Whether other processes train with this one."""
        return self._trainer.is_one_of_several

    def listen(self, lost: Callable[[str], object], leaving: Callable[[str], object]) -> None:
        """Call `lost` once another process is lost, `leaving` once one was asked to end; both from another thread."""
        self._trainer.listen(RankEvents(lambda loss: lost(str(loss)), leaving, self._count_failure))

    def touch(self) -> None:
        """Show the other processes that this one's event loop runs; from any thread."""
        self._trainer.touch()

    def ping(self) -> None:
        """Check that the other processes, where there are any, still take commands.

        Raises:
            RankLost: one does not; see `failure`.
        """
        with self._failing_with_ranks():
            self._trainer.ping()

    def recover(self) -> None:
        """Take the state folder and bring the policy to where it was.

        Raises:
            StateError: the folder is in use, damaged beyond its spares, or of another model, other adapters, or a
                training with a critic where there is none now, or the other way round.
            BackendDown: the model cannot be loaded or exported, or training again failed.
        """
        self._store.open()
        self._journal.open()
        self.startup.begin("loading weights")
        self._trainer.load()
        self.startup.begin("trying an export and a checkpoint")
        self._try_outputs()
        self.startup.begin("copying and hashing weights")
        if self._config.lora is not None and self._config.push.transport == "lora":
            self._adapter = adapters.describe(self._config.lora, self._config.model)
        lineage_id = self._store.lineage()
        self._take_weights()
        self.progress = Progress(origin=origin_of(self._config, self._weights))
        self.startup.begin("reading the last checkpoint")
        if (checkpoint := self._store.load()) is not None:
            self._go_on_from(checkpoint)
        answered = dict(self._journal.answers())
        first = self.progress.num_batches
        for sequence, answer in answered.items():
            if sequence < first and answer is not None:
                self._answers[answer.run_id, answer.batch_id] = answer
        while (batch := self._journalled(self.progress.num_batches)) is not None:
            sequence = self.progress.num_batches
            check_journalled(batch, self._config)
            logger.info("training again on batch %s (%d after the checkpoint)", batch.batch_id, sequence - first + 1)
            self.startup.begin(f"training again on batch {sequence - first + 1} after the checkpoint")
            before = answered.get(sequence)
            again = self._try(batch, dump_batch(batch), before)
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

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        check_checkpoint(checkpoint.tensors, self._config)
        then, origin = checkpoint.progress, self.progress.origin
        shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items() if name.startswith("model.")}
        if why := misfit(then.origin, origin, shapes, self._trainer.trained_shapes()):
            raise StateMismatchError(
                f"the checkpoint in state_dir {self._config.state_dir} cannot be gone on from: {why}; set it back, or "
                "use a fresh state_dir to start from the model"
            )
        self._trainer.restore(checkpoint.tensors, then.num_updates)
        self._trainer.num_skipped_in_a_row = then.num_skipped_in_a_row
        self.progress, self._seen = dataclasses.replace(then, origin=origin), checkpoint.seen
        self._checkpoints.version = then.policy_version
        self._take_weights()

    def close(self) -> None:
        """Let go of the state folder, after the checkpoint that is being written."""
        with contextlib.ExitStack() as last:  # each, whatever becomes of the one before
            last.callback(self._store.close)
            last.callback(self._trainer.close)
            self._checkpoints.close()

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
            self._note_refusal(error)
            raise BackendDown(
                f"nothing was trained on: {self.problem}",
                remedy="The batch is taken as soon as it can be written.",
                retry_after_s=1.0,
            ) from error
        self.problem = ""
        try:
            answer = self._try(batch, content)
            self._keep(sequence, answer)
        except Exception as error:
            trained = not isinstance(error, BackendDown)
            self.failure = f"the answer to batch {batch.batch_id} cannot be kept: {error}" if trained else str(error)
            logger.exception("batch %s came to no answer", batch.batch_id)
            self._refuse_if_failed()
        if answer.policy_version != self.published.policy_version:
            self._publish(self.published.lineage_id)
        if self.progress.num_batches % self._config.checkpoint_every_steps == 0:
            with self._failing_with_ranks():
                self._begin_checkpoint()
        return answer, False

    def try_writing(self) -> None:
        """Look whether `state_dir` can be written again, if it could not."""
        if not self.problem:
            return
        try:
            self._journal.try_writing()
        except OSError as error:
            self._note_refusal(error)
        else:
            self.problem = ""
            logger.info("state_dir %s can be written again", self._config.state_dir)

    def leave(self) -> None:
        """Wait for no disk any more. May be called from any thread."""
        self._leaving.set()

    def _note_refusal(self, error: OSError) -> None:
        before = self.problem
        self.problem = f"state_dir {self._config.state_dir} cannot be written: {describe_disk_error(error)}"
        if self.problem != before:
            logger.error("%s", self.problem)

    def checkpoint(self) -> Path:
        """Make the state of now durable by itself; return its folder.

        Raises:
            BackendDown: see `failure`.
            OSError: it cannot be written; nothing is lost.
        """
        self._refuse_if_failed()
        with self._failing_with_ranks():
            self._begin_checkpoint()
        path = self._checkpoints.finish()
        assert path is not None  # noqa: S101 (begun)
        return path

    def _begin_checkpoint(self) -> None:
        try:
            tensors, num_updates = self._trainer.state()
        except Exception as error:
            # What was trained on is journalled and answered; but a process of the group is lost, or its memory.
            self.failure = f"the state to checkpoint cannot be read: {type(error).__name__}: {error}"
            logger.exception("no checkpoint was taken")
            self._refuse_if_failed()
        self.progress = dataclasses.replace(self.progress, num_updates=num_updates)
        self._checkpoints.begin(self.progress, tensors, self._seen)

    def export(self, name: str) -> ModelExport:
        """Write the policy as a Hugging Face folder; an earlier export of the same name is replaced.

        Raises:
            InvalidRequest: something else has that name.
            BackendDown: see `failure`.
            OSError: it cannot be written; nothing is lost.
        """
        self._refuse_if_failed()
        version = self.progress.policy_version
        with (
            self._failing_with_ranks(),
            self._exporting(f"version {version}", together=self.has_other_processes),
        ):
            return ModelExport(str(write_export(self._export_dir, name, version, self._trainer.save_model)), version)

    def check_export(self, name: str) -> ModelExport:
        """Return what `export` would, and raise what it would, leaving nothing: all but the parameters is written."""
        self._refuse_if_failed()
        with self._exporting(f"model {self._config.model}", together=False):
            path = try_export(self._export_dir, name, self._trainer.save_without_parameters)
        return ModelExport(str(path), self.progress.policy_version)

    @property
    def _export_dir(self) -> Path:
        return self._config.export_dir or self._config.state_dir / "exports"

    @contextlib.contextmanager
    def _exporting(self, what: str, *, together: bool) -> Iterator[None]:
        """Turn what an export may raise into errors that say what happened and what to do.

        `together` says that other processes take part: what torch.distributed raises then is a `RuntimeError`.
        """
        try:
            yield
        except PoiseError:
            raise
        except OSError as error:
            raise BackendDown(
                f"{what} cannot be exported to export_dir {self._export_dir}: {describe_disk_error(error)}",
                remedy="Then ask for the export again; training is not affected.",
                retry_after_s=1.0,
            ) from error
        except Exception as error:
            if together and isinstance(error, RuntimeError):
                # The others may be gone, or wait for what this process no longer does.
                self.failure = f"{what} was not exported, for a process of the learner's group was lost: {error}"
                logger.exception("the export broke off")
                raise BackendDown(
                    self.failure,
                    remedy="The learner restarts from its checkpoint and journal; ask for the export again then.",
                    retry_after_s=1.0,
                ) from error
            logger.exception("the export failed")
            raise PoiseError(
                f"{what} cannot be exported: {type(error).__name__}: {error}",
                remedy="Correct what it names in the model's folder. The policy is in the learner's checkpoints, and "
                "the learner's log has the traceback.",
            ) from error

    def _try_outputs(self) -> None:
        """Write what is otherwise first written after training: an export, a checkpoint, the journal; then remove it.

        Raises:
            StateError: a folder cannot be written, or has no room.
            BackendDown: `export_dir` cannot be written.
            Unusable: the model cannot be exported.
        """
        try:
            self._store.try_writing()
            self._journal.try_writing()
        except OSError as error:
            raise StateError(
                f"state_dir {self._config.state_dir} cannot be written: {describe_disk_error(error)}"
            ) from error
        try:
            self.check_export(_CHECK_NAME)
        except BackendDown:
            raise
        except PoiseError as error:
            raise Unusable(str(error), remedy=error.remedy) from error
        num_parameters = self._trainer.num_parameters()
        num_trained = sum(math.prod(shape) for shape in self._trainer.trained_shapes().values())
        num_trained += num_parameters if self._config.critic else 0
        rooms = [
            Room("state_dir", self._config.state_dir, num_trained * _CHECKPOINT_BYTES, "a checkpoint"),
            Room("export_dir", self._export_dir, num_parameters * _EXPORT_BYTES, "an export"),
        ]
        for problem in lacking_room(rooms):
            if not self._store.sequences():
                raise StateError(problem)
            logger.error("%s", problem)  # there may be room again before it is needed; the run goes on until then

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

    @contextlib.contextmanager
    def _failing_with_ranks(self) -> Iterator[None]:
        try:
            yield
        except RankLost as error:
            self.failure = str(error)
            raise

    def _count_failure(self, loss: RankLost) -> None:
        """Count a failure of the batch in hand that another process reported, where this one cannot return from it."""
        if loss.in_training and self._in_hand is not None:
            self._attempts.failed(*self._in_hand, loss)

    def _refuse_if_failed(self) -> None:
        if self.failure:
            remedy = "The learner restarts from its checkpoint and journal, and trains on what is not answered."
            raise BackendDown(self.failure, remedy=remedy, retry_after_s=1.0)

    def _refuse_if_stopped(self) -> None:
        if self.is_stopped:
            in_a_row = self.progress.num_skipped_in_a_row
            raise TrainingStopped(
                f"the last {in_a_row} updates were not finite, and nothing is trained on any more",
                remedy=f"Look at the log, and at the batches in {self._nonfinite.folder}. Start the learner with a "
                "lower optimizer.learning_rate, or, where batches are to blame, with a higher max_nonfinite_in_a_row.",
            )

    def _try(self, batch: Batch, content: bytes, answered: Answer | None = None) -> Answer:
        """Train on a journalled batch, or set it aside. Raises `BackendDown`, counted, where training fails."""
        sequence = self.progress.num_batches
        if self._attempts.are_over(sequence, content, answered):
            self._attempts.set_aside(sequence, batch, content)
            return self._count(batch, content, StepMetrics(), [(rollout.id, FAILED) for rollout in batch.rollouts])
        self._in_hand = sequence, batch, content
        try:
            return self._train(batch, content)
        except Exception as error:
            if isinstance(error, RankLost) and not error.in_training:
                raise  # the batch is not to blame
            raise self._attempts.failed(sequence, batch, content, error) from error
        finally:
            self._in_hand = None

    def _train(self, batch: Batch, content: bytes) -> Answer:
        """Train on what of a journalled batch may be trained on."""
        progress = self.progress
        split = admit(batch, self._seen, progress.policy_version, self._config.max_staleness)
        metrics = StepMetrics()
        if split.accepted:
            metrics = self._trainer.train(split.accepted, batch.temperature)
            metrics = dataclasses.replace(metrics, staleness=dict(split.ages))
        if metrics.num_skipped_updates:
            logger.error(
                "batch %s: %d of its mini-batches changed nothing, for their loss or gradient was not finite; it is "
                "kept as %s",
                batch.batch_id,
                metrics.num_skipped_updates,
                self._nonfinite.save(progress.num_batches, content) or "nothing",
            )
        self._seen |= split.names
        if split.accepted:
            self._take_weights()
        return self._count(batch, content, metrics, split.rejected)

    def _count(
        self, batch: Batch, content: bytes, metrics: StepMetrics, rejected: Sequence[tuple[RolloutId, str]]
    ) -> Answer:
        """Go on past a batch, to the next version where any of it was trained on; return what came of it."""
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
            num_skipped_in_a_row=self._trainer.num_skipped_in_a_row,
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

    def _keep(self, sequence: int, answer: Answer) -> None:
        """Make an answer durable. Waits for a disk that refuses: the policy in memory is right meanwhile."""
        while True:
            try:
                self._journal.write_answer(sequence, answer)
                break
            except OSError as error:
                self._note_refusal(error)
                if self._leaving.wait(_RETRY_S):
                    raise
        self.problem = ""
        self._answers[answer.run_id, answer.batch_id] = answer
        if len(self._answers) > ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]

    def _take_weights(self) -> None:
        self._weights = HashedWeights({}, {}, b"")  # let go of the last ones first: these are as large as the model
        self._weights = HashedWeights.of(self._trainer.weights(), self._adapter)

    def _publish(self, lineage_id: str) -> None:
        self.published = self._weights.as_version(lineage_id, self.progress.policy_version)
