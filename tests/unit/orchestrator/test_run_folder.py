"""What a run keeps over a crash at any point."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from poise.orchestrator.run_folder import JournalledStep, RunError, RunFolder
from poise_client.types import Batch, Features, LabelledGroup, RolloutId, TrainingRollout, VersionSpan


def journalled(step: int) -> JournalledStep:
    features = Features(np.ones(3, np.float32), np.zeros(3, np.float32))
    rollout = TrainingRollout(
        RolloutId("run", step, "g", 0),
        np.array([1], np.int32),
        np.array([2, 3], np.int32),
        np.array([-1, -2], np.float32),
        0.5,
        (VersionSpan(0, 2, step),),
    )
    return JournalledStep(
        step=step,
        labels=[LabelledGroup("run", step, "g", "d", (features, features), np.array([0, 1], np.float32))],
        batch=Batch("run", f"step-{step:08d}", step, (rollout,), 0.75),
        numbers={"step": step, "time_s": {}},
        values={"step": step, "predicted": [0.5], "realised": [1.0]},
        samples=[{"step": step, "response": "é"}],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {"num_steps": 3})
    yield folder
    folder.close()
    for successor in SUCCESSORS:
        successor.close()
    SUCCESSORS.clear()


SUCCESSORS: list[RunFolder] = []


def again(folder: RunFolder, run_id: str = "run") -> tuple[RunFolder, int]:
    """What a process that starts after this one died finds."""
    folder.close()
    successor = RunFolder(folder.path)
    SUCCESSORS.append(successor)
    return successor, successor.open(run_id, {}).next_step


def finish(folder: RunFolder, step: int) -> None:
    step_done = journalled(step)
    folder.write_journal(step_done)
    folder.finish_step(step_done, step_done.numbers | {"wall_s": 2.0, "policy_version": step + 1})


def test_a_journalled_step_is_found_whole(folder: RunFolder) -> None:
    folder.write_journal(journalled(0))
    successor, next_step = again(folder)
    found = successor.read_journal(0)
    assert next_step == 0
    assert found is not None
    assert found.batch.rollouts[0].token_ids.tolist() == [2, 3]
    assert found.batch.temperature == 0.75
    assert found.labels[0].rewards.tolist() == [0, 1]
    assert (found.numbers, found.samples) == (journalled(0).numbers, journalled(0).samples)


def test_a_journal_half_written_is_none_at_all(folder: RunFolder) -> None:
    writing = folder.path / "journal" / "writing"
    writing.mkdir(parents=True)
    (writing / "labels.pb").write_bytes(b"half")
    assert folder.read_journal(0) is None
    folder.write_journal(journalled(0))
    assert folder.read_journal(0) is not None


def test_a_damaged_journal_is_named(folder: RunFolder) -> None:
    folder.write_journal(journalled(0))
    batch = folder.path / "journal" / "step-00000000" / "batch.pb"
    batch.write_bytes(batch.read_bytes()[:-3])
    with pytest.raises(RunError, match="step-00000000 is damaged"):
        folder.read_journal(0)


def test_a_finished_step_is_not_done_again(folder: RunFolder) -> None:
    finish(folder, 0)
    successor, next_step = again(folder)
    assert next_step == 1
    assert successor.read_journal(0) is None
    assert not list((folder.path / "journal").iterdir())


def test_lines_written_before_a_crash_that_lost_the_state_are_written_once(folder: RunFolder) -> None:
    finish(folder, 0)
    state = (folder.path / "state.json").read_bytes()
    finish(folder, 1)
    (folder.path / "state.json").write_bytes(state)
    with (folder.path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "cut')
    successor, next_step = again(folder)
    assert next_step == 1
    finish(successor, 1)
    for name in ("metrics.jsonl", "values.jsonl", "trajectories.jsonl"):
        steps = [json.loads(line)["step"] for line in (folder.path / name).read_text().splitlines()]
        assert steps == [0, 1], name


def test_two_processes_cannot_drive_a_run(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="driven by another process"):
        RunFolder(folder.path).open("run", {})


def test_the_folder_of_another_run_is_refused(folder: RunFolder) -> None:
    finish(folder, 0)
    with pytest.raises(RunError, match="holds run 'run', not 'other'"):
        again(folder, "other")


def test_an_evaluation_is_remembered(folder: RunFolder) -> None:
    folder.write_evaluation({"when": "before", "step": 0})
    successor, _ = again(folder)
    assert successor.evaluated("before", 0)
    assert not successor.evaluated("after", 0)
