"""The tiny run sampled by vLLM: engine and learner stay one policy, version after version."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from tests.support.local_services import poise

NUM_STEPS = 6
TIMEOUT_S = 1200.0


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_on_vllm(tmp_path: Path) -> None:
    settings = [
        "engine=vllm",
        f"run.dir={tmp_path / 'run'}",
        f"train.num_steps={NUM_STEPS}",
        "train.evaluation.num_prompts=64",
        "value.probe.warmup_steps=2",
        "learner.optimizer.learning_rate=1e-3",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = poise("run", "--preset", "tiny", *flags, stdout=output, stderr=output)
    try:
        assert process.wait(TIMEOUT_S) == 0, _logs(tmp_path)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise AssertionError(_logs(tmp_path)) from None
    finally:
        process.kill()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy_version"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    # Had a push not arrived whole, the engine's log-probabilities would be those of other weights.
    assert all(line["learner"]["mismatch_logprob"] < 1e-4 for line in metrics)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out"]["verdict"] == "rose_beyond_intervals"
    assert not _of_this_run(tmp_path), "processes were left behind"


def _of_this_run(folder: Path) -> list[str]:
    """Processes whose command names the run's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(folder) in part for part in process.cmdline()):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def _logs(folder: Path) -> str:
    files = [folder / "log", *sorted((folder / "run" / "logs").glob("*.log"))]
    return "\n\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files if file.exists())
