import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from tests.support.tiny_models import make_tiny_llama
from tests.unit.learner.batches import make_batch, make_config, rewarded

from poise.errors import BackendDown, Conflict, TrainingStopped
from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.models import policy as policy_module
from poise.learner.storage import checkpoint as checkpoint_module
from poise.learner.storage.checkpoint import CheckpointStore, StateError, StateMismatchError
from poise.learner.storage.journal import Journal
from poise.learner.training.trainer import Trainer
from poise_client import weights_digest
from poise_client.codec import dump_batch, load_batch
from poise_client.types import Batch, Rollout, VersionSpan

CRITIC = {"learning_rate": 1e-3, "warmup_updates": 0}


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture
def start(config) -> Iterator[Callable[..., LearnerCore]]:
    """Starts a learner on a state folder, as a new process would after the previous one died."""
    running: dict[Path, LearnerCore] = {}

    def start(**changes: object) -> LearnerCore:
        settings = config(**{"checkpoint_every_steps": 2} | changes)
        if settings.state_dir in running:
            running[settings.state_dir].close()
        core = running[settings.state_dir] = LearnerCore(settings)
        core.recover()
        return core

    yield start
    for core in running.values():
        core.close()


@pytest.fixture(scope="module")
def digests(model, tmp_path_factory) -> list[bytes]:
    """Digests of versions 0 to 5 without any failure."""
    core = LearnerCore(make_config(model, tmp_path_factory.mktemp("undisturbed")))
    core.recover()
    answers = [core.published.digest]
    for step in range(5):
        core.submit(make_batch(step))
        answers.append(core.published.digest)
    core.close()
    return answers


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_every_batch_makes_a_version(start):
    core = start()
    assert core.published.policy_version == 0
    for step in range(3):
        answer, duplicate = core.submit(make_batch(step))
        assert (answer.policy_version, duplicate) == (step + 1, False)
        assert answer.metrics.num_rollouts == 6
        assert answer.metrics.staleness == {0: 6}
        assert answer.digest == core.published.digest.hex() == weights_digest(core.published.weights).hex()
    assert core.progress.num_rollouts == 18
    assert core.progress.last_batch_id == "step-00000002"
    assert core.published.policy_version == 3


def test_resubmitted_batch_gets_its_stored_answer(start):
    core = start()
    answer, _ = core.submit(make_batch(0))
    core.submit(make_batch(1))
    published = core.published
    assert core.submit(make_batch(0)) == (answer, True)
    assert core.published is published
    assert core.progress.num_batches == 2
    # also after a restart, for batches before and after the checkpoint
    core.submit(make_batch(2))
    again = start()
    for step in range(3):
        assert again.submit(make_batch(step))[1]
    assert again.submit(make_batch(0)) == (answer, True)
    assert again.progress.policy_version == 3


def test_reused_batch_id_with_other_content_is_a_conflict(start):
    core = start()
    core.submit(make_batch(0))
    published, progress = core.published, core.progress
    with pytest.raises(Conflict, match="step-00000000 of run run was already trained on with other content"):
        core.submit(make_batch(0, temperature=0.5))
    assert (core.published, core.progress) == (published, progress)
    other_run = dataclasses.replace(make_batch(1), run_id="other", batch_id="step-00000000")
    assert not core.submit(other_run)[1]  # batch ids belong to their run


def with_versions(batch, *versions):
    spans = tuple(VersionSpan(i, i + 1, version) for i, version in enumerate(versions))
    return dataclasses.replace(
        batch, rollouts=tuple(dataclasses.replace(r, version_spans=spans) for r in batch.rollouts)
    )


