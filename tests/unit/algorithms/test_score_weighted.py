"""Score-weighted regressions against scikit-learn, and their inputs against the written formulas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.support import reference_regression
from tests.support.reference_regression import Step, prefix_inputs

from poise.algorithms.score_weighted import (
    ALPHAS,
    PREFIX_INPUTS,
    StepFit,
    fit_steps,
    joint_moments,
    packed_moments,
    prompt_trackers,
    squared_score_norms,
    step_moments,
    token_columns,
)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def step(seed: int = 0, size: int = 400) -> Step:
    """Return a step of responses of two tokens."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(size, 3)) * (1.0, 5.0, 0.1) + (0.0, 2.0, -1.0)
    rewards = (random.random(size) < 1 / (1 + np.exp(-inputs[:, 0]))).astype(np.float64)
    return Step(inputs, rewards, random.exponential(size=size).astype(np.float32), size // 2)


def test_norm_is_that_of_the_logit_gradient():
    logits = np.random.default_rng(1).normal(size=(5, 7))
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    tokens = np.array([0, 3, 6, 2, 2])
    expected = ((np.eye(7)[tokens] - policy) ** 2).sum(1)
    logprobs = np.log(policy[np.arange(5), tokens]).astype(np.float32)
    norms = squared_score_norms(logprobs, (policy**2).sum(1).astype(np.float32))
    np.testing.assert_allclose(norms, expected, rtol=1e-5, atol=1e-6)


def test_norm_of_a_certain_token_is_zero():
    assert squared_score_norms(floats(0.0), floats(1.0)) == 0.0
    assert squared_score_norms(floats(0.0), floats(0.9999)) == 0.0


@pytest.mark.parametrize("doubt", [0.3, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("num_others", [1, 3, 1000])
def test_rounding_to_float16_keeps_small_norms(doubt, num_others):
    """A confident token must not gain weight by rounding."""
    policy = np.array([1.0 - doubt, *[doubt / num_others] * num_others])
    squares = floats((policy**2).sum()).astype(np.float16)
    exact = doubt**2 + (policy[1:] ** 2).sum()
    norm = squared_score_norms(np.log(policy[:1]).astype(np.float32), squares)
    assert abs(norm - exact) <= min(2.0**-11, exact) * 1.05


def test_inputs_have_the_written_formulas():
    logprobs, entropies, squares = floats(-1, -3, -2), floats(0.5, 1.5, 0.25), floats(0.3, 0.2, 0.6)
    inputs = dict(zip(PREFIX_INPUTS, prefix_inputs(logprobs, entropies, squares).T, strict=True))
    np.testing.assert_allclose(inputs["logprob_sum"], [0, -1, -4])
    np.testing.assert_allclose(inputs["logprob_min"], [0, -1, -3])
    np.testing.assert_allclose(inputs["probability"], np.exp([0, -1, -4]))
    np.testing.assert_allclose(inputs["probability_min"], np.exp([0, -1, -3]))
    np.testing.assert_allclose(inputs["previous_logprob"], [0, -1, -3])
    np.testing.assert_allclose(inputs["log_position"], np.log([1, 2, 3]))
    np.testing.assert_allclose(inputs["is_first"], [1, 0, 0])
    np.testing.assert_allclose(inputs["entropy_sum"], [0, 0.5, 2.0])
    np.testing.assert_allclose(inputs["surprise"], [0, -0.5, -2.0])
    np.testing.assert_allclose(inputs["entropy"], entropies)
    np.testing.assert_allclose(inputs["sum_squares"], squares, rtol=1e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_short_responses_have_inputs(length):
    none = np.zeros(length, np.float32)
    assert prefix_inputs(none, none, none).shape == (length, len(PREFIX_INPUTS))


@pytest.mark.parametrize("token", range(4))
def test_inputs_do_not_see_their_own_token(token):
    values = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    changed = values.copy()
    changed[0, token:] -= 1.0
    before, after = prefix_inputs(*values), prefix_inputs(*changed)
    np.testing.assert_array_equal(before[: token + 1], after[: token + 1])


def fit_to(steps: Sequence[Step], half_life_steps: float = 40, **options: Any) -> StepFit:
    matrices, numbers = np.stack([step.moments for step in steps]), np.array([step.num_responses for step in steps])
    return fit_steps(matrices, numbers.astype(np.float64), half_life_steps, **options)


@pytest.mark.parametrize("alpha", [None, *ALPHAS, 1000.0])
def test_a_fit_is_scikit_learns(alpha):
    """Weights sum to the number of responses in each step, and halve with age."""
    steps = [step(seed, 300) for seed in range(4)]
    expected = reference_regression.fit(steps, alpha, 10)
    fit = fit_to(steps, 10, penalties=(alpha,))
    np.testing.assert_allclose([fit.intercept, *fit.slopes], [expected.intercept, *expected.slopes], rtol=1e-6)


def test_a_fit_predicts_each_step_from_those_before():
    steps = [step(seed, 50) for seed in range(30)]
    penalties, discount = (None, *ALPHAS), 0.5 ** (1 / 40)
    sums, error, total = np.zeros(len(penalties)), 0.0, 0.0
    for number in range(1, len(steps)):
        own = [reference_regression.fit(steps[:number], alpha).error(steps[number]) for alpha in penalties]
        error, total = discount * error + own[np.argmin(sums)], discount * total + 25
        sums = discount * sums + own
    expected = reference_regression.fit(steps, penalties[np.argmin(sums)])
    fit = fit_to(steps)
    np.testing.assert_allclose([fit.intercept, *fit.slopes], [expected.intercept, *expected.slopes], rtol=1e-6)
    assert fit.error == pytest.approx(error / total)


def test_noise_gets_a_larger_penalty():
    informative = [step(seed, 100) for seed in range(10)]
    noise = [
        each._replace(rewards=np.random.default_rng(seed).permutation(each.rewards))
        for seed, each in enumerate(informative)
    ]
    assert abs(fit_to(informative).slopes[0]) > 5 * abs(fit_to(noise).slopes[0])


def test_an_input_without_variance_gets_no_slope():
    inputs, *others = step()
    inputs[:, 1] = 7.0
    fit = fit_to([Step(inputs, *others)], penalties=(3.0,))
    assert fit.slopes[1] == 0.0
    assert np.isfinite([fit.intercept, *fit.slopes]).all()


def test_without_weight_the_baseline_is_zero():
    nothing = step()._replace(weights=np.zeros(400, np.float32))
    fit = fit_to([nothing, nothing])
    assert (fit.intercept, fit.slopes.any()) == (0.0, False)
    assert np.isnan(fit.error)


def test_a_step_counts_half_after_the_half_life():
    ones, no_rows = np.ones((10, 1)), Step(np.ones((0, 1)), np.ones(0), np.ones(0, np.float32), 0)
    first = Step(ones, np.ones(10), np.full(10, 5, np.float32), 10)
    last = Step(ones, np.zeros(10), np.full(10, 1, np.float32), 10)
    assert fit_to([first, no_rows, last], 2).intercept == pytest.approx(1 / 3)


# Moments of the tokens of whole steps.

LENGTHS = (5, 1, 1500, 8, 3, 0, 40, 2)
STARTS = [0, 3, 4]
"""Steps of three, one and four responses."""


def responses(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return columns, weights and rewards of the tokens of `LENGTHS`."""
    random = np.random.default_rng(seed)
    probs = random.uniform(0.3, 1.0, sum(LENGTHS)).astype(np.float32)
    logprobs, squares = np.log(probs), (probs**2).astype(np.float16)
    columns = token_columns(logprobs, (1 - probs).astype(np.float16), squares, LENGTHS)
    rewards = random.integers(0, 2, len(LENGTHS)).astype(np.float32)
    return columns, squared_score_norms(logprobs, squares).astype(np.float64), rewards


def test_columns_of_many_responses_are_those_of_each():
    columns, _, _ = responses()
    random = np.random.default_rng(0)
    probs = random.uniform(0.3, 1.0, sum(LENGTHS)).astype(np.float32)
    arrays = np.log(probs), (1 - probs).astype(np.float16), (probs**2).astype(np.float16)
    ends = np.cumsum(LENGTHS)[:-1]
    separate = [prefix_inputs(*parts) for parts in zip(*(np.split(array, ends) for array in arrays), strict=True)]
    np.testing.assert_array_equal(np.concatenate(separate).T, columns[1:])


def test_moments_of_steps_are_sums_over_their_tokens():
    columns, weights, rewards = responses()
    matrices = step_moments(packed_moments(columns, weights, LENGTHS), rewards, STARTS)
    token_rewards = np.repeat(rewards, LENGTHS)
    tokens = np.cumsum([0, *LENGTHS])
    for matrix, start, end in zip(matrices, STARTS, [*STARTS[1:], len(LENGTHS)], strict=True):
        part = slice(tokens[start], tokens[end])
        expected = Step(columns[1:, part].T, token_rewards[part], weights[part], end - start)
        np.testing.assert_allclose(matrix, expected.moments, rtol=1e-9, atol=1e-9)


def test_joint_moments_are_those_of_all_inputs():
    columns, weights, rewards = responses()
    prompts = np.random.default_rng(1).normal(size=(len(LENGTHS), 2))
    packed = packed_moments(columns, weights, LENGTHS)
    matrices = step_moments(packed, rewards, STARTS)
    joint = joint_moments(matrices, packed, rewards, STARTS, prompts)
    inputs = np.column_stack([columns[1:].T, np.repeat(prompts, LENGTHS, axis=0)])
    expected = Step(inputs, np.repeat(rewards, LENGTHS), weights, len(LENGTHS))
    np.testing.assert_allclose(joint.sum(axis=0), expected.moments, rtol=1e-9, atol=1e-9)


def test_a_tracker_uses_earlier_steps_only():
    prompts, weights = np.array([0, 1, -1, 0, 1, 0, -1, 2]), np.ones(8)
    rewards = floats(1, 0, 1, 1, 0, 1, 0, 1)
    inputs, now = prompt_trackers(prompts, weights, rewards, STARTS, 40.0)
    assert inputs[:3].tolist() == [0, 0, 0]  # the first step
    assert inputs[3] > 0 > inputs[4]
    assert inputs[6] == inputs[7] == 0  # unknown and new
    assert now[0] > 0 > now[1]
    for row in range(8):
        changed = rewards.copy()
        changed[row:] = 1 - changed[row:]
        step = max(start for start in STARTS if start <= row)
        again, _ = prompt_trackers(prompts, weights, changed, STARTS, 40.0)
        np.testing.assert_array_equal(again[: row + 1][step:], inputs[: row + 1][step:])


def test_a_tracker_is_shrunk_by_one_response():
    _, now = prompt_trackers(np.array([0, 1]), np.array([2.0, 4.0]), floats(1, 0), [0], 40.0)
    mean, shrinkage = 2 / 6, 3.0
    np.testing.assert_allclose(now, [(2 - mean * 2) / (2 + shrinkage), (0 - mean * 4) / (4 + shrinkage)])
