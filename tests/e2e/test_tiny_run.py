"""`poise run --preset tiny` stopped and killed: the same command resumes it, and nothing is lost or counted twice."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests.support.local_services import poise

from poise.learner.storage.checkpoint import CheckpointStore
from poise.value.store import StateStore

NUM_STEPS, PROMPTS, ROLLOUTS = 12, 48, 2
PROCESSES = ("value", "generation", "learner", "valkey", "train")
EVALUATION = "train.evaluation.num_prompts=16"
STALL_S = 600.0


class Run:
    """A run seen from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")

    def start(self, *options: str) -> subprocess.Popen[str]:
        settings = [
            f"run.dir={self.folder}",
            f"train.num_steps={NUM_STEPS}",
            f"train.prompts_per_step={PROMPTS}",
            "learner.checkpoint_every_steps=5",
            "value.queue.claim_idle_s=2",
        ]
        flags = [part for setting in (*settings, *options) for part in ("--set", setting)]
        with self.log.open("a") as output:
            return poise("run", "--preset", "tiny", *flags, stdout=output, stderr=output)

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]  # the last may be half written

    def pid(self, name: str) -> int:
        return int(json.loads((self.folder / "services" / "pids.json").read_text())[name][0])

    def wait_for_steps(self, num_steps: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + STALL_S
        while len(self.steps()) < num_steps:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


def assert_each_counted_once(run: Run, num_steps: int, num_prompts: int) -> None:
    """Every label was learnt once, every rollout trained on once: as many as were published and submitted, by the
    states that the services themselves keep."""
    value = StateStore(run.folder / "services" / "value")
    labels = value.open()
    value.close()
    assert labels is not None
    assert labels.num_groups_consumed == num_steps * num_prompts
    learner = CheckpointStore(run.folder / "services" / "learner", keep=2)
    learner.open()
    checkpoint = learner.load()
    learner.close()
    assert checkpoint is not None
    assert checkpoint.progress.num_batches == num_steps
    assert checkpoint.progress.policy_version == num_steps
    assert checkpoint.progress.num_rollouts == num_steps * num_prompts * ROLLOUTS
    assert checkpoint.progress.num_rejected == {}
    assert len(checkpoint.seen) == num_steps * num_prompts * ROLLOUTS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_same_command_resumes_after_ctrl_c_and_after_a_kill(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")

    process = run.start(EVALUATION)
    try:
        run.wait_for_steps(3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(STALL_S) == 130, run.log.read_text()
    finally:
        process.kill()
    stopped_at = len(run.steps())
    assert 3 <= stopped_at < NUM_STEPS

    process = run.start(EVALUATION)
    try:
        run.wait_for_steps(stopped_at + 2, process)
    finally:
        process.kill()
        process.wait()
    left = [run.pid(name) for name in PROCESSES]

    process = run.start(EVALUATION)  # at once, while services of the killed command may still be draining
    try:
        assert process.wait(STALL_S) == 0, run.log.read_text()
    finally:
        process.kill()

    assert f"resuming at step {stopped_at} of {NUM_STEPS}" in run.log.read_text()
    assert not any(psutil.pid_exists(pid) for pid in left)
    assert run.steps() == list(range(NUM_STEPS))
    assert_each_counted_once(run, NUM_STEPS, PROMPTS)