def test_rejected_rollouts_are_named_and_the_rest_trained_on(start):
    core = start(max_staleness=1)
    for step in range(3):
        core.submit(make_batch(step))  # now at version 3
    fine, older, stale, future = (
        make_batch(step, version=version, num_prompts=1).rollouts for step, version in ((3, 3), (4, 2), (5, 1), (6, 4))
    )
    trained = make_batch(1).rollouts[:1]
    batch = dataclasses.replace(make_batch(7), rollouts=(*stale, *fine, *future, *trained, *older, *fine[:1]))
    answer, _ = core.submit(batch)
    assert answer.rejected == (
        *((r.id, "stale") for r in stale),
        *((r.id, "future_version") for r in future),
        (trained[0].id, "duplicate"),
        (fine[0].id, "duplicate"),
    )
    assert answer.metrics.num_rollouts == 4
    assert answer.metrics.staleness == {0: 2, 1: 2}
    assert answer.policy_version == 4
    assert core.progress.num_rejected == {"stale": 2, "future_version": 2, "duplicate": 2}
    alone = start(max_staleness=1, state_dir=core.config.state_dir.with_name("alone"))
    for step in range(3):
        alone.submit(make_batch(step))
    alone.submit(dataclasses.replace(make_batch(7), rollouts=(*fine, *older)))
    assert alone.published.digest == core.published.digest  # the rejected rollouts changed nothing


def test_a_rollout_is_as_old_as_its_oldest_token(start):
    core = start(max_staleness=1)
    core.submit(make_batch(0))
    core.submit(make_batch(1))
    assert core.submit(with_versions(make_batch(2), 2, 1))[0].metrics.staleness == {1: 6}
    answer, _ = core.submit(with_versions(make_batch(3), 3, 1))
    assert {reason for _, reason in answer.rejected} == {"stale"}
    answer, _ = core.submit(with_versions(make_batch(4), 3, 4))
    assert {reason for _, reason in answer.rejected} == {"future_version"}


def test_fully_rejected_batch_keeps_the_version(start):
    core = start()
    core.submit(make_batch(0))
    published = core.published
    answer, _ = core.submit(make_batch(1, version=0))
    assert answer.policy_version == 1
    assert len(answer.rejected) == 6
    assert answer.metrics.num_rollouts == answer.metrics.num_updates == 0
    assert core.published is published
    again = start()
    assert again.progress.num_batches == 2
    assert again.submit(make_batch(1, version=0)) == (answer, True)
    # Rejected rollouts were not trained on, so another batch may contain them.
    renamed = dataclasses.replace(make_batch(1, version=1), batch_id="once more")
    assert not again.submit(renamed)[0].rejected


def at_entry(target: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Dies when `name` is called."""

    def arm(patch: pytest.MonkeyPatch) -> None:
        def die(*args: object, **kwargs: object) -> None:
            raise Killed

        patch.setattr(target, name, die)

    return arm


def after(target: type, name: str, calls: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Dies when `name` has returned `calls` times."""

    def arm(patch: pytest.MonkeyPatch) -> None:
        work, left = getattr(target, name), [calls]

        def die(*args: object, **kwargs: object) -> object:
            answer = work(*args, **kwargs)
            left[0] -= 1
            if not left[0]:
                raise Killed
            return answer

        patch.setattr(target, name, die)

    return arm


KILLS = {
    "before the journal": at_entry(Journal, "write_batch"),
    "after the journal, before training": after(Journal, "write_batch"),
    "between two mini-batches": after(Trainer, "update"),
    "after training, before the answer": at_entry(Journal, "write_answer"),
    "after the answer, before the checkpoint": after(Journal, "write_answer"),
    "at the checkpoint's beginning": at_entry(CheckpointStore, "save"),
    "when the checkpoint is not yet in place": at_entry(Path, "rename"),
    "after the checkpoint, before pruning": after(CheckpointStore, "save"),
    "after pruning": after(Journal, "prune"),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_at_any_point_ends_in_the_same_weights(start, digests, monkeypatch, point):
    core = start(keep_checkpoints=1)
    lineage = core.published.lineage_id
    for step in range(3):
        core.submit(make_batch(step))
    with monkeypatch.context() as patch:
        KILLS[point](patch)
        with pytest.raises(Killed):
            core.submit(make_batch(3))
            core.checkpoints.finish_saving()  # the writing thread has died too
    again = start(keep_checkpoints=1)
    version = again.published.policy_version
    assert version in ({3} if point == "before the journal" else {4})
    assert again.published.digest == digests[version]
    answer, duplicate = again.submit(make_batch(3))  # the caller retries
    assert duplicate == (version == 4)
    assert answer.policy_version == 4
    assert answer.metrics.num_updates == 2
    assert answer.digest == digests[4].hex()
    again.submit(make_batch(4))
    assert again.published.digest == digests[5]
    assert again.published.lineage_id == lineage
    assert again.progress.num_rollouts == 30
    for step in range(5):
        assert not again.submit(make_batch(step))[0].rejected


LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"lora": LORA}, {}, r"made with lora \{'rank': 4.*, but lora is None now"),
        ({}, {"lora": LORA}, r"made with lora None, but lora is \{'rank': 4"),
        ({"lora": LORA}, {"lora": {"rank": 8, "alpha": 8}}, "lora is .'rank': 8"),
        ({"lora": LORA}, {"lora": {"rank": 4, "alpha": 16}}, "lora is .*'alpha': 16"),
    ],
)
def test_state_with_other_adapters_is_rejected_unchanged(start, before, after, why):
    core = start(**before)
    for step in range(2):
        core.submit(make_batch(step))
    core.close()
    with pytest.raises(StateMismatchError, match=rf"cannot resume from .* state_dir .*{why}.*a fresh state_dir"):
        start(**after)
    assert start(**before).published.digest == core.published.digest


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}])
def test_state_of_another_model_is_rejected_but_a_moved_one_not(start, model, tmp_path, changes):
    core = start(**changes)
    for step in range(2):
        core.submit(make_batch(step))
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(StateError, match=rf"made from model {model}, but model {other} has other weights"):
        start(model=str(other), **changes)
    moved = shutil.copytree(model, tmp_path / "moved")
    again = start(model=str(moved), **changes)
    assert again.published.digest == core.published.digest
    again.submit(make_batch(2))
    start(model=str(moved), dtype="bfloat16", **changes)  # the same weights, rounded


