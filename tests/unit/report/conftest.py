"""A run folder like those of the training loop, with round numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]


def step_metrics(step: int, *, reward: float = 0.5, probe: bool = True) -> Row:
    return {
        "step": step,
        "wall_s": 2.0 * (step + 1),
        "algorithm": "poise",
        "policy_version": step + 1,
        "reward": {"mean": reward, "by_domain": {"sums": reward}},
        "baseline": {
            "source": "probe" if probe else "rloo",
            "probe_share": 1.0 if probe else 0.0,
            "probe_version": {"sums": 1} if probe else {},
            "pearson": 0.8 if probe else None,
            "brier": 0.1 if probe else None,
        },
        "advantage_variance": {
            "used": 0.2 if probe else 0.4,
            "none": 0.8,
            "rloo": 0.4,
            "batch_mean": 0.25,
            "by_domain": {"a": {"used": 0.2, "none": 0.8, "rloo": 0.4, "batch_mean": 0.25}} if probe else {},
        },
        "response_tokens": {"mean": 10.0, "max": 16, "total": 80},
        "tokens_per_s": 40.0,
        "staleness": {"mean": 0.5, "max": 1},
        "num_groups": 4,
        "num_rollouts": 8,
        "num_rejected": {"stale": 1},
        "verifier_errors": 2,
        "learner": {"loss": 0.1, "mismatch_logprob": 0.002, "mismatch_kl": 0.0001, "staleness": {"0": 4, "1": 4}},
        "time_s": {
            "generate": 1.0,
            "verify": 0.1,
            "baselines": 0.1,
            "journal": 0.1,
            "publish": 0.1,
            "train": 0.5,
            "weights": 0.1,
            "total": 2.0,
        },
    }


def evaluation(when: str, step: int, rewards: list[list[float]]) -> Row:
    mean = sum(map(sum, rewards)) / sum(map(len, rewards))
    return {
        "when": when,
        "step": step,
        "num_prompts": len(rewards),
        "rollouts_per_prompt": len(rewards[0]),
        "rewards": rewards,
        "by_domain": {"sums": mean, "words": mean},
    }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Create a run folder of `num_steps` steps, with a probe from step 2 on, and with `evaluations` if passed."""

    def make(num_steps: int = 6, *, probe: bool = True, evaluations: Iterable[Row] = ()) -> Path:
        run_dir = tmp_path / "my-run"
        run_dir.mkdir()
        answers = [probe and step >= 2 for step in range(num_steps)]
        write_rows(
            run_dir / "metrics.jsonl",
            (step_metrics(step, reward=step / 10, probe=answered) for step, answered in enumerate(answers)),
        )
        write_rows(
            run_dir / "values.jsonl",
            (
                {
                    "step": step,
                    "predicted": [0.1, 0.4, 0.6, 0.9],
                    "realised": [0.0, 0.0, 1.0, 1.0],
                    "domain": ["math", "math", "code <x>", "code <x>"],
                }
                for step, answered in enumerate(answers)
                if answered
            ),
        )
        write_rows(run_dir / "evaluations.jsonl", evaluations)
        return run_dir

    return make


@pytest.fixture
def new_step_metrics() -> Callable[..., Row]:
    return step_metrics


@pytest.fixture
def new_evaluation() -> Callable[..., Row]:
    return evaluation
