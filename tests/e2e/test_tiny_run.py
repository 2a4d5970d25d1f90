"""`poise run --preset tiny` with every process killed once: it finishes by itself, nothing lost or counted twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests.support.local_services import poise

from poise.learner.storage.checkpoint import CheckpointStore
from poise.value.store import StateStore

NUM_STEPS, PROMPTS, ROLLOUTS = 36, 48, 2
VICTIMS = ("value", "generation", "learner", "valkey", "train")
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


def assert_each_counted_once(run: Run, num_steps: int) -> None:
    """Every label was learnt once, every rollout trained on once: as many as were published and submitted, by the
    states that the services themselves keep."""
    value = StateStore(run.folder / "services" / "value")
    labels = value.open()
    value.close()
    assert labels is not None
    assert labels.num_groups_consumed == num_steps * PROMPTS
    learner = CheckpointStore(run.folder / "services" / "learner", keep=2)
    learner.open()
    checkpoint = learner.load()
    learner.close()
    assert checkpoint is not None
    assert checkpoint.progress.num_batches == num_steps
    assert checkpoint.progress.policy_version == num_steps
    assert checkpoint.progress.num_rollouts == num_steps * PROMPTS * ROLLOUTS
    assert checkpoint.progress.num_rejected == {}
    assert len(checkpoint.seen) == num_steps * PROMPTS * ROLLOUTS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_survives_the_death_of_every_process(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = run.start()
    try:
        for number, victim in enumerate(VICTIMS):
            run.wait_for_steps(2 + 5 * number, process)
            # Somewhere within a step, elsewhere each time.
            time.sleep(0.13 * number)
            os.kill(run.pid(victim), signal.SIGKILL)
        assert process.wait(STALL_S * 2) == 0, run.log.read_text()
    finally:
        process.kill()
    output = run.log.read_text()
    for victim in VICTIMS:
        assert f"{victim} was killed by SIGKILL; restarting it" in output

    # Every step once, in order.
    assert run.steps() == list(range(NUM_STEPS))

    assert_each_counted_once(run, NUM_STEPS)

    # It learnt: the held-out reward rose far beyond the intervals, and the probe took over from the bootstrap.
    summary = json.loads((run.folder / "summary.json").read_text())
    held_out = summary["held_out"]
    assert held_out["verdict"] == "rose_beyond_intervals"
    assert held_out["after"]["mean"] > held_out["before"]["mean"] + 0.3
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["baseline"]["source"] == "bootstrap"
    assert metrics[-1]["baseline"]["source"] == "probe"
    # Every step's rollouts are on-policy, from the very weights the learner holds.
    assert all(line["learner"]["mismatch_logprob"] < 1e-4 for line in metrics)
    assert all(line["staleness"]["max"] == 0 for line in metrics)
    (probe,) = json.loads((run.folder / "probes.json").read_text())
    assert (probe["domain"], probe["num_steps_seen"]) == ("digits", NUM_STEPS)
    for name in ("report.html", "rollouts.jsonl", "values.jsonl", "model/config.json", "model/model.safetensors"):
        assert (run.folder / name).stat().st_size > 0, name
    assert list((run.folder / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_same_command_resumes_after_ctrl_c_and_after_a_kill(tmp_path: Path) -> None:
    num_steps = 12
    run = Run(tmp_path / "run")
    short = (f"train.num_steps={num_steps}", "train.evaluation.num_prompts=16")

    process = run.start(*short)
    try:
        run.wait_for_steps(3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(STALL_S) == 130, run.log.read_text()
    finally:
        process.kill()
    stopped_at = len(run.steps())
    assert 3 <= stopped_at < num_steps

    process = run.start(*short)
    try:
        run.wait_for_steps(stopped_at + 2, process)
    finally:
        process.kill()
        process.wait()
    left = [run.pid(name) for name in VICTIMS]

    process = run.start(*short)  # at once, while the services of the killed command may still be draining
    try:
        assert process.wait(STALL_S) == 0, run.log.read_text()
    finally:
        process.kill()

    assert f"resuming at step {stopped_at} of {num_steps}" in run.log.read_text()
    assert not any(psutil.pid_exists(pid) for pid in left)
    assert run.steps() == list(range(num_steps))
    assert_each_counted_once(run, num_steps)
