"""Outputs of a run are checked before its first step."""

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
from poise.orchestrator.storage import model_copy
from poise.orchestrator.storage.model_copy import copy_model
from poise.runtime.models.checkpoint_digest import EXPORT_MARK


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    def no_services(*_: Any) -> None:
        raise AssertionError("nothing is asked of any service")

    monkeypatch.setattr(job, "configure_logging", lambda _: None)
    monkeypatch.setattr(job, "ServiceClients", no_services)
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
        (occupy_model, f"model exists and is not an exported model: it has no {EXPORT_MARK}"),
        (occupy_model_by_link, "model exists and is not an exported model"),
        (occupy_curves, "tensorboard is not writable: File exists"),
        (occupy_generations, "run folder .* is not usable: File exists"),
        (occupy_journal, "run folder .* is not usable: File exists"),
        (occupy_folder, "run folder .* is not usable: "),
        (hide("jinja2"), "report needs a library that is missing: .*jinja2.*Install it"),
        (hide("markupsafe"), "report needs a library that is missing: .*markupsafe"),
        (hide("tensorboard.compat.proto"), "report needs a library that is missing: .*tensorboard"),
    ],
)
def test_unwritable_outputs_fail_at_the_start(
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


def test_too_few_held_out_problems_fail_at_the_start(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    tasks = [{"kind": "jsonl", "path": str(path), "verifier": "exact"}]
    assert job.train(settings(tmp_path / "run", tasks=tasks)) == job.WRONG_SETTINGS
    assert "held" in logged.text


@pytest.mark.parametrize("temperature", [0.001, 0.0099])
def test_an_unsupported_temperature_is_rejected(tmp_path: Path, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"must be 0 \(greedy\), or 0.01 to 100"):
        settings(tmp_path, evaluation={"temperature": temperature})


def test_the_model_is_copied_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, target = tmp_path / "exports" / "model", tmp_path / "run" / "model"
    for folder, text in ((exported, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)

    def fail(source: Path, to: Path) -> None:
        to.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(model_copy.shutil, "copytree", fail)
        with pytest.raises(OSError, match="No space left"):
            copy_model(exported, target)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["model"]

    copy_model(exported, target)
    assert (target / "config.json").read_text() == "new"
    shutil.rmtree(exported)
    copy_model(exported, target)  # on another machine's disk
    assert (target / "config.json").read_text() == "new"