def test_checkpoint_without_origin_is_checked_by_its_shapes(start, config, monkeypatch):
    monkeypatch.setattr("poise.learner.core.origin_of", lambda *args: {})
    core = start(lora=LORA)
    for step in range(2):
        core.submit(make_batch(step))
    core.close()
    for other, why in (
        (
            {"lora": {"rank": 8, "alpha": 8}},
            r"lora_A\.default\.weight is \[4, \d+\] in it but \[8, \d+\] now, so model or lora",
        ),
        ({}, r"(missing|\]) in it but (missing|\[.*\]) now, so model or lora"),
    ):
        with pytest.raises(StateError, match=why):
            start(**other)
    assert start(lora=LORA).published.digest == core.published.digest


def with_dropout(patch: pytest.MonkeyPatch) -> None:
    """Load models with dropout after the embedding."""
    load = policy_module.load_model

    def load_with_dropout(config: LearnerConfig) -> transformers.PreTrainedModel:
        model = load(config)
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, states: torch.nn.functional.dropout(states, 0.3, module.training)
        )
        torch.rand(7)  # as initializing missing weights may do
        return model

    patch.setattr(policy_module, "load_model", load_with_dropout)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_is_the_same_after_a_kill(start, config, monkeypatch, checkpointed):
    """One learner at a time, because random numbers belong to the process."""
    with_dropout(monkeypatch)
    settings = {"lora": {"rank": 2}, "gradient_checkpointing": checkpointed, "dropout": True}
    alive = start(state_dir=config().state_dir.with_name("alive"), **settings)
    expected = [alive.submit(make_batch(step))[0].digest for step in range(5)]
    killed = start(**settings)
    for step in range(5):
        assert killed.submit(make_batch(step))[0].digest == expected[step]
        killed.export("mine")
        if step in (1, 2, 4):  # right after a checkpoint, and a batch later
            killed = start(**settings)
            assert killed.published.digest.hex() == expected[step]
    again = [killed.trainer.train(make_batch(5).rollouts, 1.0).loss for _ in range(2)]
    assert again[0] != again[1]  # dropout is active


