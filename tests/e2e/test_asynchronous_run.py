"""`poise run` with steps sampled ahead of the learner, its loop killed midway: each rollout once, none too old."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.e2e.test_tiny_run import ROLLOUTS, STALL_S, Run

from poise.learner.storage.checkpoint import CheckpointStore
from poise.value.store import StateStore

NUM_STEPS, PROMPTS, AHEAD = 8, 16, 2


def test_a_run_that_samples_ahead_survives_the_death_of_its_loop(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = run.start(
        f"train.num_steps={NUM_STEPS}",
        f"train.prompts_per_step={PROMPTS}",
        f"max_staleness={AHEAD}",
        "train.evaluation.num_prompts=0",
        "value.probe.warmup_steps=1",
    )
    try:
        run.wait_for_steps(2, process)
        os.kill(run.pid("train"), signal.SIGKILL)
        assert process.wait(STALL_S) == 0, run.log.read_text()
    finally:
        process.kill()
    assert "train was killed by SIGKILL; restarting it" in run.log.read_text()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert all(row["num_rejected"] == {} for row in rows)
    assert max(row["steps_ahead"] for row in rows) == AHEAD
    assert 0 < max(row["staleness"]["max"] for row in rows) <= AHEAD
    learner = CheckpointStore(run.folder / "services" / "learner", keep=2)
    learner.open()
    checkpoint = learner.load()
    learner.close()
    assert checkpoint is not None
    assert checkpoint.progress.policy_version == NUM_STEPS
    assert len(checkpoint.seen) == checkpoint.progress.num_rollouts == NUM_STEPS * PROMPTS * ROLLOUTS
    value = StateStore(run.folder / "services" / "value")
    labels = value.open()
    value.close()
    assert labels is not None
    assert labels.num_groups_consumed == NUM_STEPS * PROMPTS
