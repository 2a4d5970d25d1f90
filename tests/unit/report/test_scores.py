from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from poise.report.scores import read_table, score_names, score_rows, score_table
from poise.report.statistics import bootstrap_interval

REWARDS = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]
DOMAINS = ["math", "math", "code", "math"]
TASKS = ["gsm8k", "aime", "mbpp", "gsm8k"]


def means(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores[name]["mean"] for name in score_names(scores)}


def test_scores_are_overall_by_domain_and_by_task() -> None:
    table = score_table(REWARDS, DOMAINS, TASKS, 1.0)
    assert means(table["overall"]) == {"avg@2": 0.4375, "pass@1": 0.375, "pass@2": 0.5}
    assert {name: entry["num_prompts"] for name, entry in table["by_domain"].items()} == {"code": 1, "math": 3}
    assert means(table["by_domain"]["math"]) == pytest.approx({"avg@2": 3.5 / 6, "pass@1": 0.5, "pass@2": 2 / 3})
    assert means(table["by_domain"]["code"]) == {"avg@2": 0, "pass@1": 0, "pass@2": 0}
    assert means(table["by_task"]["gsm8k"]) == {"avg@2": 0.375, "pass@1": 0.25, "pass@2": 0.5}
    assert [group for group, _ in score_rows(table)] == [
        "overall",
        "task aime",
        "task gsm8k",
        "task mbpp",
        "domain code",
        "domain math",
    ]


def test_a_lower_threshold_raises_only_pass_at_k() -> None:
    table = score_table(REWARDS, DOMAINS, TASKS, 0.5)
    assert means(table["overall"]) == {"avg@2": 0.4375, "pass@1": 0.5, "pass@2": 0.75}


def test_a_reward_at_the_threshold_passes_though_it_was_rounded() -> None:
    rewards = np.array([[0.9], [0.7]], np.float32).tolist()
    assert rewards[0][0] < 0.9
    assert means(score_table(rewards, ["d"] * 2, ["t"] * 2, 0.9)["overall"])["pass@1"] == 0.5


def test_intervals_are_bootstraps_over_prompts() -> None:
    rewards = np.random.default_rng(1).integers(0, 2, (60, 4)).astype(float)
    scores = score_table(rewards, ["d"] * 60, ["t"] * 60, 1.0)["overall"]
    interval = bootstrap_interval(rewards.tolist())
    assert scores["avg@4"] == {"mean": interval.mean, "low": interval.low, "high": interval.high}
    assert scores["pass@1"] == pytest.approx(scores["avg@4"])  # of rewards 0 and 1
    any_passed = bootstrap_interval(rewards.max(axis=1, keepdims=True).tolist())
    assert scores["pass@4"] == {"mean": any_passed.mean, "low": any_passed.low, "high": any_passed.high}


def test_only_valid_tables_are_read() -> None:
    table = score_table(REWARDS, DOMAINS, TASKS, 1.0)
    assert read_table(table) == table
    broken = score_table(REWARDS, DOMAINS, TASKS, 1.0)
    broken["by_task"]["aime"]["pass@1"]["low"] = None
    empty = {"overall": {}, "by_domain": {}, "by_task": {}}
    for other in (None, [], {}, {"overall": table["overall"]}, {"overall": 3}, empty, broken):
        assert read_table(other) is None
