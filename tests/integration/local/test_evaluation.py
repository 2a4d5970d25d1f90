"""`poise eval` with mistakes and interrupts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from tests.integration.local.test_cli import poise
from tests.integration.local.test_up import DEADLINE_S, wait_for
from tests.support.local_services import poise as poise_process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file, and folders that hold no model, or something that only looks like one."""
    values = {"model": "org/model", "engine": "torch", "train": {"tasks": [{"kind": "digits"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "run" / "model").mkdir(parents=True)
    for path in (tmp_path / "run" / "model", tmp_path / "broken"):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text('{"model_type": "llama"}')
        (path / "model.safetensors").write_bytes(b"none")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "evaluation.json").write_text("{}")
    (tmp_path / "checkpoint-00000003").mkdir()
    (tmp_path / "checkpoint-00000003" / "state.json").write_text(json.dumps({"schema_version": 99}))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            [],
            1,
            "Start the services with `poise up` and the same options. Without services, `poise eval --model FOLDER`",
        ),
        (["--model", "./absent"], 2, "--model: ./absent does not exist. Name a Hugging Face folder, one of tiny,"),
        (["--model", "runs/a/model"], 2, "--model: runs/a/model does not exist"),
        (["--model", "run"], 2, "--model: run is not a Hugging Face model: a folder with config.json, weights and the"),
        (["--model", "run"], 2, "did you mean run/model?"),
        (["--model", "run.yaml"], 2, "for a checkpoint use `--checkpoint`"),
        (["--model", "broken"], 2, "generation exited with status 2. The end of its log, "),
        (["--model", "broken"], 2, "broken cannot be loaded"),
        (["--model", "broken", "--checkpoint"], 2, "--model and --checkpoint are both set"),
        (["--checkpoint"], 1, "services/learner has no checkpoint yet. The learner writes one every"),
        (["--checkpoint", "absent"], 2, "--checkpoint: absent does not exist. Name a checkpoint-… folder"),
        (["--checkpoint", "checkpoint-00000003"], 1, "checkpoint-00000003 has schema_version 99"),
        (["--out", "done"], 2, "done already contains an evaluation; use another folder"),
        (["--out", "run.yaml/x"], 2, "run.yaml/x is not usable"),
        (
            ["--set", "train.evaluation.num_prompts=0"],
            2,
            "evaluation.num_prompts is 0; set it to 1 or more to evaluate",
        ),
        (["--prompts", "1000000"], 2, "held-out problems, but its share of 1000000 is 1000000. Lower"),
        (["--rollouts", "0"], 2, "0 is not in the range"),
    ],
)
def test_mistake_is_one_message(folder: Path, arguments: list[str], status: int, message: str) -> None:
    done = poise("eval", "-c", "run.yaml", *arguments, folder=folder)
    assert message in done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_interrupt_stops_the_engine_and_leaves_no_files(folder: Path) -> None:
    log = folder / "log"
    arguments = ("eval", "-c", "run.yaml", "--model", "broken", "--out", "out")
    with log.open("w") as output:
        process = poise_process(*arguments, stdout=output, stderr=output, cwd=folder)
    try:
        wait_for(log, "starting a generation service for", process)
        while not (engines := psutil.Process(process.pid).children()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    finally:
        process.kill()
        process.wait()
    assert not any(engine.is_running() for engine in engines)
    assert not (folder / "out").exists()
    assert "Traceback" not in log.read_text()