@pytest.mark.parametrize(
    "point", ["between two mini-batches", "after the answer, before the checkpoint", "after pruning"]
)
def test_a_kill_ends_in_the_same_critic(start, tmp_path, monkeypatch, point):
    undisturbed = start(critic=CRITIC, state_dir=tmp_path / "undisturbed")
    for step in range(5):
        undisturbed.submit(rewarded(make_batch(step)))
    core = start(critic=CRITIC)
    for step in range(3):
        core.submit(rewarded(make_batch(step)))
    with monkeypatch.context() as patch:
        KILLS[point](patch)
        with pytest.raises(Killed):
            core.submit(rewarded(make_batch(3)))
            core.checkpoints.finish_saving()
    again = start(critic=CRITIC)
    for step in range(3, 5):
        again.submit(rewarded(make_batch(step)))
    assert again.published.digest == undisturbed.published.digest
    assert again.published.lineage_id == core.published.lineage_id
    (mine, num_updates), (theirs, num_updates_of_theirs) = (one.trainer.state() for one in (again, undisturbed))
    assert num_updates == num_updates_of_theirs == 10
    assert mine.keys() == theirs.keys()
    assert "critic.exp_avg_sq.head.weight" in mine
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


@pytest.mark.parametrize("num_batches", [1, 2])  # before the first checkpoint, and after it
@pytest.mark.parametrize("had_critic", [True, False])
def test_adding_or_removing_the_critic_is_rejected(start, had_critic, num_batches):
    before, after = ({"critic": CRITIC}, {}) if had_critic else ({}, {"critic": CRITIC})
    core = start(**before)
    for step in range(num_batches):
        core.submit(rewarded(make_batch(step)) if had_critic else make_batch(step))
    what = "checkpoint" if num_batches == 2 else "journalled batch step-00000000"
    now, was, remedy = ("without", "with", "Set") if had_critic else ("with", "without", "Remove")
    message = f"{now} a critic: its {what} was written {was} one. {remedy} `critic` in the learner's settings"
    with pytest.raises(StateError, match=message):
        start(**after)
    assert start(**before).published.digest == core.published.digest  # nothing is lost


def test_damaged_checkpoint_replays_from_the_previous_one(start, digests):
    core = start()
    for step in range(5):
        core.submit(make_batch(step))
    folder = core.config.state_dir
    assert files(folder, "checkpoint-*") == ["checkpoint-00000002", "checkpoint-00000004"]
    (folder / "checkpoint-00000004" / "tensors.safetensors").write_bytes(b"")
    again = start()
    assert again.published.digest == digests[5]
    assert again.published.lineage_id == core.published.lineage_id
    assert again.checkpoint_version == 2
    assert again.submit(make_batch(4))[1]


def test_without_a_checkpoint_everything_is_replayed(start, digests):
    core = start(checkpoint_every_steps=100)
    for step in range(3):
        core.submit(make_batch(step))
    assert start(checkpoint_every_steps=100).published.digest == digests[3]


def test_only_unneeded_files_are_deleted(start):
    core = start(keep_checkpoints=2)
    folder = core.config.state_dir
    for step in range(7):
        core.submit(make_batch(step))
    core.checkpoints.finish_saving()  # it is written on a thread
    assert files(folder, "checkpoint-*") == ["checkpoint-00000004", "checkpoint-00000006"]
    assert files(folder / "journal", "batch-*") == [f"batch-{i:08d}.pb" for i in (4, 5, 6)]
    assert files(folder / "journal", "answer-*") == [f"answer-{i:08d}.json" for i in range(7)]


def test_resubmission_after_its_answer_expired_has_duplicates(start, monkeypatch):
    monkeypatch.setattr("poise.learner.core.ANSWERS_KEPT", 2)
    core = start()
    for step in range(4):
        core.submit(make_batch(step))
    core.checkpoints.finish_saving()
    assert files(core.config.state_dir / "journal", "answer-*") == ["answer-00000002.json", "answer-00000003.json"]
    for learner in (core, start()):
        assert learner.submit(make_batch(3))[1]
        answer, duplicate = learner.submit(make_batch(0))
        assert not duplicate
        assert {reason for _, reason in answer.rejected} == {"duplicate"}
        assert answer.policy_version == 4


def test_other_weights_after_a_replay_get_a_new_lineage(start, caplog):
    core = start()
    for step in range(3):
        core.submit(make_batch(step))
    lineage, digest = core.published.lineage_id, core.published.digest
    again = start(optimizer={"learning_rate": 2e-3})
    assert again.published.policy_version == 3
    assert again.published.digest != digest
    assert again.published.lineage_id != lineage
    assert "replaying gave other weights for version 3" in caplog.text
    # The new lineage is stable.
    settled = start(optimizer={"learning_rate": 2e-3})
    assert settled.published.lineage_id == again.published.lineage_id
    assert settled.published.digest == again.published.digest


