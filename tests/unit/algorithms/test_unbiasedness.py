"""Every baseline keeps the gradient unbiased, and each kind of leak is detected.

The expectations are exact: they sum over all responses of a small policy instead of sampling them. So the smallest bias
that these tests detect is `TOLERANCE`, relative to the gradient's largest element; the leaks cause over 1000 times as
much. The true gradient comes from differences of the expected reward, without scores or baselines.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support import reference_regression
from tests.support.reference_regression import prefix_inputs

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.algorithms.group_baselines import group_mean, rloo
from poise.algorithms.score_weighted import PREFIX_INPUTS, squared_score_norms
from poise.value.app import make_fitter
from poise.value.config import ValueConfig
from poise.value.estimators.features import NUM_ENTROPIES, FeatureMatrix, GroupQuery, Label, TokenStatistics
from poise.value.estimators.probe.model import FittedProbe

PROMPTS, LENGTH, VOCABULARY = 2, 3, 3
TOLERANCE = 1e-6
RESPONSES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


@dataclass(frozen=True)
class Sample:
    """A rollout of the small policy."""

    prompt: int
    tokens: np.ndarray
    reward: float
    logprobs: np.ndarray
    entropies: np.ndarray
    squares: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        return squared_score_norms(self.logprobs, self.squares)

    @property
    def inputs(self) -> np.ndarray:
        return prefix_inputs(self.logprobs, self.entropies, self.squares)


Baselines = Callable[[Sequence[Sample]], list[np.ndarray]]
"""Returns the baselines of a step's rollouts: one number, or [LENGTH], for each."""


class Softmax:
    """A policy whose logits depend on the prompt, the position and the last token; rewards are a fixed table."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.logits = random.normal(size=(PROMPTS, LENGTH, VOCABULARY + 1, VOCABULARY))
        self.rewards = random.choice([0.0, 0.5, 1.0], size=(PROMPTS, len(RESPONSES)), p=[0.5, 0.2, 0.3])

    def distributions(self, logits: np.ndarray, prompt: int, tokens: np.ndarray) -> np.ndarray:
        rows = np.stack([logits[prompt, t, tokens[t - 1] if t else VOCABULARY] for t in range(LENGTH)])
        exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def expected_reward(self, logits: np.ndarray) -> float:
        total = 0.0
        for prompt, (index, tokens) in itertools.product(range(PROMPTS), enumerate(RESPONSES)):
            policy = self.distributions(logits, prompt, tokens)
            total += policy[np.arange(LENGTH), tokens].prod() * self.rewards[prompt, index]
        return total / PROMPTS

    def true_gradient(self) -> np.ndarray:
        gradient, width = np.zeros_like(self.logits), 1e-4
        for index in np.ndindex(*self.logits.shape):
            up, down = self.logits.copy(), self.logits.copy()
            up[index] += width
            down[index] -= width
            gradient[index] = (self.expected_reward(up) - self.expected_reward(down)) / (2 * width)
        return gradient

    def sample(self, prompt: int, response: int) -> Sample:
        tokens = RESPONSES[response]
        policy = self.distributions(self.logits, prompt, tokens)
        return Sample(
            prompt,
            tokens,
            float(self.rewards[prompt, response]),
            np.log(policy[np.arange(LENGTH), tokens]).astype(np.float32),
            -(policy * np.log(policy)).sum(axis=1).astype(np.float32),
            (policy**2).sum(axis=1).astype(np.float32),
        )

    def expected_gradient(self, baselines: Baselines, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the exact expectation of the estimate, over all outcomes of steps of these prompts."""
        samples = [[self.sample(prompt, index) for index in range(len(RESPONSES))] for prompt in range(PROMPTS)]
        weights = np.zeros((PROMPTS, len(RESPONSES), LENGTH))
        for step in prompts:
            for responses in itertools.product(range(len(RESPONSES)), repeat=len(step)):
                outcome = [samples[prompt][index] for prompt, index in zip(step, responses, strict=True)]
                probability = np.exp(sum(float(one.logprobs.sum(dtype=np.float64)) for one in outcome))
                for one, index, baseline in zip(outcome, responses, baselines(outcome), strict=True):
                    share = probability / (len(step) * len(prompts))
                    weights[one.prompt, index] += share * (one.reward - baseline)
        gradient = np.zeros_like(self.logits)
        for prompt, (index, tokens) in itertools.product(range(PROMPTS), enumerate(RESPONSES)):
            policy = self.distributions(self.logits, prompt, tokens)
            for t in range(LENGTH):
                score = np.eye(VOCABULARY)[tokens[t]] - policy[t]
                gradient[prompt, t, tokens[t - 1] if t else VOCABULARY] += weights[prompt, index, t] * score
        return gradient

    def bias(self, baselines: Baselines, prompts: Sequence[Sequence[int]]) -> float:
        """Return the largest error of the expected gradient, relative to the true one."""
        true = self.true_gradient()
        return float(np.abs(self.expected_gradient(baselines, prompts) - true).max() / np.abs(true).max())

    def earlier_samples(self, num_samples: int = 40) -> list[Sample]:
        drawn = np.random.default_rng(99).integers((PROMPTS, len(RESPONSES)), size=(num_samples, 2))
        return [self.sample(int(prompt), int(index)) for prompt, index in drawn]


