"""Score-weighted baselines against scikit-learn, and their bias on a policy whose gradient is known."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from poise.algorithms.score_weighted import (
    ALPHAS,
    PREFIX_INPUTS,
    Moments,
    ScoreWeighted,
    fit_steps,
    joint_moments,
    packed_moments,
    prefix_inputs,
    prompt_trackers,
    ridge,
    squared_score_norms,
    step_moments,
    token_columns,
)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def samples(seed: int = 0, size: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(size, 3)) * (1.0, 5.0, 0.1) + (0.0, 2.0, -1.0)
    rewards = (random.random(size) < 1 / (1 + np.exp(-inputs[:, 0]))).astype(np.float64)
    return inputs, rewards, random.exponential(size=size).astype(np.float32)


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


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ridge_is_scikit_learns(alpha):
    inputs, rewards, weights = samples()
    scaler = StandardScaler().fit(inputs, sample_weight=weights)
    expected = Ridge(alpha).fit(scaler.transform(inputs), rewards, sample_weight=weights)
    own = ridge(Moments.of(inputs, rewards, weights), alpha)
    predicted = expected.predict(scaler.transform(inputs))
    np.testing.assert_allclose(own(inputs), np.clip(predicted, 0, 1), atol=1e-6)


def test_constant_is_the_weighted_mean():
    inputs, rewards, weights = samples()
    moments = Moments.of(inputs, rewards, weights)
    assert moments.mean_reward == pytest.approx(np.average(rewards, weights=weights))
    assert ridge(moments, None)(inputs) == pytest.approx(np.average(rewards, weights=weights))


def test_an_input_without_variance_gets_no_slope():
    inputs, rewards, weights = samples()
    inputs[:, 1] = 7.0
    regression = ridge(Moments.of(inputs, rewards, weights), 3.0)
    assert regression.slopes[1] == 0.0
    assert np.isfinite(regression(inputs)).all()


def test_without_weight_the_baseline_is_zero():
    inputs, rewards, weights = samples()
    moments = Moments.of(inputs, rewards, np.zeros_like(weights))
    assert ridge(moments, 3.0)(inputs).max() == 0.0
    assert np.isnan(moments.mean_reward)


def test_error_is_the_weighted_squared_error():
    inputs, rewards, weights = samples()
    moments, regression = Moments.of(inputs, rewards, weights), ridge(Moments.of(*samples(5)), 30.0)
    unclipped = regression.intercept + inputs @ regression.slopes
    assert moments.error(regression) == pytest.approx(float(weights @ (rewards - unclipped) ** 2))


def test_penalty_is_chosen_by_earlier_predictions():
    informative, noise = ScoreWeighted(3), ScoreWeighted(3)
    for step in range(10):
        inputs, rewards, weights = samples(step, 100)
        informative.learn(Moments.of(inputs, rewards, weights))
        noise.learn(Moments.of(inputs, np.random.default_rng(step).permutation(rewards), weights))
    assert informative.errors.argmin() < noise.errors.argmin()
    assert abs(informative.regression.slopes[0]) > 5 * abs(noise.regression.slopes[0])


def test_a_step_counts_half_after_the_half_life():
    learner = ScoreWeighted(1, half_life_steps=2)
    ones = np.ones((10, 1))
    learner.learn(Moments.of(ones, np.ones(10), np.full(10, 5, np.float32)))
    learner.learn(Moments.of(ones[:0], np.ones(0), np.ones(0, np.float32)))
    learner.learn(Moments.of(ones, np.zeros(10), np.full(10, 1, np.float32)))
    assert learner.regression(ones)[0] == pytest.approx(1 / 3)


class Softmax:
    """A policy over three steps of four tokens whose logits depend on the last token; rewards are a fixed table."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        logits = random.normal(size=(3, 5, 4))
        self.policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        self.rewards = random.random((4, 4, 4)).round()
        self.responses = np.array(list(itertools.product(range(4), repeat=3)))

    def distributions(self, response: np.ndarray) -> np.ndarray:
        return np.stack([self.policy[t, response[t - 1] if t else 4] for t in range(3)])

    def gradient(self, baseline) -> np.ndarray:
        """Return the exact expectation of Σ_t (r − b_t)·∇log π(y_t), over all responses."""
        total = np.zeros_like(self.policy)
        for response in self.responses:
            policy = self.distributions(response)
            probabilities = policy[np.arange(3), response]
            reward = self.rewards[tuple(response)]
            logprobs = np.log(probabilities).astype(np.float32)
            entropies = -(policy * np.log(policy)).sum(1).astype(np.float32)
            squares = (policy**2).sum(1).astype(np.float32)
            advantages = reward - baseline(logprobs, entropies, squares, reward)
            for t in range(3):
                score = np.eye(4)[response[t]] - policy[t]
                total[t, response[t - 1] if t else 4] += probabilities.prod() * advantages[t] * score
        return total


