"""Runs docs/custom_loop.py against local services: it is short, and it learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.local_services import services_up, write_run_file

EXAMPLE = Path(__file__).parents[2] / "docs" / "custom_loop.py"
NUM_STEPS = 12


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40


@pytest.mark.slow
def test_the_example_trains_and_can_be_run_again(tmp_path: Path) -> None:
    settings = {
        "model": "tiny",
        "engine": "torch",
        "learner": {"threads": 1, "optimizer": {"learning_rate": 1e-3, "warmup_updates": 2}},
        "train": {"tasks": [{"kind": "digits"}], "algorithm": {"kind": "poise", "estimator": "score_prefix"}},
    }
    with services_up(write_run_file(tmp_path, settings)) as run:
        endpoints = run.train.endpoints
        addresses = [endpoints.generation[0], endpoints.value, endpoints.learner]
        done, again = (
            subprocess.run(
                [sys.executable, EXAMPLE, *addresses, str(num_steps)], capture_output=True, text=True, timeout=200
            )
            for num_steps in (NUM_STEPS, 2)
        )
    assert done.returncode == 0, done.stderr
    assert again.returncode == 0, again.stderr
    rewards = [float(number) for number in re.findall(r"reward ([\d.]+)", done.stdout)]
    assert len(rewards) == NUM_STEPS
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards
    assert f"policy version {NUM_STEPS}" in done.stdout
    assert f"policy version {NUM_STEPS + 2}" in again.stdout