ALONE = [(0,), (1,)]
"""Steps with one rollout of one prompt."""
TOGETHER = [(0, 1)]
"""A step with one rollout of each prompt."""
SIBLINGS = [(0, 0), (1, 1)]
"""Steps with two rollouts of one prompt."""


def prompt_features(one: Sample) -> FeatureMatrix:
    """The prompt's hidden state, which tells the prompts apart."""
    prompt_hidden = np.array([[one.prompt, 1.0, 0.5 * one.prompt]], np.float32)
    return FeatureMatrix(prompt_hidden, np.zeros((1, 0), np.float32), np.zeros((1, NUM_ENTROPIES), np.float32))


def rewards(step: Sequence[Sample]) -> list[np.ndarray]:
    return [np.array([one.reward], np.float32) for one in step]


def no_baseline(step: Sequence[Sample]) -> list[np.ndarray]:
    return [np.zeros(LENGTH) for _ in step]


def mean_of_other_prompts(step: Sequence[Sample]) -> list[np.ndarray]:
    return batch_mean(rewards(step))


def mean_of_siblings(step: Sequence[Sample]) -> list[np.ndarray]:
    return list(rloo([np.array([one.reward for one in step], np.float32)]).baselines[0])


def features(step: Sequence[Sample]) -> FeatureMatrix:
    """Features that identify each response, with its reward."""
    tokens = np.array([one.tokens for one in step], np.float32)
    entropies = np.zeros((len(step), NUM_ENTROPIES), np.float32)
    entropies[:, 0] = [one.entropies.mean() for one in step]
    return FeatureMatrix(tokens * 0 + step[0].prompt, tokens, entropies, np.concatenate(rewards(step)))


PROBE = FittedProbe(
    {
        "prompt_hidden": np.array([0.1, -0.05, 0.02]),
        "response_hidden": np.array([0.07, -0.11, 0.05]),
        "entropy": np.array([0.2, 0.0, 0.0]),
        "sibling_reward": np.array([0.4]),
    },
    0.3,
)


def probe(step: Sequence[Sample]) -> list[np.ndarray]:
    return list(mean_of_others(PROBE.predict(features(step))))


def tokens_of(samples: Sequence[Sample]) -> reference_regression.Step:
    return reference_regression.Step(
        np.concatenate([one.inputs for one in samples]),
        np.repeat([one.reward for one in samples], LENGTH),
        np.concatenate([one.weights for one in samples]),
        len(samples),
    )


def late(one: Sample) -> np.ndarray:
    """Each token's inputs as they are one token later, when they depend on the token."""
    inputs = np.concatenate([one.inputs[1:], one.inputs[-1:]])
    inputs[-1, PREFIX_INPUTS.index("previous_logprob")] = one.logprobs[-1]
    return inputs