def leaky(kind: str, policy: Softmax):
    """Return a baseline that uses earlier knowledge only (`none`), or one with a leak."""
    inputs, rewards, weights = [], [], []
    for response in policy.responses[::3]:
        p = policy.distributions(response)
        logprobs = np.log(p[np.arange(3), response]).astype(np.float32)
        entropies, squares = -(p * np.log(p)).sum(1).astype(np.float32), (p**2).sum(1).astype(np.float32)
        inputs.append(prefix_inputs(logprobs, entropies, squares))
        rewards += [policy.rewards[tuple(response)]] * 3
        weights.append(squared_score_norms(logprobs, squares))
    earlier = Moments.of(np.concatenate(inputs), np.array(rewards), np.concatenate(weights))

    def baseline(logprobs, entropies, squares, reward):
        own = prefix_inputs(logprobs, entropies, squares)
        match kind:
            case "none":
                return ridge(earlier, 3.0)(own)
            case "own reward":
                return np.full(3, 0.5 * reward)
            case "a token late":
                late = np.concatenate([own[1:], own[-1:]])
                late[-1, PREFIX_INPUTS.index("previous_logprob")] = logprobs[-1]
                return ridge(earlier, 3.0)(late)
            case "fit on the step":
                seen = Moments.of(own, reward, squared_score_norms(logprobs, squares))
                return ridge(Moments.total([earlier, Moments(20 * seen.matrix, 20 * seen.num_samples)]), 3.0)(own)

    return baseline


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_stays_unbiased(seed):
    policy = Softmax(seed)
    true = policy.gradient(lambda *_: np.zeros(3))
    estimated = policy.gradient(leaky("none", policy))
    np.testing.assert_allclose(estimated, true, atol=1e-7)


@pytest.mark.parametrize("leak", ["own reward", "a token late", "fit on the step"])
def test_a_leak_biases_the_gradient(leak):
    policy = Softmax(0)
    true = policy.gradient(lambda *_: np.zeros(3))
    biased = policy.gradient(leaky(leak, policy))
    assert np.abs(biased - true).max() > 0.01 * np.abs(true).max()


# Fits to the tokens of whole steps.

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
    alone = [prefix_inputs(*parts) for parts in zip(*(np.split(array, ends) for array in arrays), strict=True)]
    np.testing.assert_array_equal(np.concatenate(alone).T, columns[1:])


def test_moments_of_steps_are_sums_over_their_tokens():
    columns, weights, rewards = responses()
    matrices = step_moments(packed_moments(columns, weights, LENGTHS), rewards, STARTS)
    token_rewards = np.repeat(rewards, LENGTHS)
    tokens = np.cumsum([0, *LENGTHS])
    for matrix, start, end in zip(matrices, STARTS, [*STARTS[1:], len(LENGTHS)], strict=True):
        part = slice(tokens[start], tokens[end])
        expected = Moments.of(columns[1:, part].T, token_rewards[part], weights[part])
        np.testing.assert_allclose(matrix, expected.matrix, rtol=1e-9, atol=1e-9)


def test_joint_moments_are_those_of_all_inputs():
    columns, weights, rewards = responses()
    prompts = np.random.default_rng(1).normal(size=(len(LENGTHS), 2))
    packed = packed_moments(columns, weights, LENGTHS)
    matrices = step_moments(packed, rewards, STARTS)
    joint = joint_moments(matrices, packed, rewards, STARTS, prompts)
    inputs = np.column_stack([columns[1:].T, np.repeat(prompts, LENGTHS, axis=0)])
    expected = Moments.of(inputs, np.repeat(rewards, LENGTHS).astype(np.float64), weights)
    np.testing.assert_allclose(joint.sum(axis=0), expected.matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [3.0, 1000.0])
def test_a_fit_to_steps_is_scikit_learns(alpha):
    """Tokens weighted by ω over its mean in the step, and by the step's age."""
    random = np.random.default_rng(3)
    steps = [samples(seed, 300) for seed in range(4)]
    parts = [Moments.of(*step) for step in steps]
    numbers = np.array([part.num_samples for part in parts])
    fit = fit_steps(np.stack([part.matrix for part in parts]), numbers, 10, penalties=(alpha,))
    inputs, rewards = (np.concatenate(arrays) for arrays in list(zip(*steps, strict=True))[:2])
    weights = np.concatenate(
        [weights / weights.mean() * 0.5 ** ((3 - age) / 10) for age, (_, _, weights) in enumerate(steps)]
    )
    means = np.average(inputs, axis=0, weights=weights)
    scales = np.sqrt(np.average((inputs - means) ** 2, axis=0, weights=weights))
    reference = Ridge(alpha=alpha).fit((inputs - means) / scales, rewards, sample_weight=weights)
    new = random.normal(size=(20, 3))
    expected = np.clip(reference.predict((new - means) / scales), 0, 1)
    np.testing.assert_allclose(fit.regression(new), expected, rtol=1e-4, atol=1e-5)


def test_a_fit_to_steps_is_that_of_learning_them_in_turn():
    parts = [Moments.of(*samples(seed, 50)) for seed in range(30)]
    one_by_one = ScoreWeighted(3)
    for part in parts:
        one_by_one.learn(part)
    fit = fit_steps(np.stack([part.matrix for part in parts]), np.full(30, 50.0))
    expected = one_by_one.regression
    np.testing.assert_allclose(
        [fit.regression.intercept, *fit.regression.slopes], [expected.intercept, *expected.slopes]
    )
    errors, age = one_by_one.errors, 0.5 ** (1 / 40)
    assert fit.error >= errors.min() / sum(50 * age**step for step in range(29)) * (1 - 1e-9)


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
