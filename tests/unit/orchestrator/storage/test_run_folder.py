"""The run folder and its journal after crashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest
from tests.support.groups import make_group

from poise.orchestrator.budget import Limits, Usage
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.storage.step_journal import JournalledStep
from poise_client.types import (
    Batch,
    CalibrationBin,
    Features,
    ProbeQuality,
    ProbeReport,
    ProbeStatus,
    Rollout,
    RolloutId,
    VersionSpan,
)


def journalled(step: int) -> JournalledStep:
    features = Features(np.ones(3, np.float32), np.zeros(3, np.float32))
    rollout = Rollout(
        RolloutId("run", step, "g", 0),
        np.array([1], np.int32),
        np.array([2, 3], np.int32),
        np.array([-1, -2], np.float32),
        (VersionSpan(0, 2, step),),
        advantage=0.5,
    )
    return JournalledStep(
        step=step,
        labels=[make_group("g", [features, features], [0, 1], domain="d", step=step)],
        batch=Batch("run", f"step-{step:08d}", step, (rollout,), 0.75),
        metrics={"step": step, "time_s": {}},
        values={"step": step, "predicted": [0.5], "realised": [1.0]},
        rollouts=[{"step": step, "response": "é"}],
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
    """Open the folder as the next process does after a crash."""
    folder.close()
    successor = RunFolder(folder.path)
    SUCCESSORS.append(successor)
    return successor, successor.open(run_id, {}).next_step


def finish(folder: RunFolder, step: int) -> None:
    step_done = journalled(step)
    folder.journal.write(step_done)
    folder.finish_step(
        step_done, step_done.metrics | {"wall_s": 2.0, "tokens": 7 * (step + 1), "policy_version": step + 1}
    )


def test_a_journalled_step_is_found_whole(folder: RunFolder) -> None:
    folder.journal.write(journalled(0))
    successor, next_step = again(folder)
    found = successor.journal.read(0)
    assert next_step == 0
    assert found is not None
    assert found.batch.rollouts[0].token_ids.tolist() == [2, 3]
    assert found.batch.temperature == 0.75
    assert found.labels[0].rewards.tolist() == [0, 1]
    assert (found.metrics, found.rollouts) == (journalled(0).metrics, journalled(0).rollouts)


def test_an_incomplete_journal_entry_is_ignored(folder: RunFolder) -> None:
    writing = folder.path / "journal" / "writing"
    writing.mkdir(parents=True)
    (writing / "labels.pb").write_bytes(b"half")
    assert folder.journal.read(0) is None
    folder.journal.write(journalled(0))
    assert folder.journal.read(0) is not None


def test_a_damaged_journal_is_named(folder: RunFolder) -> None:
    folder.journal.write(journalled(0))
    batch = folder.path / "journal" / "step-00000000" / "batch.pb"
    batch.write_bytes(batch.read_bytes()[:-3])
    with pytest.raises(SettingsError, match="step-00000000 is damaged"):
        folder.journal.read(0)


def test_a_finished_step_is_not_done_again(folder: RunFolder) -> None:
    finish(folder, 0)
    successor, next_step = again(folder)
    assert next_step == 1
    assert successor.journal.read(0) is None
    assert not list((folder.path / "journal").iterdir())


def test_lines_after_the_last_state_are_written_once(folder: RunFolder) -> None:
    finish(folder, 0)
    state = (folder.path / "state.json").read_bytes()
    finish(folder, 1)
    (folder.path / "state.json").write_bytes(state)
    with (folder.path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "cut')
    successor, next_step = again(folder)
    assert next_step == 1
    finish(successor, 1)
    for name in ("metrics.jsonl", "values.jsonl", "rollouts.jsonl"):
        steps = [json.loads(line)["step"] for line in (folder.path / name).read_text().splitlines()]
        assert steps == [0, 1], name


def test_any_characters_survive_a_restart(folder: RunFolder) -> None:
    texts = ["one\u2028two", "three\x85four", "five\r\nsix", "\ud800é"[1:], '"{}']
    for step, text in enumerate(texts):
        done = replace(journalled(step), rollouts=[{"step": step, "response": text}])
        folder.journal.write(done)
        folder.finish_step(done, done.metrics | {"wall_s": 1.0, "tokens": 0, "policy_version": step + 1})
    before = (folder.path / "rollouts.jsonl").read_bytes()
    _, next_step = again(folder)
    assert next_step == len(texts)
    assert (folder.path / "rollouts.jsonl").read_bytes() == before
    assert [json.loads(line)["response"] for line in before.split(b"\n")[:-1]] == texts


def test_a_line_cut_off_within_a_character_is_dropped(folder: RunFolder) -> None:
    finish(folder, 0)
    path = folder.path / "rollouts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 0, "response": "é'.encode()[:-1])
    again(folder)
    assert path.read_bytes() == whole


def test_a_truncated_evaluation_is_dropped(folder: RunFolder) -> None:
    folder.write_evaluation({"when": "before", "step": 0}, [])
    with (folder.path / "evaluations.jsonl").open("a") as file:
        file.write('{"when": "step", "st')
    successor, _ = again(folder)
    successor.write_evaluation({"when": "step", "step": 2}, [])
    assert successor.evaluated("before", 0)
    assert successor.evaluated("step", 2)


def test_an_evaluations_line_names_a_complete_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.path / "generations" / "step-00000002.jsonl"
    responses = [{"response": "one\u2028two"}, {"response": "é"}]

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(folder, "append_lines", die)
        with pytest.raises(KeyboardInterrupt):
            folder.write_evaluation({"when": "step", "step": 2}, responses[:1])
    path.with_name("after-00000003.jsonl.tmp").write_text("cut o")
    successor, _ = again(folder)
    assert not successor.evaluated("step", 2)
    assert not list(path.parent.iterdir())
    successor.write_evaluation({"when": "step", "step": 2}, responses)
    written = path.read_bytes()
    assert [json.loads(line) for line in written.split(b"\n")[:-1]] == responses
    third, _ = again(successor)
    assert path.read_bytes() == written
    (line,) = (folder.path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["generations"] == "generations/step-00000002.jsonl"
    assert third.evaluated("step", 2)


def test_pending_steps_are_read_up_to_a_gap(folder: RunFolder) -> None:
    finish(folder, 0)
    for step in (1, 2, 4):
        folder.journal.write(journalled(step))
    successor, next_step = again(folder)
    assert next_step == 1
    assert {step: found.batch.step for step, found in successor.journal.read_pending(1).items()} == {1: 1, 2: 2}
    names = sorted(path.name for path in (folder.path / "journal").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    successor.journal.drop(2)
    assert list(successor.journal.read_pending(1)) == [1]


def test_journals_that_a_crash_left_over_are_removed(folder: RunFolder) -> None:
    folder.journal.write(journalled(0))
    kept = folder.path / "journal" / "step-00000000"
    left_over = folder.path / "journal" / "step-00000007"
    shutil.copytree(kept, left_over)
    (folder.path / "journal" / "writing").mkdir()
    again(folder)
    assert list(left_over.parent.iterdir()) == [kept]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '"x"', '{"run_id": "run", "unheard_of": 1}', "{}"])
def test_a_damaged_state_is_rejected(folder: RunFolder, content: str) -> None:
    (folder.path / "state.json").write_text(content)
    with pytest.raises(SettingsError, match=r"state\.json is damaged: .*restore it, or use another run folder"):
        again(folder)


def test_a_rejected_folder_is_unlocked(folder: RunFolder) -> None:
    finish(folder, 0)
    with pytest.raises(RunError):
        again(folder, "other")
    assert again(folder)[1] == 1


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"run folder .*file/run is not usable"):
        RunFolder(tmp_path / "file" / "run").open("run", {})


def test_settings_that_changed_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"seed": 0, "num_steps": 3, "sampling": {"max_tokens": 4, "top_p": 1.0}, "endpoints": {"value": "a:1"}}
    folder = RunFolder(tmp_path)
    folder.open("run", settings)
    finish(folder, 0)
    folder.close()
    changed = {"seed": 1, "num_steps": 9, "sampling": {"max_tokens": 8, "top_p": 1.0}, "endpoints": {"value": "b:2"}}
    folder.open("run", changed)
    folder.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        "settings changed since this run began; the new ones apply from step 1 on: "
        "sampling.max_tokens: 4 -> 8; seed: 0 -> 1"
    )
    caplog.clear()
    folder.open("run", changed)
    folder.close()
    assert not caplog.records


def test_a_run_is_finished_after_its_report(folder: RunFolder) -> None:
    finish(folder, 0)
    assert not folder.read_state("run").is_finished(Limits(1))
    folder.mark_reported()
    state = folder.read_state("run")
    assert state.is_finished(Limits(1))
    assert state.is_finished(Limits(2, tokens=7))
    assert not state.is_finished(Limits(2))
    assert (state.wall_s, state.policy_version, state.tokens) == (2.0, 1, 7)
    finish(folder, 1)
    assert not folder.read_state("run").is_finished(Limits(2))


def test_two_processes_cannot_open_a_run(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="another process uses"):
        RunFolder(folder.path).open("run", {})


def test_the_folder_of_another_run_is_rejected(folder: RunFolder) -> None:
    finish(folder, 0)
    with pytest.raises(RunError, match="belongs to run 'run', not 'other'"):
        again(folder, "other")


def test_a_written_evaluation_is_found(folder: RunFolder) -> None:
    assert folder.last_evaluated() == Usage()
    folder.write_evaluation({"when": "before", "step": 0, "tokens": 0, "wall_s": 0.0}, [])
    folder.write_evaluation({"when": "step", "step": 2, "tokens": 30, "wall_s": 1.5}, [])
    successor, _ = again(folder)
    assert successor.evaluated("before", 0)
    assert not successor.evaluated("after", 0)
    assert successor.last_evaluated() == Usage(2, 30, 1.5)


def test_unknown_numbers_of_a_probe_are_null(folder: RunFolder) -> None:
    quality = ProbeQuality(0, nan, nan, nan, nan, nan, nan, nan, nan, (CalibrationBin(0.1, 0.2, 3),))
    folder.write_probes(ProbeReport((ProbeStatus("d", 0, 2, 4, 1, 4, 0.0, nan, quality),), 2, 0, 0, 0))
    (probe,) = json.loads((folder.path / "probes.json").read_text())
    assert (probe["domain"], probe["num_rows"], probe["label_lag_s"]) == ("d", 4, None)
    assert probe["quality"]["brier"] is None
    assert probe["quality"]["calibration"] == [{"predicted": 0.1, "realised": 0.2, "count": 3}]