@pytest.mark.parametrize("point", [at_entry(Journal, "write_answer"), at_entry(CheckpointStore, "new_lineage")])
def test_a_kill_during_a_diverging_replay_keeps_the_new_lineage(start, monkeypatch, point):
    core = start()
    core.submit(make_batch(0))
    with monkeypatch.context() as patch:
        point(patch)
        with pytest.raises(Killed):
            start(optimizer={"learning_rate": 2e-3})
    again = start(optimizer={"learning_rate": 2e-3})
    assert again.published.lineage_id != core.published.lineage_id


def test_damaged_answer_after_the_checkpoint_means_new_lineage(start):
    """Nobody knows which weights were served under the version."""
    core = start()
    for step in range(3):
        core.submit(make_batch(step))
    journal = core.config.state_dir / "journal"
    (journal / "answer-00000002.json").write_text("")
    (journal / "answer-00000000.json").write_text("")
    again = start()
    assert again.published.digest == core.published.digest
    assert again.published.lineage_id != core.published.lineage_id
    assert again.submit(make_batch(2))[1]
    assert {reason for _, reason in again.submit(make_batch(0))[0].rejected} == {"duplicate"}


def test_damaged_batch_is_named_with_a_remedy(start, digests):
    core = start()
    for step in range(3):
        core.submit(make_batch(step))
    folder = core.config.state_dir
    path = folder / "journal" / "batch-00000002.pb"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        StateError, match=r"batch-00000002\.pb is damaged.*delete it, all later batches, and the file lineage"
    ):
        start()
    path.unlink()
    (folder / "lineage").unlink()
    again = start()
    assert (again.published.policy_version, again.published.digest) == (2, digests[2])
    assert again.published.lineage_id != core.published.lineage_id
    assert not again.submit(make_batch(2))[1]
    assert again.published.digest == digests[3]


def test_unwritable_journal_changes_nothing_and_can_be_retried(start, digests, monkeypatch):
    core = start()
    core.submit(make_batch(0))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_batch", full)
        with pytest.raises(BackendDown, match=r"nothing was trained on.*No space left"):
            core.submit(make_batch(1))
    assert not core.failure
    assert not core.submit(make_batch(1))[1]
    assert core.published.digest == digests[2]


def test_failed_checkpoint_loses_no_answer(start, digests, monkeypatch, caplog):
    core = start()
    core.submit(make_batch(0))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", full)
        assert core.submit(make_batch(1))[0].policy_version == 2
        core.checkpoints.close()
    assert "the last checkpoint could not be written" in caplog.text
    assert core.checkpoint_version == 0
    assert start().published.digest == digests[2]


def test_full_disk_loses_no_answer_and_unlocks_the_folder(start, config, digests, monkeypatch, caplog):
    core = start()
    core.submit(make_batch(0))

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.safetensors.torch, "save_file", full)
        for step in (1, 2, 3):
            assert core.submit(make_batch(step))[0].policy_version == step + 1
        core.close()
    assert caplog.text.count("the last checkpoint could not be written") == 2
    assert start().published.digest == digests[4]  # the folder was unlocked


def test_folder_is_unlocked_even_if_closing_fails(start, config, monkeypatch):
    core = start()
    for owner, name in ((CheckpointStore, "finish_saving"), (Trainer, "close")):
        with monkeypatch.context() as patch:

            def broken(*args: object) -> None:
                raise RuntimeError("the others are gone")

            patch.setattr(owner, name, broken)
            with pytest.raises(RuntimeError, match="the others are gone"):
                core.close()
        other = CheckpointStore(config().state_dir, keep=1)
        other.open()
        other.close()


