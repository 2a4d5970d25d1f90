"""A learner with a full or broken disk reports it, waits and resumes: nothing is lost or trained on twice."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.learner.batches import make_batch

from poise.errors import BackendDown
from poise.learner import core as module
from poise.learner.config import LearnerConfig
from poise.learner.core import LearnerCore
from poise.learner.storage.journal import Journal
from poise.learner.training.trainer import Trainer

REFUSALS = [
    (errno.ENOSPC, "No space left on device. Free some space"),
    (errno.EDQUOT, "Disk quota exceeded. Free some space"),
    (errno.EACCES, "Permission denied. Restore the permission"),
    (errno.EROFS, "Read-only file system. Mount it writable"),
    (errno.EIO, "Input/output error. Check the disk"),
    (errno.ENOENT, "No such file or directory. Move it back"),
]


@pytest.fixture
def core(config: Callable[..., LearnerConfig], monkeypatch: pytest.MonkeyPatch) -> Iterator[LearnerCore]:
    monkeypatch.setattr(module, "_RETRY_S", 0.001)
    core = LearnerCore(config())
    core.recover()
    yield core
    core.close()


def refuse(number: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "said"), REFUSALS)
def test_batch_is_rejected_while_it_cannot_be_journalled(
    core: LearnerCore, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write_batch", refuse(number))
        patched.setattr(Journal, "check_writable", refuse(number))
        with pytest.raises(BackendDown, match=f"state_dir .* cannot be written: {said}"):
            core.submit(make_batch(0))
        core.check_disk()
        assert said in core.disk_error

    core.check_disk()
    assert not core.disk_error
    assert not core.failure
    answer, duplicate = core.submit(make_batch(0))
    assert (answer.policy_version, duplicate) == (1, False)


@pytest.mark.parametrize(("number", "said"), REFUSALS)
def test_answer_waits_until_the_disk_can_be_written(
    core: LearnerCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, said: str
) -> None:
    left, write = [3], Journal.write_answer

    def refuse_at_first(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            refuse(number)()
        write(*arguments)

    monkeypatch.setattr(Journal, "write_answer", refuse_at_first)
    answer, _ = core.submit(make_batch(0))
    assert answer.policy_version == 1
    assert not core.failure
    assert not core.disk_error
    assert caplog.text.count(said) == 1
    assert core.submit(make_batch(0)) == (answer, True)


def test_stopping_learner_does_not_wait_for_the_disk(core: LearnerCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_and_leave(*_: Any) -> None:
        threading.Thread(target=core.stop_waiting).start()
        refuse(errno.ENOSPC)()

    monkeypatch.setattr(Journal, "write_answer", refuse_and_leave)
    with pytest.raises(BackendDown, match=r"the answer to batch .* cannot be written: .*No space left"):
        core.submit(make_batch(0))


def test_losing_a_rank_during_a_checkpoint_fails_the_learner(
    config: Callable[..., LearnerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = LearnerCore(config(checkpoint_every_steps=1))
    core.recover()

    def lost(trainer: Trainer) -> None:
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "state", lost)
        with pytest.raises(BackendDown, match="state for a checkpoint cannot be read: RuntimeError: Connection closed"):
            core.submit(make_batch(0))
    assert core.failure
    core.close()

    again = LearnerCore(config(checkpoint_every_steps=1))
    again.recover()
    assert again.submit(make_batch(0))[1]
    again.close()


@pytest.mark.parametrize("damaged", ["{}", "[]", "{not json", '{"content": 1}'])
def test_damaged_failure_count_means_zero(core: LearnerCore, damaged: str, tmp_path: Any) -> None:
    (tmp_path / "state" / "journal" / "failures-00000000.json").write_text(damaged)
    assert core.submit(make_batch(0))[0].policy_version == 1
