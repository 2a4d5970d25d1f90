"""Exit statuses and summaries of runs."""

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


def test_unfinished_runs_need_the_services(tmp_path: Path) -> None:
    assert job.early_exit_status(settings(tmp_path / "run")) is None
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run")
    folder.open("run", {})
    finish(folder, 0)
    folder.close()
    assert (
        job.early_exit_status(settings(tmp_path / "run")) is None
    )  # all steps are done; nothing is exported nor reported


@pytest.mark.parametrize("work", [job.early_exit_status, job.train])
def test_a_finished_run_prints_its_summary(finished: Path, work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert work(settings(finished)) == job.OK
    said = capsys.readouterr().out
    assert "run run: 1 steps in 0m02s" in said
    assert str(finished / "report.html") in said
    assert "This run is finished after 1 steps. Raise its limits (num_steps, budget) to continue it, or" in said


def test_a_finished_run_continues_with_more_steps(finished: Path) -> None:
    assert job.early_exit_status(settings(finished, num_steps=2)) is None


@pytest.mark.parametrize(
    ("values", "status", "message"),
    [
        ({"run_id": "other"}, job.WRONG_SETTINGS, "belongs to run 'run', not 'other'"),
        ({"tasks": [{"kind": "jsonl", "path": "absent.jsonl"}]}, job.WRONG_SETTINGS, "absent.jsonl: is not readable"),
    ],
)
def test_errors_are_reported_before_services_are_used(
    finished: Path, logged: pytest.LogCaptureFixture, values: dict[str, Any], status: int, message: str
) -> None:
    assert job.early_exit_status(settings(finished, **values)) == status
    assert message in logged.text


def test_too_few_held_out_problems_are_reported(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)))
    tasks = [{"kind": "jsonl", "path": str(problems), "verifier": "exact"}]
    config = settings(tmp_path / "run", tasks=tasks, evaluation={"num_prompts": 500})
    assert job.early_exit_status(config) == job.WRONG_SETTINGS, logged.text


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
def test_the_exit_status_shows_if_a_restart_helps(tmp_path: Path, error: Exception, status: int) -> None:
    def fail() -> int:
        raise error

    assert job.with_exit_status(settings(tmp_path), fail) == status


@pytest.mark.parametrize("setting", ["ca_file", "token_file"])
def test_missing_files_of_endpoints_are_named(tmp_path: Path, logged: pytest.LogCaptureFixture, setting: str) -> None:
    assert job.train(settings(tmp_path / "run", endpoints={setting: tmp_path / "gone.pem"})) == job.WRONG_SETTINGS
    assert f"endpoints.{setting}: {tmp_path}/gone.pem cannot be read" in logged.text


def test_a_full_disk_is_not_a_settings_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert job.train(settings(tmp_path / "run")) == job.FAILED


def test_an_interrupt_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "Mixture", interrupted)
    assert job.early_exit_status(settings(tmp_path)) == job.INTERRUPTED


def test_held_out_change_is_described() -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    held_out = {"before": interval(0.25), "after": interval(0.5), "difference": interval(0.25)}
    assert job.describe_held_out(held_out) == (
        "0.250 (0.150 to 0.350) -> 0.500 (0.400 to 0.600), change +0.250 (+0.150 to +0.350)"
    )
    assert job.describe_held_out(held_out | {"after": None}) == "was not measured both before and after training"


def test_closed_output_ends_a_run(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    def print_to_closed_output() -> None:
        raise OutputClosed

    assert job.with_exit_status(settings(tmp_path), print_to_closed_output) == OUTPUT_CLOSED
    assert "the process that reads the output exited. Run the same command to resume" in logged.text