@pytest.mark.parametrize("point", [(Trainer, "update"), (Journal, "write_answer")])
def test_failure_during_training_needs_a_restart(start, digests, monkeypatch, point):
    """After a failure in the second mini-batch, the policy in memory matches no version."""
    core = start()
    core.submit(make_batch(0))
    work, calls = getattr(*point), []

    def fail(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 2 or point[0] is Journal:
            raise RuntimeError("out of memory")
        return work(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*point, fail)
        what = "cannot be written: out of memory" if point[0] is Journal else "failed: out of memory .failure 1 of 2"
        with pytest.raises(BackendDown, match=f"step-00000001 {what}"):
            core.submit(make_batch(1))
    assert "out of memory" in core.failure
    assert core.published.digest == digests[1]
    for refused in (lambda: core.submit(make_batch(2)), core.checkpoint, lambda: core.export("x")):
        with pytest.raises(BackendDown, match="out of memory"):
            refused()
    again = start()
    assert again.published.digest == digests[2]
    assert again.submit(make_batch(1))[1]


def out_of_memory_at(step: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let training on a step's batch fail in its second mini-batch; return a list that counts the failures."""
    train, attempts, marked = Trainer.train, [], make_batch(step).rollouts[-1].id

    def fail(self: Trainer, rollouts: Sequence[Rollout], temperature: float) -> object:
        if rollouts[-1].id == marked:
            attempts.append(len(attempts))
            train(self, rollouts[:4], temperature)
            raise RuntimeError("out of memory")
        return train(self, rollouts, temperature)

    patch.setattr(Trainer, "train", fail)
    return attempts


def test_batch_that_always_fails_is_quarantined(start, monkeypatch, caplog):
    core = start(keep_checkpoints=1)
    core.submit(make_batch(0))
    attempts = out_of_memory_at(1, monkeypatch)
    with pytest.raises(BackendDown, match="failure 1 of 2") as refused:
        core.submit(make_batch(1))
    with pytest.raises(BackendDown, match="failure 2 of 2") as refused_again:
        start(keep_checkpoints=1)
    for error in (refused, refused_again):
        assert "lower micro_batch_tokens or set gradient_checkpointing" in str(error.value)

    again = start(keep_checkpoints=1)
    assert len(attempts) == 2
    assert again.published.digest == core.published.digest
    assert (again.progress.policy_version, again.progress.num_batches, again.progress.num_rollouts) == (1, 2, 6)
    answer, duplicate = again.submit(make_batch(1))
    assert duplicate
    assert answer.rejected == tuple((rollout.id, "failed") for rollout in make_batch(1).rollouts)
    assert (answer.policy_version, answer.metrics.num_updates) == (1, 0)
    assert again.progress.num_rejected == {"failed": 6}
    kept = again.config.state_dir / "failed" / "batch-00000001.pb"
    assert dump_batch(load_batch(kept.read_bytes())) == dump_batch(make_batch(1))
    assert "step-00000001 failed 2 times: all its rollouts are rejected; the batch is kept in" in caplog.text
    assert "lower micro_batch_tokens" in caplog.text

    # Training continues as without the batch, over restarts before and after a checkpoint.
    without = start(state_dir=core.config.state_dir.with_name("without"))
    for step in (0, 2, 3, 4):
        without.submit(make_batch(step, version=0 if step == 0 else step - 1))
    for step in (2, 3, 4):
        again.submit(make_batch(step, version=step - 1))
        again = start(keep_checkpoints=1)
        assert again.submit(make_batch(1)) == (answer, True)
    assert again.published.digest == without.published.digest
    assert len(attempts) == 2


def test_batch_that_failed_once_is_trained_on(start, digests, monkeypatch):
    core = start()
    core.submit(make_batch(0))
    with monkeypatch.context() as patch:
        out_of_memory_at(1, patch)
        with pytest.raises(BackendDown):
            core.submit(make_batch(1))
    again = start()
    assert again.published.digest == digests[2]
    assert not again.submit(make_batch(1))[0].rejected


def test_answered_batch_is_never_quarantined(start, digests, monkeypatch):
    """Replicas served its effect. If it fails in a replay, the settings are the cause."""
    core = start(checkpoint_every_steps=100)
    for step in range(2):
        core.submit(make_batch(step))
    with monkeypatch.context() as patch:
        out_of_memory_at(1, patch)
        for _ in range(4):
            with pytest.raises(BackendDown, match="step-00000001 failed"):
                start(checkpoint_every_steps=100)
    assert start(checkpoint_every_steps=100).published.digest == digests[2]


def test_unrecorded_failures_quarantine_nothing(start, digests, monkeypatch):
    core = start()
    core.submit(make_batch(0))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        out_of_memory_at(1, patch)
        patch.setattr(Journal, "add_failure", full)
        with pytest.raises(BackendDown, match=r"out of memory; the failure could not be recorded: .*No space left"):
            core.submit(make_batch(1))
        for _ in range(3):
            with pytest.raises(BackendDown, match="could not be recorded"):
                start()
    assert start().published.digest == digests[2]


def poisoned(step: int) -> Batch:
    """A batch whose mini-batches all overflow."""
    batch = make_batch(step)
    return dataclasses.replace(batch, rollouts=tuple(dataclasses.replace(r, advantage=3e38) for r in batch.rollouts))


def test_nonfinite_batches_are_kept_and_stop_training(start, caplog):
    core = start(max_nonfinite_in_a_row=4, keep_nonfinite=1)
    before = core.published.digest
    for step in range(2):  # two mini-batches each
        answer, _ = core.submit(poisoned(step))
        assert (answer.metrics.num_updates, answer.metrics.num_skipped_updates) == (0, 2)
        assert answer.policy_version == step + 1
    assert core.published.digest == before
    folder = core.config.state_dir / "nonfinite"
    assert files(folder, "*") == ["batch-00000001.pb"]
    kept = load_batch((folder / "batch-00000001.pb").read_bytes())
    assert dump_batch(kept) == dump_batch(poisoned(1))
    assert "batch step-00000001: skipped 2 mini-batches" in caplog.text

    for restarted in (core, start(max_nonfinite_in_a_row=4, checkpoint_every_steps=1)):
        with pytest.raises(TrainingStopped, match="last 4 updates were not finite") as stopped:
            restarted.submit(make_batch(2))
        assert str(folder) in stopped.value.remedy
        assert restarted.submit(poisoned(1))[1]  # answered batches keep their answers
    assert start(max_nonfinite_in_a_row=5).submit(make_batch(2))[0].metrics.num_skipped_updates == 0


def test_nothing_is_published_before_recovery_ends(start, monkeypatch):
    core = start()
    core.submit(make_batch(0))
    seen = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda *args: (seen.append(again.published), train(*args))[1])
    core.close()
    again = LearnerCore(core.config)
    again.recover()
    again.close()
    assert seen == [None]
    assert again.published.policy_version == 1


def test_published_versions_never_change(start):
    core = start()
    versions = [core.published]
    for step in range(3):
        core.submit(make_batch(step))
        versions.append(core.published)
    assert [version.policy_version for version in versions] == [0, 1, 2, 3]
    assert len({version.digest for version in versions}) == 4
    for version in versions:
        assert weights_digest(version.weights) == version.digest


def test_checkpoint_before_the_first_batch_can_be_restored(start):
    core = start()
    assert core.checkpoint().is_dir()
    again = start()
    assert again.published.digest == core.published.digest
    assert again.progress.num_batches == 0


def logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a model", return_tensors="pt").input_ids
    return model(ids).logits.detach().numpy()


def test_transformers_loads_an_export(start, model):
    core = start()
    core.submit(make_batch(0))
    export = core.export("mine")
    assert export.policy_version == 1
    folder = Path(export.path)
    assert folder == core.config.state_dir.resolve() / "exports" / "mine"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), core.published.weights[name].array)
    assert (logits(folder) != logits(model)).any()


def test_export_replaces_an_earlier_one_atomically(start, monkeypatch, tmp_path):
    core = start(export_dir=tmp_path / "exports")
    core.export("mine")
    before = logits(tmp_path / "exports" / "mine")
    core.submit(make_batch(0))
    with monkeypatch.context() as patch:
        after(Trainer, "save_model")(patch)
        with pytest.raises(Killed):
            core.export("mine")
    np.testing.assert_array_equal(logits(tmp_path / "exports" / "mine"), before)
    core.export("mine")
    assert (logits(tmp_path / "exports" / "mine") != before).any()
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["mine"]


def test_bfloat16_state_recovers_bit_for_bit(start):
    core = start(dtype="bfloat16")
    for step in range(3):
        core.submit(make_batch(step))
    again = start(dtype="bfloat16")
    assert again.published.digest == core.published.digest
    assert {weight.dtype for weight in again.published.weights.values()} == {"bfloat16"}
