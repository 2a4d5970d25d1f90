"""The arithmetic of a step, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from poise.algorithms.group_baselines import group_mean, whitened
from poise.orchestrator.sampling.step_arithmetic import (
    ScoredGroup,
    centred,
    choose_baselines,
    labelled_groups,
    left_to_critic,
    rewards_of,
    training_batch,
)
from poise.orchestrator.step_metrics import predictions, step_numbers
from poise_client.types import Features, Group, GroupBaselines, Rollout, RolloutId, VersionSpan


def group(name: str, rewards: list[float], version: int = 3) -> ScoredGroup:
    def rollout(index: int) -> Rollout:
        tokens = np.arange(index + 1, dtype=np.int32)
        return Rollout(
            id=RolloutId("run", 7, name, index),
            prompt_token_ids=np.array([1, 2], np.int32),
            token_ids=tokens,
            logprobs=-tokens.astype(np.float32),
            features=Features(np.full(2, index, np.float32), np.zeros(2, np.float32)),
            version_spans=(VersionSpan(0, index + 1, version),),
            finish_reason="stop",
            text="",
        )

    rollouts = tuple(rollout(index) for index in range(len(rewards)))
    return ScoredGroup(Group(name, rollouts), "d", np.array(rewards, np.float32))


SCORED = [group("a", [1.0, 0.0]), group("b", [1.0, 1.0])]


def answer(name: str, values: list[float] | None) -> GroupBaselines:
    if values is None:
        return GroupBaselines(name, 0, None, None)
    return GroupBaselines(name, 5, np.array(values, np.float32), np.array(values[::-1], np.float32))


def test_questions_carry_the_rewards() -> None:
    asked = labelled_groups(SCORED)
    assert [(item.group_id, item.domain) for item in asked] == [("a", "d"), ("b", "d")]
    assert [item.rewards.tolist() for item in asked] == [[1.0, 0.0], [1.0, 1.0]]


def test_without_a_probe_the_baseline_is_the_siblings_or_the_other_prompts_mean() -> None:
    rloo = choose_baselines(SCORED, [answer("a", None), answer("b", None)], "rloo")
    assert [b.tolist() for b in rloo.baselines] == [[0.0, 1.0], [1.0, 1.0]]
    mean = choose_baselines(SCORED, [answer("a", None), answer("b", None)], "batch_mean")
    assert [b.tolist() for b in mean.baselines] == [[1.0, 1.0], [0.5, 0.5]]


QUALITY = ("pearson", "brier", "brier_skill", "bias")


def test_a_probe_is_preferred_where_there_is_one() -> None:
    chosen = choose_baselines(SCORED, [answer("a", [0.25, 0.75]), answer("b", None)], "rloo")
    assert [b.tolist() for b in chosen.baselines] == [[0.75, 0.25], [1.0, 1.0]]
    assert predictions(SCORED, chosen) == ([0.25, 0.75], [0.0, 1.0], ["d", "d"])
    numbers = step_numbers(SCORED, SCORED, chosen, 4)
    assert numbers["baseline"]["source"] == "mixed"
    assert numbers["baseline"]["probe_share"] == 0.5
    assert numbers["baseline"]["brier"] == pytest.approx((0.25**2 + 0.25**2) / 2)
    assert numbers["baseline"]["bias"] == pytest.approx(0)
    assert numbers["baseline"]["by_domain"] == {"d": {k: numbers["baseline"][k] for k in QUALITY}}
    assert numbers["advantage_variance"]["used"] == pytest.approx((0.25**2 + 0.25**2) / 4)
    assert numbers["advantage_variance"]["none"] == pytest.approx(3 / 4)
    assert numbers["advantage_variance"]["rloo"] == pytest.approx(2 / 4)
    assert numbers["advantage_variance"]["batch_mean"] == pytest.approx((0 + 1 + 0.25 + 0.25) / 4)
    variance = dict(numbers["advantage_variance"])
    assert variance.pop("by_domain") == {"d": variance}
    assert numbers["reward"] == {"mean": 0.75, "by_domain": {"d": 0.75}}
    assert numbers["response_tokens"] == {"mean": 1.5, "max": 2, "total": 6}
    assert numbers["staleness"] == {"mean": 1.0, "max": 1}


def test_the_batch_carries_reward_minus_baseline_and_nothing_whitened() -> None:
    chosen = choose_baselines(SCORED, [answer("a", [0.25, 0.75]), answer("b", [0.5, 1.0])], "rloo")
    batch = training_batch("run", 7, SCORED, chosen, 0.8)
    assert (batch.batch_id, batch.step, batch.temperature) == ("step-00000007", 7, 0.8)
    assert [rollout.advantage for rollout in batch.rollouts] == [0.25, -0.25, 0.0, 0.5]
    assert [rollout.id.group_id for rollout in batch.rollouts] == ["a", "a", "b", "b"]


def test_labels_carry_features_and_rewards_of_whole_groups() -> None:
    labels = labelled_groups(SCORED)
    assert [(label.group_id, label.domain, label.rewards.tolist()) for label in labels] == [
        ("a", "d", [1.0, 0.0]),
        ("b", "d", [1.0, 1.0]),
    ]
    assert labels[0].rollouts[1].features.prompt_hidden.tolist() == [1.0, 1.0]


def test_a_rivals_advantages_reach_the_batch_divided() -> None:
    chosen = centred(SCORED, "group", group_mean(rewards_of(SCORED), divide=True))
    batch = training_batch("run", 7, SCORED, chosen, 1.0)
    assert [rollout.advantage for rollout in batch.rollouts] == pytest.approx([0.7070, -0.7070, 0, 0], abs=1e-4)
    assert [rollout.reward for rollout in batch.rollouts] == [None] * 4
    numbers = step_numbers(SCORED, SCORED, chosen, 4)
    assert numbers["baseline"]["source"] == "group"
    assert numbers["advantage_variance"]["used"] == pytest.approx(2 * 0.25 / 4)
    assert numbers["zero_advantage_share"] == 0.5


def test_to_a_critic_go_rewards_and_no_advantages() -> None:
    chosen = left_to_critic(SCORED)
    batch = training_batch("run", 7, SCORED, chosen, 1.0)
    assert [rollout.reward for rollout in batch.rollouts] == [1, 0, 1, 1]
    assert [rollout.advantage for rollout in batch.rollouts] == [0, 0, 0, 0]
    numbers = step_numbers(SCORED, SCORED, chosen, 4)
    assert numbers["advantage_variance"]["used"] is None
    assert numbers["zero_advantage_share"] is None


def test_what_was_sampled_in_vain_counts_as_sampled() -> None:
    kept = SCORED[:1]
    numbers = step_numbers(SCORED, kept, centred(kept, "group", group_mean(rewards_of(kept), divide=True)), 4)
    assert numbers["reward"]["mean"] == 0.75
    assert numbers["response_tokens"]["total"] == 6
    assert (numbers["num_groups"], numbers["num_kept_groups"], numbers["num_rollouts"]) == (2, 1, 4)
    assert numbers["advantage_variance"]["none"] == 0.5


def test_penalties_are_added_before_the_baseline_is_taken_away() -> None:
    penalties = [np.array([-0.5, 0], np.float32), np.array([0, -1], np.float32)]
    shaped = [item.rewards + penalty for item, penalty in zip(SCORED, penalties, strict=True)]
    chosen = centred(SCORED, "group", group_mean(shaped, divide=False), penalties)
    assert [chosen.advantages(i, item.rewards).tolist() for i, item in enumerate(SCORED)] == [
        [0.25, -0.25],
        [0.5, -0.5],
    ]


def test_a_rollout_without_siblings_is_compared_with_other_prompts_alone() -> None:
    alone = [group("a", [1.0]), group("b", [0.0])]
    variance = step_numbers(alone, alone, centred(alone, "batch", whitened(rewards_of(alone))), 4)["advantage_variance"]
    assert variance == {"used": 0.25, "none": 0.5, "rloo": None, "batch_mean": 1.0, "by_domain": {}}
