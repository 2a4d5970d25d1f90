"""Baselines, labels, batch and metrics of a step, against numbers calculated by hand."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from poise.algorithms.group_baselines import group_mean, whitened
from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.sampling.scored_groups import (
    ScoredGroup,
    StepBaselines,
    labelled_groups,
    rewards_of,
    training_batch,
)
from poise.orchestrator.step_metrics import predictions, sampling_metrics
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Features, Group, GroupBaselines, ProbeReport, Rollout, RolloutId, VersionSpan


def group(name: str, rewards: list[float], version: int = 3, *, sum_squares: float | None = None) -> ScoredGroup:
    def rollout(index: int) -> Rollout:
        tokens = np.arange(index + 1, dtype=np.int32)
        return Rollout(
            id=RolloutId("run", 7, name, index),
            prompt_token_ids=np.array([1, 2], np.int32),
            token_ids=tokens,
            logprobs=-tokens.astype(np.float32),
            sum_squared_probs=np.full(0 if sum_squares is None else index + 1, sum_squares, np.float16),
            features=Features(np.full(2, index, np.float32), np.zeros(2, np.float32)),
            version_spans=(VersionSpan(0, index + 1, version),),
            finish_reason="stop",
            text="",
        )

    rollouts = tuple(rollout(index) for index in range(len(rewards)))
    problem = Problem("d", name, "", "exact")
    return ScoredGroup(Group(name, rollouts), problem, np.array(rewards, np.float32))


GROUPS = [group("a", [1.0, 0.0]), group("b", [1.0, 1.0])]
PROBE = ProbeReport((), 0, 0, 0, 0, "probe")


def answer(name: str, values: list[float] | None) -> GroupBaselines:
    if values is None:
        return GroupBaselines(name, 0, None, None)
    return GroupBaselines(name, 5, np.array(values, np.float32), np.array(values[::-1], np.float32))


async def poise(
    values: dict[str, list[float] | None], bootstrap: Literal["rloo", "batch_mean"] = "rloo"
) -> StepBaselines:
    async def estimate() -> list[GroupBaselines]:
        return [answer(name, of_group) for name, of_group in values.items()]

    return await PoiseOptions(bootstrap=bootstrap).make(8).baselines(GROUPS, estimate)


def grpo(groups: list[ScoredGroup]) -> StepBaselines:
    scaled = group_mean(rewards_of(groups), divide=True)
    return StepBaselines(scaled.baselines, "group", scales=scaled.scales)


def test_baseline_requests_contain_the_rewards() -> None:
    features = labelled_groups(GROUPS, PROBE)
    assert [(item.group_id, item.domain) for item in features] == [("a", "d"), ("b", "d")]
    assert [item.rewards.tolist() for item in features] == [[1.0, 0.0], [1.0, 1.0]]


async def test_without_a_probe_the_bootstrap_is_the_baseline() -> None:
    rloo = await poise({"a": None, "b": None})
    assert [b.tolist() for b in rloo.baselines] == [[0.0, 1.0], [1.0, 1.0]]
    mean = await poise({"a": None, "b": None}, "batch_mean")
    assert [b.tolist() for b in mean.baselines] == [[1.0, 1.0], [0.5, 0.5]]


QUALITY = ("pearson", "brier", "brier_skill", "bias")


async def test_baselines_of_the_probe_replace_the_bootstrap() -> None:
    chosen = await poise({"a": [0.25, 0.75], "b": None})
    assert [b.tolist() for b in chosen.baselines] == [[0.75, 0.25], [1.0, 1.0]]
    assert predictions(GROUPS, chosen) == {"predicted": [0.25, 0.75], "realised": [0.0, 1.0], "domain": ["d", "d"]}
    metrics = sampling_metrics(GROUPS, GROUPS, chosen, 4)
    assert metrics["baseline"]["source"] == "mixed"
    assert metrics["baseline"]["probe_share"] == 0.5
    assert metrics["baseline"]["brier"] == pytest.approx((0.25**2 + 0.25**2) / 2)
    assert metrics["baseline"]["bias"] == pytest.approx(0)
    assert metrics["baseline"]["by_domain"] == {"d": {k: metrics["baseline"][k] for k in QUALITY}}
    assert metrics["advantage_variance"]["used"] == pytest.approx((0.25**2 + 0.25**2) / 4)
    assert metrics["advantage_variance"]["none"] == pytest.approx(3 / 4)
    assert metrics["advantage_variance"]["rloo"] == pytest.approx(2 / 4)
    assert metrics["advantage_variance"]["batch_mean"] == pytest.approx((0 + 1 + 0.25 + 0.25) / 4)
    variance = dict(metrics["advantage_variance"])
    assert variance.pop("by_domain") == {"d": variance}
    nothing = dict.fromkeys(("used", "none", "rloo", "batch_mean"))  # without token statistics
    assert metrics["weighted_advantage_variance"] == nothing | {"by_domain": {"d": nothing}}
    assert metrics["reward"] == {"mean": 0.75, "by_domain": {"d": 0.75}}
    assert metrics["response_tokens"] == {"mean": 1.5, "max": 2, "total": 6}
    assert metrics["staleness"] == {"mean": 1.0, "max": 1}


async def test_the_batch_contains_reward_minus_baseline() -> None:
    chosen = await poise({"a": [0.25, 0.75], "b": [0.5, 1.0]})
    batch = training_batch("run", 7, GROUPS, chosen, 0.8)
    assert (batch.batch_id, batch.step, batch.temperature) == ("step-00000007", 7, 0.8)
    assert [rollout.advantage for rollout in batch.rollouts] == [0.25, -0.25, 0.0, 0.5]
    assert [rollout.id.group_id for rollout in batch.rollouts] == ["a", "a", "b", "b"]


def test_labels_contain_features_and_rewards_of_whole_groups() -> None:
    labels = labelled_groups(GROUPS, PROBE)
    assert [(label.group_id, label.domain, label.rewards.tolist()) for label in labels] == [
        ("a", "d", [1.0, 0.0]),
        ("b", "d", [1.0, 1.0]),
    ]
    assert labels[0].rollouts[1].features.prompt_hidden.tolist() == [1.0, 1.0]


def test_the_batch_contains_scaled_advantages() -> None:
    chosen = grpo(GROUPS)
    batch = training_batch("run", 7, GROUPS, chosen, 1.0)
    assert [rollout.advantage for rollout in batch.rollouts] == pytest.approx([0.7070, -0.7070, 0, 0], abs=1e-4)
    assert [rollout.reward for rollout in batch.rollouts] == [None] * 4
    metrics = sampling_metrics(GROUPS, GROUPS, chosen, 4)
    assert metrics["baseline"]["source"] == "group"
    assert metrics["advantage_variance"]["used"] == pytest.approx(2 * 0.25 / 4)
    assert metrics["zero_advantage_share"] == 0.5


def test_a_critic_gets_rewards_instead_of_advantages() -> None:
    chosen = StepBaselines([np.zeros_like(item.rewards) for item in GROUPS], "critic")
    batch = training_batch("run", 7, GROUPS, chosen, 1.0)
    assert [rollout.reward for rollout in batch.rollouts] == [1, 0, 1, 1]
    assert [rollout.advantage for rollout in batch.rollouts] == [0, 0, 0, 0]
    metrics = sampling_metrics(GROUPS, GROUPS, chosen, 4)
    assert metrics["advantage_variance"]["used"] is None
    assert metrics["zero_advantage_share"] is None


def test_dropped_groups_count_as_sampled() -> None:
    kept = GROUPS[:1]
    metrics = sampling_metrics(GROUPS, kept, grpo(kept), 4)
    assert metrics["reward"]["mean"] == 0.75
    assert metrics["response_tokens"]["total"] == 6
    assert (metrics["num_groups"], metrics["num_kept_groups"], metrics["num_rollouts"]) == (2, 1, 4)
    assert metrics["advantage_variance"]["none"] == 0.5


def test_penalties_are_added_before_the_baseline_is_subtracted() -> None:
    penalties = [np.array([-0.5, 0], np.float32), np.array([0, -1], np.float32)]
    shaped = [item.rewards + penalty for item, penalty in zip(GROUPS, penalties, strict=True)]
    chosen = StepBaselines(group_mean(shaped, divide=False).baselines, "group", penalties=penalties)
    assert [chosen.advantages(i, item.rewards).tolist() for i, item in enumerate(GROUPS)] == [
        [0.25, -0.25],
        [0.5, -0.5],
    ]


def by_token(*tokens: list[list[float]] | None) -> StepBaselines:
    """Return baselines of score_prefix for groups a, b, ...; None for a group of a domain without a fitted one."""
    arrays = [each and [np.array(b, np.float32) for b in each] for each in tokens]
    values = [each and np.array([b.mean() for b in each], np.float32) for each in arrays]
    own = [np.zeros(2, np.float32) if each is None else each for each in values]
    return StepBaselines(own, "score", values, arrays, estimators={"d": "score_prefix"})


def test_the_batch_contains_one_advantage_for_each_token() -> None:
    batch = training_batch("run", 7, GROUPS, by_token([[0.25], [0.5, 1.0]], None), 1.0)
    a, b, c, d = batch.rollouts
    assert a.advantages is not None and b.advantages is not None
    assert (a.advantages.tolist(), b.advantages.tolist()) == ([0.75], [-0.5, -1.0])
    assert (a.advantage, b.advantage, c.advantage, d.advantage) == (None, None, 1.0, 1.0)
    assert c.advantages is None and d.advantages is None


def test_weighted_variances_use_squared_score_norms() -> None:
    groups = [group("a", [1.0, 0.0], sum_squares=0.5), group("b", [1.0, 1.0], sum_squares=0.25)]
    metrics = sampling_metrics(groups, groups, by_token([[0.25], [0.5, 1.0]], [[0.0], [0.5, 0.25]]), 4)
    # ω is 0 for a sampled token of probability 1, so only the second token of each second rollout counts.
    weights = np.array([1 - 2 / np.e + 0.5, 1 - 2 / np.e + 0.25])
    found = metrics["weighted_advantage_variance"]
    assert found["used"] == pytest.approx((weights @ [1.0, 0.75**2]) / weights.sum(), rel=1e-5)
    assert found["none"] == pytest.approx((weights @ [0, 1]) / weights.sum(), rel=1e-5)
    assert found["rloo"] == pytest.approx((weights @ [1, 0]) / weights.sum(), rel=1e-5)
    assert found["batch_mean"] == pytest.approx((weights @ [1, 0.25]) / weights.sum(), rel=1e-5)
    assert found["by_domain"] == {"d": {name: found[name] for name in ("used", "none", "rloo", "batch_mean")}}
    assert metrics["advantage_variance"]["used"] == pytest.approx((0.75**2 + 0.75**2 + 1 + 0.625**2) / 4)


def test_score_weighted_values_are_compared_with_own_rewards() -> None:
    groups = [group("a", [1.0], sum_squares=0.5), group("b", [0.0], sum_squares=0.5)]
    chosen = by_token([[0.25]], [[0.5]])
    assert predictions(groups, chosen) == {"predicted": [0.25, 0.5], "realised": [1.0, 0.0], "domain": ["d", "d"]}
    metrics = sampling_metrics(groups, groups, chosen, 4)
    assert metrics["baseline"]["bias"] == pytest.approx(-0.125)
    assert metrics["baseline"]["probe_share"] == 1
    assert metrics["advantage_variance"]["by_domain"]["d"]["rloo"] is None


def test_zero_advantages_are_counted_by_token() -> None:
    metrics = sampling_metrics(GROUPS, GROUPS, by_token([[1.0], [0.0, 0.0]], [[1.0], [1.5, 0.5]]), 4)
    assert metrics["zero_advantage_share"] == 0.5  # the advantages of b have the mean 0


def test_single_rollouts_have_no_rloo_variance() -> None:
    alone = [group("a", [1.0]), group("b", [0.0])]
    scaled = whitened(rewards_of(alone))
    chosen = StepBaselines(scaled.baselines, "batch", scales=scaled.scales)
    variance = sampling_metrics(alone, alone, chosen, 4)["advantage_variance"]
    assert variance == {"used": 0.25, "none": 0.5, "rloo": None, "batch_mean": 1.0, "by_domain": {}}
