"""Advantages of each algorithm on one step against numbers calculated by hand, with edge cases."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from poise.algorithms.baselines import BIASES
from poise.algorithms.group_baselines import EPSILON
from poise.orchestrator.algorithms.algorithm import AlgorithmOptions
from poise.orchestrator.algorithms.poise import PoiseOptions
from poise.orchestrator.algorithms.registry import AlgorithmConfig, AnyOptions
from poise.orchestrator.algorithms.spo import KEY_CHARS
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.sampling.scored_groups import ScoredGroup
from poise.orchestrator.tasks.config import DigitsTask
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Features, Group, GroupBaselines, Rollout, RolloutId, VersionSpan

MAX_TOKENS = 8

NAMES = {"poise", "rloo", "grpo", "dr_grpo", "dapo", "opo", "reinforce_pp", "spo", "ppo", "none", "batch_mean"}


def options(value: Any) -> AlgorithmOptions:
    adapter: TypeAdapter[AlgorithmOptions] = TypeAdapter(AlgorithmConfig)
    return adapter.validate_python(value)


def scored(prompt: str, rewards: list[float], lengths: list[int]) -> ScoredGroup:
    rollouts = tuple(
        Rollout(
            id=RolloutId("run", 0, prompt, index),
            prompt_token_ids=np.array([1], np.int32),
            token_ids=np.zeros(length, np.int32),
            logprobs=np.zeros(length, np.float32),
            features=Features(np.zeros(2, np.float32), np.zeros(2, np.float32)),
            version_spans=(VersionSpan(0, length, 0),),
            finish_reason="length" if length == MAX_TOKENS else "stop",
            text="",
        )
        for index, length in enumerate(lengths)
    )
    problem = Problem("d", prompt, "", "exact")
    return ScoredGroup(Group(prompt, rollouts), problem, np.array(rewards, np.float32))


STEP = [scored("a", [1, 0, 0, 1], [2, 6, 4, 8]), scored("b", [1, 1, 1, 1], [0, 2, 3, 4]), scored("c", [0, 1], [5, 5])]
"""Of the rollouts of b one is empty; the last of a was truncated."""


async def no_probe() -> list[GroupBaselines]:
    return [GroupBaselines(item.group.group_id, 0, None, None) for item in STEP]


async def advantages_of(value: Any, groups: list[ScoredGroup]) -> list[list[float]]:
    baselines = await options(value).make(MAX_TOKENS).baselines(groups, no_probe)
    return [baselines.advantages(index, item.rewards).tolist() for index, item in enumerate(groups)]


STD, PAIR = (1 / 3) ** 0.5 + EPSILON, 0.5**0.5 + EPSILON
WHITE = (0.7 * 0.3) ** 0.5 + EPSILON
A, B, C = [1, -1, -1, 1], [0, 0, 0, 0], [-1, 1]


def times(signs: list[int], size: float) -> list[float]:
    return [sign * size for sign in signs]


# DAPO with a margin of 4 of 8 tokens: 6 tokens cost 0.5, 8 cost 1: rewards of a 1, -0.5, 0, 0; mean 0.125,
# squares 0.765625 + 0.390625 + 2 * 0.015625 = 1.1875, with n - 1 = 3. Of c, 5 tokens cost 0.25 each.
SHAPED = (1.1875 / 3) ** 0.5 + EPSILON
# SPO, nobody seen before: v = 0.5; what is left is 7 times 0.5 and 3 times -0.5: mean 0.2, deviation 0.458.
EXPECTED: list[tuple[Any, list[list[float]]]] = [
    ("poise", [times(A, 2 / 3), B, C]),  # its bootstrap: the siblings
    ({"kind": "poise", "bootstrap": "batch_mean"}, [[1 / 6, -5 / 6, -5 / 6, 1 / 6], [0.5] * 4, [-0.75, 0.25]]),
    ("rloo", [times(A, 2 / 3), B, C]),
    ("grpo", [times(A, 0.5 / STD), B, times(C, 0.5 / PAIR)]),
    ({"kind": "grpo", "std_normalization": False}, [times(A, 0.5), B, times(C, 0.5)]),
    ("dr_grpo", [times(A, 0.5), B, times(C, 0.5)]),
    ("dapo", [times(A, 0.5 / STD), B, times(C, 0.5 / PAIR)]),
    ({"kind": "dapo", "std_normalization": False}, [times(A, 0.5), B, times(C, 0.5)]),
    (
        {"kind": "dapo", "overlong_margin_tokens": 4},
        [[0.875 / SHAPED, -0.625 / SHAPED, -0.125 / SHAPED, -0.125 / SHAPED], B, times(C, 0.5 / PAIR)],
    ),
    ("opo", [times(A, 0.5), B, times(C, 0.5)]),
    (
        "reinforce_pp",
        [[0.3 / WHITE, -0.7 / WHITE, -0.7 / WHITE, 0.3 / WHITE], [0.3 / WHITE] * 4, [-0.7 / WHITE, 0.3 / WHITE]],
    ),
    ("spo", [[0.3 / WHITE, -0.7 / WHITE, -0.7 / WHITE, 0.3 / WHITE], [0.3 / WHITE] * 4, [-0.7 / WHITE, 0.3 / WHITE]]),
    ("none", [[1, 0, 0, 1], [1] * 4, [0, 1]]),
    ("batch_mean", [[1 / 6, -5 / 6, -5 / 6, 1 / 6], [0.5] * 4, [-0.75, 0.25]]),
    ({"kind": "spo", "batch_normalization": False}, [times(A, 0.5), [0.5] * 4, times(C, 0.5)]),
]


@pytest.mark.parametrize(("value", "expected"), EXPECTED)
async def test_advantages_equal_those_calculated_by_hand(value: Any, expected: list[list[float]]) -> None:
    for mine, theirs in zip(await advantages_of(value, STEP), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("reward", [0, 1])
@pytest.mark.parametrize("name", sorted(NAMES - {"ppo", "none"}))
async def test_equal_rewards_give_zero_advantages(name: str, reward: float) -> None:
    equal = [scored("a", [reward] * 3, [1, 0, 5]), scored("b", [reward] * 2, [2, 2])]
    value = {"kind": name, "half_life_visits": 1} if name == "spo" else name

    async def ask() -> list[GroupBaselines]:
        return [GroupBaselines(item.group.group_id, 0, None, None) for item in equal]

    baselines = await options(value).make(MAX_TOKENS).baselines(equal, ask)
    for advantages in [baselines.advantages(index, item.rewards).tolist() for index, item in enumerate(equal)]:
        assert advantages == pytest.approx([0] * len(advantages), abs=1e-6)


async def test_ppo_leaves_the_advantages_to_the_critic() -> None:
    baselines = await options("ppo").make(MAX_TOKENS).baselines(STEP, no_probe)
    assert baselines.uses_critic
    assert options("ppo").learner_settings(MAX_TOKENS)["critic"] == {}


@pytest.mark.parametrize(
    ("name", "least"),
    [("spo", 1), ("reinforce_pp", 1), ("ppo", 1), ("none", 1), ("batch_mean", 1), ("rloo", 2), ("poise", 2)],
)
def test_algorithms_have_a_minimum_number_of_rollouts(name: str, least: int) -> None:
    assert options(name).min_rollouts == least <= options(name).default_rollouts


async def test_single_rollouts_suffice_without_sibling_baselines() -> None:
    singles = [scored("a", [1], [2]), scored("b", [0], [0])]
    for name in ("spo", "reinforce_pp"):
        assert await advantages_of(name, singles) == [
            pytest.approx([0.5 / (0.5 + EPSILON)], abs=1e-6),
            pytest.approx([-0.5 / (0.5 + EPSILON)], abs=1e-6),
        ]


async def test_controls_work_with_single_rollouts() -> None:
    singles = [scored("a", [1], [2]), scored("b", [0.5], [3]), scored("c", [0], [1])]
    assert await advantages_of("none", singles) == [[1], [0.5], [0]]
    assert await advantages_of("batch_mean", singles) == [[0.75], [0], [-0.75]]
    assert await advantages_of("batch_mean", singles[:1]) == [[1]]  # generation rejected all other prompts


@pytest.mark.parametrize(
    ("value", "biases"),
    [
        *[(name, ()) for name in ("poise", "rloo", "none", "batch_mean")],
        ("grpo", ("own_reward", "standard_deviation")),
        ({"kind": "grpo", "std_normalization": False}, ("own_reward",)),
        ("dr_grpo", ("own_reward",)),
        ({"kind": "dapo", "std_normalization": False}, ("own_reward", "dropped_groups")),
        ("opo", ("own_reward",)),
        ("reinforce_pp", ("own_reward", "standard_deviation")),
        ("spo", ("own_reward", "standard_deviation")),
        ({"kind": "spo", "batch_normalization": False}, ()),
        ("ppo", ("gae",)),
    ],
)
def test_biased_algorithms_name_their_biases(value: Any, biases: tuple[str, ...]) -> None:
    assert options(value).biases == biases
    assert set(biases) <= BIASES.keys()


@pytest.mark.parametrize(
    ("value", "estimator", "bootstrap", "rollouts"),
    [
        ("poise", "probe", "rloo", 2),
        ({"kind": "poise", "bootstrap": "none"}, "probe", "none", 2),
        *[({"kind": "poise", "estimator": name}, name, "none", 1) for name in ("score_mean", "score_prompt", "auto")],
        ({"kind": "poise", "estimator": "score_prefix", "bootstrap": "rloo"}, "score_prefix", "rloo", 2),
    ],
)
def test_poise_defaults_follow_the_estimator(value: Any, estimator: str, bootstrap: str, rollouts: int) -> None:
    chosen = options(value)
    assert isinstance(chosen, PoiseOptions)
    assert (chosen.bootstrap_baseline, chosen.min_rollouts, chosen.default_rollouts) == (bootstrap, rollouts, rollouts)
    assert chosen.value_settings() == {"estimator": estimator}


@pytest.mark.parametrize(
    ("value", "rollouts", "prompts", "message"),
    [
        ("poise", 1, 8, "algorithm.estimator: probe needs at least 2"),
        (
            {"estimator": "score_mean", "bootstrap": "rloo"},
            1,
            8,
            "algorithm.bootstrap: rloo needs at least 2, .*: none",
        ),
        ({"bootstrap": "batch_mean"}, 2, 1, "prompts_per_step: is 1; algorithm.bootstrap: batch_mean .*: rloo"),
        ({"estimator": "auto", "bootstrap": "batch_mean"}, 1, 1, "batch_mean needs at least 2, .*: none"),
        ({"kind": "batch_mean"}, 1, 1, "prompts_per_step: is 1; algorithm batch_mean needs at least 2"),
        ("grpo", 1, 8, "rollouts_per_prompt: is 1; algorithm grpo needs at least 2"),
    ],
)
def test_options_that_need_more_rollouts_are_rejected(value: Any, rollouts: int, prompts: int, message: str) -> None:
    algorithm = value if isinstance(value, str) else {"kind": "poise"} | value
    with pytest.raises(ValueError, match=message):
        OrchestratorConfig(
            run_dir=Path("run"),
            tasks=(DigitsTask(),),
            algorithm=algorithm,
            rollouts_per_prompt=rollouts,
            prompts_per_step=prompts,
        )


async def test_without_bootstrap_the_advantage_is_the_reward() -> None:
    score = {"kind": "poise", "estimator": "score_prefix"}
    assert await advantages_of(score, STEP) == [item.rewards.tolist() for item in STEP]


def test_dapo_keeps_only_groups_of_unequal_rewards() -> None:
    dapo = options({"kind": "dapo", "max_draws": 3}).make(MAX_TOKENS)
    assert [dapo.keeps(group) for group in STEP] == [True, False, True]
    assert dapo.max_draws == 3
    assert options("grpo").make(MAX_TOKENS).keeps(STEP[1])


async def test_spo_uses_only_rewards_of_earlier_steps() -> None:
    spo = options({"kind": "spo", "half_life_visits": 1, "prior_strength": 2, "batch_normalization": False}).make(
        MAX_TOKENS
    )
    groups = [scored("a", [1], [2]), scored("b", [0], [2])]

    async def values() -> list[float]:
        baselines = await spo.baselines(groups, no_probe)
        return [float(b[0]) for b in baselines.baselines]

    assert await values() == [0.5, 0.5]
    state = spo.step_state(groups)
    assert await values() == [0.5, 0.5]  # not before it is loaded
    spo.load_step_state(state)
    # α = 1, β = 1 and half of both: 0.5 + 1 of 0.5 + 1 + 0.5.
    assert await values() == pytest.approx([0.75, 0.25])
    spo.load_step_state(spo.step_state(groups))
    # α = 0.75 + 1, β = 0.25.
    assert await values() == pytest.approx([0.875, 0.125])


async def test_spo_counts_a_repeated_prompt_as_two_visits() -> None:
    spo = options({"kind": "spo", "half_life_visits": 1, "prior_strength": 2}).make(MAX_TOKENS)
    group = scored("a", [1], [2])
    state = spo.step_state([group, group])
    assert state["trackers"] == {group.problem.prompt_key[:KEY_CHARS]: [1.75, 0.25]}


def test_algorithms_are_selected_by_name() -> None:
    assert {kind.model_fields["kind"].default for kind in get_args(AnyOptions)} == NAMES
    for name in NAMES:
        assert options(name) == options({"kind": name})
    with pytest.raises(ValueError, match="'grop' found using 'kind' does not match"):
        options("grop")
    with pytest.raises(ValueError, match="max_draws"):
        options({"kind": "grpo", "max_draws": 2})


async def test_the_documented_example_works() -> None:
    document = Path(__file__).parents[4] / "docs"
    example: dict[str, Any] = runpy.run_path(str(document / "best_of.py"))
    adapter: TypeAdapter[AlgorithmOptions] = TypeAdapter(example["BestOfOptions"])
    baselines = await adapter.validate_python({"kind": "best_of", "margin": 0.25}).make(8).baselines(STEP, no_probe)
    assert baselines.advantages(0, STEP[0].rewards).tolist() == [0.25, -0.75, -0.75, 0.25]
