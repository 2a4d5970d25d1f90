"""A test that the gradient with cross-rollout baselines is unbiased, with the power to detect a biased one.

A softmax policy over a few answers to a few prompts, small enough for the exact gradient. Rollouts carry features that
tell both prompt and answer; a probe is fitted on earlier rollouts. The estimator's mean over many groups must match the
exact gradient within its own error, and a baseline that looks at its own rollout must be depths apart. The baselines of
the service's own way, from labels by its fitter to its answers, are put to the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.support.reference_probe import ReferenceFitter

from poise.algorithms.baselines import advantages, batch_mean, mean_of_others
from poise.value.estimators.features import NUM_ENTROPIES, FeatureMatrix, GroupQuery, Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.probe.model import ProbeInput
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.state import ValueState

NUM_PROMPTS, NUM_ANSWERS, WIDTH, NUM_GROUPS = 4, 5, 8, 100_000
SIBLINGS = 2
NUM_QUERIED = 30_000
"""Number of groups whose baselines are requested from the service."""

PAPERS: tuple[ProbeInput, ...] = ("prompt_hidden", "response_hidden", "entropy")

Array = NDArray[np.float64]
Baseline = Callable[["Rollouts"], Array]


class World:
    """Policy, rewards and features, all fixed."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.random = random
        logits = random.normal(size=(NUM_PROMPTS, NUM_ANSWERS))
        self.policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        self.reward_chance = random.uniform(size=(NUM_PROMPTS, NUM_ANSWERS))
        self.prompt_states = random.normal(size=(NUM_PROMPTS, WIDTH))
        self.answer_states = random.normal(size=(NUM_PROMPTS, NUM_ANSWERS, WIDTH))
        self.answer_entropies = random.uniform(size=(NUM_PROMPTS, NUM_ANSWERS))

    def exact_gradient(self) -> Array:
        """Of the expected reward, by the logits: p(x)·π(y|x)·(r(x, y) − Σ_y' π(y'|x)·r(x, y'))."""
        expected = (self.policy * self.reward_chance).sum(1, keepdims=True)
        return self.policy * (self.reward_chance - expected) / NUM_PROMPTS

    def sample(self, num_groups: int) -> Rollouts:
        prompts = self.random.integers(NUM_PROMPTS, size=num_groups)
        draws = self.random.random((num_groups, SIBLINGS, 1))
        answers = (draws > self.policy.cumsum(1)[prompts][:, None, :-1]).sum(-1)
        chances = self.reward_chance[prompts[:, None], answers]
        rewards = (self.random.random(chances.shape) < chances).astype(np.float32)
        return Rollouts(self, prompts, answers, rewards)


class Rollouts:
    """Groups of siblings: prompts [G], answers and rewards [G, n]."""

    def __init__(self, world: World, prompts: NDArray[np.int64], answers: NDArray[np.int64], rewards: Array) -> None:
        self.world, self.prompts, self.answers, self.rewards = world, prompts, answers, rewards

    def rows(self) -> FeatureMatrix:
        prompts, answers = np.repeat(self.prompts, SIBLINGS), self.answers.reshape(-1)
        entropies = np.zeros((len(prompts), NUM_ENTROPIES), np.float32)
        entropies[:, 0] = self.world.answer_entropies[prompts, answers]
        return FeatureMatrix(
            self.world.prompt_states[prompts].astype(np.float32),
            self.world.answer_states[prompts, answers].astype(np.float32),
            entropies,
        )

    def first(self, number: int) -> Rollouts:
        return Rollouts(self.world, self.prompts[:number], self.answers[:number], self.rewards[:number])

    def groups(self) -> list[FeatureMatrix]:
        whole = replace(self.rows(), rewards=self.rewards.reshape(-1).astype(np.float32))
        return [whole.part(start, start + SIBLINGS) for start in range(0, len(whole), SIBLINGS)]

    def others(self, per_rollout: Array) -> Array:
        return np.stack([mean_of_others(row) for row in per_rollout.astype(np.float32)])

    def gradients(self, baselines: Array) -> Array:
        """One estimate a group, [G, prompts x answers]: the mean over its siblings of A·∇log π."""
        weights = advantages(self.rewards, baselines.astype(np.float32)) / SIBLINGS
        score = np.eye(NUM_ANSWERS)[self.answers] - self.world.policy[self.prompts][:, None]
        own = (weights[:, :, None] * score).sum(1)
        whole = np.zeros((len(self.prompts), NUM_PROMPTS, NUM_ANSWERS))
        whole[np.arange(len(self.prompts)), self.prompts] = own
        return whole.reshape(len(self.prompts), -1)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def probe(world: World):
    earlier = world.sample(2000)
    targets = earlier.others(earlier.rewards).reshape(-1)
    return ReferenceFitter(PAPERS, 4, 8, 1.0).fit(earlier.rows(), targets)


