"""A whole run killed at three points ends, version by version, in the weights of one that was never killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests.e2e.test_tiny_run import STALL_S, Run

NUM_STEPS, PROMPTS = 8, 16
VICTIMS = ("train", "generation", "learner")


def run_to_its_end(folder: Path, victims: tuple[str, ...]) -> Run:
    """Run eight steps; each victim dies two steps after the one before, elsewhere within a step each time."""
    run = Run(folder)
    process = run.start(
        f"train.num_steps={NUM_STEPS}",
        f"train.prompts_per_step={PROMPTS}",
        "train.algorithm=rloo",
        "train.evaluation.num_prompts=0",
        "learner.dtype=float32",
        "learner.mini_batch_prompts=8",
        "learner.checkpoint_every_steps=3",
    )
    try:
        for number, victim in enumerate(victims):
            run.wait_for_steps(1 + 2 * number, process)
            time.sleep(0.1 * number)
            os.kill(run.pid(victim), signal.SIGKILL)
        assert process.wait(STALL_S) == 0, run.log.read_text()
    finally:
        process.kill()
    for victim in victims:
        assert f"{victim} was killed by SIGKILL and is started again" in run.log.read_text()
    return run


def digests(run: Run) -> list[str]:
    """Of the weights after each step."""
    answers = sorted((run.folder / "services" / "learner" / "journal").glob("answer-*.json"))
    return [json.loads(path.read_text())["digest"] for path in answers]


@pytest.mark.timeout(600)
def test_a_run_killed_at_three_points_ends_in_the_weights_of_one_that_lived(tmp_path: Path) -> None:
    lived = run_to_its_end(tmp_path / "lived", ())
    killed = run_to_its_end(tmp_path / "killed", VICTIMS)
    expected = digests(lived)
    assert len(expected) == len(set(expected)) == NUM_STEPS
    assert digests(killed) == expected
    assert killed.steps() == lived.steps() == list(range(NUM_STEPS))
    exported = [(run.folder / "model" / "model.safetensors").read_bytes() for run in (lived, killed)]
    assert exported[0] == exported[1]
