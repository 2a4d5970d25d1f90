"""What is found out about a run before any service is needed, and how its end is told."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.storage.test_run_folder import finish

from poise.orchestrator import job
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.problem import TaskError
from poise.runtime.cli.broken_pipe import OutputClosed
from poise.runtime.cli.exit_status import OUTPUT_CLOSED
from poise.runtime.config.settings import ConfigError
from poise_client.errors import InvalidRequestError, UnauthenticatedError, UnavailableError


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(job, "configure_logging", lambda _: None)
    caplog.set_level(logging.INFO)
    return caplog


def settings(folder: Path, **values: Any) -> OrchestratorConfig:
    return OrchestratorConfig(**({"run_dir": folder, "num_steps": 1, "tasks": [{"kind": "digits"}]} | values))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    finish(folder, 0)
    folder.mark_reported()
    folder.close()
    return folder.path


def test_a_new_run_and_one_in_the_middle_go_on(tmp_path: Path) -> None:
    assert job.settle(settings(tmp_path / "run")) is None
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    finish(folder, 0)
    folder.close()
    assert job.settle(settings(tmp_path / "run")) is None  # all steps are done; nothing is exported nor reported


@pytest.mark.parametrize("work", [job.settle, job.train])
def test_a_finished_run_says_so_and_what_came_of_it_without_any_service(
    finished: Path, work: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert work(settings(finished)) == job.OK
    said = capsys.readouterr().out
    assert "run run: 1 steps in 0m02s" in said
    assert str(finished / "report.html") in said
    assert "This run is finished: 1 steps. Higher limits (num_steps, budget) go on with it; another name" in said


def test_a_finished_run_goes_on_with_more_steps(finished: Path) -> None:
    assert job.settle(settings(finished, num_steps=2)) is None


@pytest.mark.parametrize(
    ("values", "status", "message"),
    [
        ({"run_id": "other"}, job.WRONG_SETTINGS, "holds run 'run', not 'other'"),
        ({"tasks": [{"kind": "jsonl", "path": "absent.jsonl"}]}, job.WRONG_SETTINGS, "absent.jsonl: cannot be read"),
    ],
)
def test_what_is_wrong_is_told_at_once(
    finished: Path, logged: pytest.LogCaptureFixture, values: dict[str, Any], status: int, message: str
) -> None:
    assert job.settle(settings(finished, **values)) == status
    assert message in logged.text


def test_too_few_held_out_problems_are_told_at_once(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)))
    tasks = [{"kind": "jsonl", "path": str(problems), "verifier": "exact"}]
    config = settings(tmp_path / "run", tasks=tasks, evaluation={"num_prompts": 500})
    assert job.settle(config) == job.WRONG_SETTINGS, logged.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("endpoints.token_file: cannot be read"), 2),
        (TaskError("tasks[0]: no such verifier"), 2),
        (SettingsError("the learner has no critic"), 2),
        (InvalidRequestError("max_tokens is above max_model_len"), 2),
        (RunError("the run folder is full"), 1),
        (UnauthenticatedError("the token is wrong"), 1),  # it may be changing, one pod after the other
        (UnavailableError("connection refused", retryable=True), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_status_says_whether_another_start_helps(tmp_path: Path, error: Exception, status: int) -> None:
    def fail() -> int:
        raise error

    assert job.guarded(settings(tmp_path), fail) == status


@pytest.mark.parametrize("setting", ["ca_file", "token_file"])
def test_a_file_of_the_endpoints_that_is_not_there_is_named(
    tmp_path: Path, logged: pytest.LogCaptureFixture, setting: str
) -> None:
    assert job.train(settings(tmp_path / "run", endpoints={setting: tmp_path / "gone.pem"})) == job.WRONG_SETTINGS
    assert f"endpoints.{setting}: {tmp_path}/gone.pem cannot be read" in logged.text


def test_a_disk_that_is_full_now_is_not_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert job.train(settings(tmp_path / "run")) == job.FAILED


def test_an_interrupt_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "Mixture", interrupted)
    assert job.settle(settings(tmp_path)) == job.INTERRUPTED


def test_held_out_change_is_described() -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    held_out = {"before": interval(0.25), "after": interval(0.5), "difference": interval(0.25)}
    assert job.describe_held_out(held_out) == (
        "0.250 (0.150 to 0.350) -> 0.500 (0.400 to 0.600), change +0.250 (+0.150 to +0.350)"
    )
    assert job.describe_held_out(held_out | {"after": None}) == "was not measured both before and after"


def test_output_that_nobody_reads_ends_a_run(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    def print_to_nobody() -> None:
        raise OutputClosed

    assert job.guarded(settings(tmp_path), print_to_nobody) == OUTPUT_CLOSED
    assert "nobody reads the output any more; the same command resumes" in logged.text
