"""A run whose every process is killed ends, version by version, in the weights of a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_tiny_run import STALL_S, Run, assert_each_counted_once

NUM_STEPS, PROMPTS = 8, 16

VICTIMS = ("value", "train", "learner", "valkey", "value", "generation")
SETTINGS = (
    f"train.num_steps={NUM_STEPS}",
    f"train.prompts_per_step={PROMPTS}",
    "train.evaluation.num_prompts=0",
    "dtype=float32",
    "learner.mini_batch_prompts=8",
    "learner.checkpoint_every_steps=3",
    # Both kinds of estimators, each for one domain.
    "train.tasks=[{kind: digits, domain: score}, {kind: digits, domain: probe}]",
    "train.algorithm={kind: poise, estimator: score_prefix, bootstrap: rloo}",
    "value.estimator_by_domain={probe: probe}",
    "train.wait_for_labels_s=200",  # however slow the machine
    "value.probe.refit=fresh",
    "value.probe.warmup_steps=1",
    "value.probe.min_rows=2",
    # The window slides from the fifth step on.
    "value.probe.window_rows=64",
    # Consuming a step takes many saves and fits: kills fall in between, and the next question comes before its end.
    "value.queue.batch_entries=1",
)


def run_to_its_end(folder: Path, victims: tuple[str, ...]) -> Run:
    """Run eight steps; each victim dies a step or two after the one before, elsewhere within a step each time."""
    run = Run(folder)
    process = run.start(*SETTINGS)
    try:
        for number, victim in enumerate(victims):
            run.wait_for_steps(1 + number * (NUM_STEPS - 2) // len(victims), process)
            time.sleep(0.05 * number)
            os.kill(run.pid(victim), signal.SIGKILL)
        assert process.wait(STALL_S) == 0, run.log.read_text()
    finally:
        process.kill()
    for victim in victims:
        assert f"{victim} was killed by SIGKILL; restarting it" in run.log.read_text()
    return run


def digests(run: Run) -> list[str]:
    """Of the weights after each step."""
    answers = sorted((run.folder / "services" / "learner" / "journal").glob("answer-*.json"))
    return [json.loads(path.read_text())["digest"] for path in answers]


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1800)
def test_killed_run_ends_in_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    lived = run_to_its_end(tmp_path / "lived", ())
    killed = run_to_its_end(tmp_path / "killed", VICTIMS)
    expected = digests(lived)
    assert len(expected) == len(set(expected)) == NUM_STEPS
    assert digests(killed) == expected
    assert killed.steps() == lived.steps() == list(range(NUM_STEPS))
    exported = [(run.folder / "model" / "model.safetensors").read_bytes() for run in (lived, killed)]
    assert exported[0] == exported[1]
    for run in (lived, killed):
        assert_each_counted_once(run, NUM_STEPS, PROMPTS)
        # Each step's rollouts come from the very weights that the learner holds.
        assert all(line["learner"]["mismatch_logprob"] < 1e-4 for line in metrics(run))
        assert all(line["staleness"]["max"] == 0 for line in metrics(run))
        sources = [line["baseline"]["source"] for line in metrics(run)]
        assert sources == ["bootstrap"] + ["mixed"] * (NUM_STEPS - 1)
        assert metrics(run)[-1]["baseline"]["estimator"] == {"probe": "probe", "score": "score_prefix"}
        assert all(line["baseline"]["probe_up_to_date"] for line in metrics(run))
    probes = json.loads((killed.folder / "probes.json").read_text())
    assert {probe["domain"]: probe["estimator"] for probe in probes} == {"probe": "probe", "score": "score_prefix"}
    assert [probe["num_steps_seen"] for probe in probes] == [NUM_STEPS] * 2
    for name in ("report.html", "rollouts.jsonl", "values.jsonl", "model/config.json", "model/model.safetensors"):
        assert (killed.folder / name).stat().st_size > 0, name
    assert list((killed.folder / "tensorboard").iterdir())
