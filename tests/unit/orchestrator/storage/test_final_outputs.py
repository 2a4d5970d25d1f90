"""What a run leaves at its end is tried before its first step."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.orchestrator import job
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.storage import final_outputs as outputs
from poise.orchestrator.storage.final_outputs import keep_model
from poise.runtime.models.checkpoint_digest import EXPORT_MARK


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    def no_services(*_: Any) -> None:
        raise AssertionError("nothing is asked of any service")

    monkeypatch.setattr(job, "configure_logging", lambda _: None)
    monkeypatch.setattr(job, "Services", no_services)
    return caplog


def settings(folder: Path, **values: Any) -> OrchestratorConfig:
    return OrchestratorConfig(**({"run_dir": folder, "num_steps": 1, "tasks": [{"kind": "digits"}]} | values))


def occupy_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("the user's own")


def occupy_model_by_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "model").symlink_to(folder / "nowhere")


def occupy_curves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "tensorboard").write_text("a file")


def occupy_generations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "generations").write_text("a file")


def occupy_journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "journal").write_text("a file")


def occupy_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")


def hide(module: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (occupy_model, f"model is where this run puts its model, and holds something else: it has no {EXPORT_MARK}"),
        (occupy_model_by_link, "model is where this run puts its model"),
        (occupy_curves, "tensorboard cannot be written: File exists"),
        (occupy_generations, "cannot be used as the run's folder: File exists"),
        (occupy_journal, "cannot be used as the run's folder: File exists"),
        (occupy_folder, "cannot be used as the run's folder: "),
        (hide("jinja2"), "report and curves cannot be written: .*jinja2.*Install what is missing"),
        (hide("markupsafe"), "report and curves cannot be written: .*markupsafe"),
        (hide("tensorboard.compat.proto"), "report and curves cannot be written: .*tensorboard"),
    ],
)
def test_what_would_fail_at_the_end_is_told_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    why: str,
) -> None:
    import re

    spoil(tmp_path / "run", monkeypatch)
    assert job.train(settings(tmp_path / "run")) == job.WRONG_SETTINGS
    assert re.search(why, logged.text)


def test_too_few_held_out_problems_are_told_at_the_start(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    tasks = [{"kind": "jsonl", "path": str(path), "verifier": "exact"}]
    assert job.train(settings(tmp_path / "run", tasks=tasks)) == job.WRONG_SETTINGS
    assert "held" in logged.text


@pytest.mark.parametrize("temperature", [0.001, 0.0099])
def test_a_temperature_that_nothing_samples_at_is_told_at_the_start(tmp_path: Path, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"required: 0 \(greedy\), or 0.01 to 100"):
        settings(tmp_path, evaluation={"temperature": temperature})


def test_a_model_is_copied_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, target = tmp_path / "exports" / "model", tmp_path / "run" / "model"
    for folder, text in ((exported, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)

    def fail(source: Path, to: Path) -> None:
        to.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(outputs.shutil, "copytree", fail)
        with pytest.raises(OSError, match="No space left"):
            keep_model(exported, target)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["model"]

    keep_model(exported, target)
    assert (target / "config.json").read_text() == "new"
    shutil.rmtree(exported)
    keep_model(exported, target)  # on another machine's disk
    assert (target / "config.json").read_text() == "new"