@pytest.fixture(scope="module")
def groups(world: World) -> Rollouts:
    return world.sample(NUM_GROUPS)


def values(probe, groups: Rollouts) -> Array:
    return probe.predict(groups.rows()).reshape(-1, SIBLINGS)


def p_value(groups: Rollouts, baselines: Array) -> float:
    """Return the p-value of the distance to the exact gradient: Hotelling's T², practically χ² here."""
    estimates = groups.gradients(baselines)
    difference = estimates.mean(0) - groups.world.exact_gradient().reshape(-1)
    covariance = np.cov(estimates.T) / len(estimates)
    distance = difference @ np.linalg.pinv(covariance, rcond=1e-10, hermitian=True) @ difference
    return float(stats.chi2.sf(distance, NUM_PROMPTS * (NUM_ANSWERS - 1)))


def test_the_siblings_probe_value_keeps_the_gradient_unbiased(probe, groups) -> None:
    assert p_value(groups, groups.others(values(probe, groups))) > 1e-3


def test_the_siblings_reward_keeps_the_gradient_unbiased(probe, groups) -> None:
    """b_i = mean over j ≠ i of g(z_j, r_j): (z_j, r_j) is independent of y_i, given the prompt, like z_j."""
    informed = values(probe, groups) + 0.4 * (groups.rewards - 0.5)
    assert p_value(groups, groups.others(informed)) > 1e-3


def test_the_bootstrap_baselines_keep_the_gradient_unbiased(groups) -> None:
    assert p_value(groups, groups.others(groups.rewards)) > 1e-3
    few = groups.first(20_000)
    assert p_value(few, np.stack(batch_mean([*few.rewards]))) > 1e-3


def test_a_baseline_from_the_own_reward_is_detected_as_biased(probe, groups) -> None:
    leaky = 0.9 * groups.others(values(probe, groups)) + 0.1 * groups.rewards
    assert p_value(groups, leaky) < 1e-9


def test_a_baseline_from_the_own_features_is_detected_as_biased(probe, groups) -> None:
    assert p_value(groups, values(probe, groups)) < 1e-9


class Served:
    """Return values and baselines of the first groups, [G, n], from a service that learnt its own labels."""

    def __init__(self, config, world: World, groups: Rollouts, inputs: tuple[ProbeInput, ...]) -> None:
        state = ValueState(config(probe={"inputs": inputs, "window_rows": 4000}))
        earlier = world.sample(2000)
        for number, rows in enumerate(earlier.groups()):
            label = replace(rows, rewards=None)
            state.learn(Label("past", number, "g", "default", label, rows.rewards))
        fitter = IncrementalFitter(inputs, 4, 8, 1.0)
        window = state.domains["default"].window
        state.install("default", VersionedProbe(1, fitter.fit(window.groups), window.num_added, 0.0))
        self.groups = groups.first(NUM_QUERIED)
        requested = [GroupQuery("g", "default", rows) for rows in self.groups.groups()]
        answers = state.estimate("run", 0, requested)
        self.values = np.stack([answer.values for answer in answers])
        self.baselines = np.stack([answer.baselines for answer in answers])


@pytest.fixture(params=[PAPERS, (*PAPERS, "sibling_reward")], ids=["poise", "poise + sibling_reward"])
def served(request, config, groups) -> Served:
    return Served(config, World(), groups, request.param)


def test_the_baselines_keep_the_gradient_unbiased(served) -> None:
    assert p_value(served.groups, served.baselines) > 1e-3


def test_own_values_as_baselines_bias_the_gradient(served) -> None:
    """With `sibling_reward` the own value depends on the own reward; the test detects either, and a tenth of it."""
    assert p_value(served.groups, served.values) < 1e-9
    assert p_value(served.groups, 0.9 * served.baselines + 0.1 * served.groups.rewards) < 1e-9


def test_the_siblings_reward_lowers_the_variance_further(config, groups) -> None:
    def variance(inputs: tuple[ProbeInput, ...]) -> float:
        served = Served(config, World(), groups, inputs)
        return float(np.mean((served.groups.rewards - served.baselines) ** 2))

    assert variance(("sibling_reward", "entropy")) < 0.995 * variance(("entropy",))


def test_the_probe_reduces_the_variance(probe, groups) -> None:
    """The variance of the advantages is lower than without a baseline and with RLOO."""

    def variance(baselines: Array) -> float:
        return float(np.mean((groups.rewards - baselines) ** 2))

    used = variance(groups.others(values(probe, groups)))
    assert used < 0.8 * variance(groups.others(groups.rewards))
    assert used < 0.8 * variance(np.zeros_like(groups.rewards))