def a_token_late(policy: Softmax) -> Baselines:
    """Return score-weighted baselines fitted on earlier steps, whose inputs contain the token itself."""
    regression = reference_regression.fit([tokens_of(policy.earlier_samples())], 3.0)
    return lambda step: [np.clip(regression.predict(late(one)), 0, 1) for one in step]


def learnt(policy: Softmax, estimator: str) -> Baselines:
    """Return the baselines of the value service's estimator, fitted on twelve earlier steps."""

    def label(index: int, one: Sample) -> Label:
        reward, name = np.array([one.reward], np.float32), f"g{index}"
        features, prompt_id = prompt_features(one), f"prompt {one.prompt}"
        return Label("run", index // 50, name, "", features, reward, prompt_id, tokens(one)).reduced()

    def query(one: Sample) -> GroupQuery:
        return GroupQuery("g", "", prompt_features(one), tokens(one), f"prompt {one.prompt}")

    config = ValueConfig(state_dir=Path("unused"), estimator=estimator)
    fitted = make_fitter(config, "").fit([label(*each) for each in enumerate(policy.earlier_samples(600))])
    assert fitted.coefficients[1:].any() == (estimator != "score_mean")

    def baselines(step: Sequence[Sample]) -> list[np.ndarray]:
        answers = fitted.answer([query(one) for one in step])
        return [answer.baselines if answer.token_baselines is None else answer.token_baselines[0] for answer in answers]

    return baselines


def tokens(one: Sample) -> TokenStatistics:
    entropies, squares = one.entropies.astype(np.float16), one.squares.astype(np.float16)
    return TokenStatistics(one.logprobs, entropies, squares, (LENGTH,))


def fitted_on_the_step(policy: Softmax) -> Baselines:
    """Return score-weighted means that have learnt the step before they answer."""
    samples = policy.earlier_samples()[:4]

    def baselines(step: Sequence[Sample]) -> list[np.ndarray]:
        mean = reference_regression.fit([tokens_of(samples), tokens_of(step)], None)
        return [mean.predict(one.inputs) for one in step]

    return baselines


def own_reward(step: Sequence[Sample]) -> list[np.ndarray]:
    """The group's mean, which contains the own reward."""
    return list(group_mean([np.array([one.reward for one in step], np.float32)], divide=False).baselines[0])


def probe_with_own_features(step: Sequence[Sample]) -> list[np.ndarray]:
    return list(PROBE.predict(features(step)))


UNBIASED = {
    "none": (lambda policy: no_baseline, ALONE),
    "batch_mean": (lambda policy: mean_of_other_prompts, TOGETHER),
    "rloo": (lambda policy: mean_of_siblings, SIBLINGS),
    "probe": (lambda policy: probe, SIBLINGS),
    "score_mean": (lambda policy: learnt(policy, "score_mean"), ALONE),
    "score_prefix": (lambda policy: learnt(policy, "score_prefix"), ALONE),
    "score_prefix, groups of two": (lambda policy: learnt(policy, "score_prefix"), SIBLINGS),
    "score_prompt": (lambda policy: learnt(policy, "score_prompt"), ALONE),
}

LEAKS = {
    "own reward": (lambda policy: own_reward, SIBLINGS),
    "own features": (lambda policy: probe_with_own_features, SIBLINGS),
    "a token late": (a_token_late, ALONE),
    "fitted on the step": (fitted_on_the_step, ALONE),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", UNBIASED)
def test_expected_gradient_is_the_true_one(name, seed):
    policy = Softmax(seed)
    make, prompts = UNBIASED[name]
    assert policy.bias(make(policy), prompts) < TOLERANCE


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LEAKS)
def test_leak_is_far_above_the_tolerance(name, seed):
    policy = Softmax(seed)
    make, prompts = LEAKS[name]
    assert policy.bias(make(policy), prompts) > 1000 * TOLERANCE
