"""Score-weighted baselines: mean rewards weighted by the squared score norm, learnt from earlier steps only.

The variance of a policy gradient is E[‖∇log π‖²·(r − b)²] − ‖G‖². The constant that minimises it is
b* = E[‖∇log π‖²·r] / E[‖∇log π‖²], not the mean reward; with inputs that are known before a token is sampled, it is the
weighted regression of the reward on them. The weight of a token is the squared norm of the gradient with respect to the
logits, ‖e_y − π‖² = 1 − 2π(y) + Σ_v π(v)² (compare OTB, arXiv 2602.07078).

A baseline b_t may depend on the prompt, the tokens before t, and earlier steps: then E[∇log π(y_t | s_t)·b_t] = 0.

Shapes: T tokens of one response, p inputs of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
FloatsOrHalves = NDArray[np.float32] | NDArray[np.float16]
Doubles = NDArray[np.float64]

HALF_LIFE_STEPS = 40
"""Steps after which a label counts half: the policy that sampled it has changed."""

PREFIX_INPUTS = (
    "entropy",
    "sum_squares",
    "logprob_sum",
    "logprob_min",
    "probability",
    "probability_min",
    "previous_logprob",
    "log_position",
    "is_first",
    "entropy_sum",
    "surprise",
)
"""The inputs φ of a token, known before it is sampled: rows 1 to p of `token_columns`."""

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Ridge penalties that a regression chooses from, in responses; a constant is always a candidate."""


def squared_score_norms(logprobs_t: FloatsOrHalves, sum_squares_t: FloatsOrHalves) -> Floats:
    """Return ω_t = 1 − 2π(y_t) + Σ_v π(v)², [T]: the squared norm of the gradient with respect to the logits.

    ω_t is between (1 − π(y_t))² and twice that. Clipping to this range keeps small norms right within a factor of 2,
    although Σ_v π(v)² close to 1 is rounded to 0.0002 in float16.

    Args:
        logprobs_t: log π(y_t) of the sampled tokens.
        sum_squares_t: Σ_v π(v)² of the distribution that each token was sampled from.
    """
    others = -np.expm1(logprobs_t.astype(np.float64))  # 1 − π(y_t)
    norms = 2.0 * others - 1.0 + sum_squares_t.astype(np.float64)
    return np.clip(norms, others**2, 2.0 * others**2).astype(np.float32)


def token_columns(
    logprobs_N: FloatsOrHalves, entropies_N: FloatsOrHalves, sum_squares_N: FloatsOrHalves, lengths: Sequence[int]
) -> Doubles:
    """Return (1, φ) of the N tokens of several responses, one after the other, [1 + p, N].

    A token's column depends on log-probabilities of earlier tokens of its response, and on entropies and Σπ² up to its
    own: those describe the distribution, not its sample. It is the same to the last bit in any batch.
    """
    logprobs, entropies = logprobs_N.astype(np.float64), entropies_N.astype(np.float64)
    columns = np.zeros((1 + len(PREFIX_INPUTS), logprobs.size))
    ones, own, squares, before, lowest, p_before, p_lowest, previous, log_position, first, sums, surprise = columns
    ones[:] = 1.0
    own[:], squares[:] = entropies, sum_squares_N
    previous[1:] = logprobs[:-1]
    log_positions = np.log1p(np.arange(max(lengths, default=0)))
    start = 0
    for length in lengths:
        if length == 0:
            continue
        end, second = start + length, start + 1
        np.add.accumulate(logprobs[start : end - 1], out=before[second:end])
        np.minimum.accumulate(logprobs[start : end - 1], out=lowest[second:end])
        np.add.accumulate(entropies[start : end - 1], out=sums[second:end])
        previous[start], first[start] = 0.0, 1.0
        log_position[start:end] = log_positions[:length]
        start = end
    np.exp(before, out=p_before)
    np.exp(lowest, out=p_lowest)
    np.add(before, sums, out=surprise)
    return columns


_UPPER = np.triu_indices(1 + len(PREFIX_INPUTS))
_TOKENS_AT_ONCE = 1024
"""Few enough that BLAS uses one thread, whose sums always have the same order."""


def packed_moments(columns_N: Doubles, weights_N: Doubles, lengths: Sequence[int]) -> Doubles:
    """Return the upper triangle of Σ ω·(1, φ)(1, φ)ᵀ of each response, [n, packed].

    Args:
        columns_N: `token_columns` of all tokens.
        weights_N: ω of all tokens.
        lengths: tokens of each response.
    """
    packed = np.empty((len(lengths), _UPPER[0].size))
    start = 0
    for row, length in zip(packed, lengths, strict=True):
        end, matrix = start + length, np.zeros((columns_N.shape[0], columns_N.shape[0]))
        for first in range(start, end, _TOKENS_AT_ONCE):
            part = slice(first, min(first + _TOKENS_AT_ONCE, end))
            matrix += (columns_N[:, part] * weights_N[part]) @ columns_N[:, part].T
        row[:] = matrix[_UPPER]
        start = end
    return packed


def step_moments(packed_n: Doubles, rewards_n: Floats, starts_S: Sequence[int]) -> Doubles:
    """Return each step's moment matrix of (1, φ, r), [S, p + 2, p + 2].

    Args:
        packed_n: `packed_moments` of responses, those of a step next to each other.
        rewards_n: rewards of the responses.
        starts_S: index of the first response of each step.
    """
    size = 1 + len(PREFIX_INPUTS)
    rewards = rewards_n.astype(np.float64)[:, None]
    weighted = packed_n[:, :size] * rewards  # the first row of the triangle: Σ ω·r·(1, φ)
    sums = np.add.reduceat(np.hstack([packed_n, weighted, weighted[:, :1] * rewards]), starts_S, axis=0)
    matrices = np.empty((len(starts_S), size + 1, size + 1))
    matrices[:, _UPPER[0], _UPPER[1]] = matrices[:, _UPPER[1], _UPPER[0]] = sums[:, : _UPPER[0].size]
    matrices[:, :size, -1] = matrices[:, -1, :size] = sums[:, _UPPER[0].size : -1]
    matrices[:, -1, -1] = sums[:, -1]
    return matrices


def _ridges(matrices_S: Doubles, alphas: Sequence[float | None]) -> tuple[Doubles, Doubles]:
    """Return intercepts [S, A] and slopes [S, A, p] of weighted ridge regressions of the reward on standardised inputs.

    A penalty of None gives a constant. Inputs without variance get no slope. Moments without weight give 0.

    Args:
        matrices_S: moment matrices of (1, φ, r), [S, p + 2, p + 2].
        alphas: the A penalties.
    """
    num_inputs = matrices_S.shape[1] - 2
    weights = matrices_S[:, 0, 0]
    moments = matrices_S / np.where(weights > 0, weights, 1.0)[:, None, None]
    means = moments[:, 0]
    covariances = moments - means[:, :, None] * means[:, None, :]
    variances = np.diagonal(covariances, axis1=1, axis2=2)[:, 1:-1]
    varies = variances > 1e-10 * (np.diagonal(moments, axis1=1, axis2=2)[:, 1:-1] + 1e-300)
    scales = np.where(varies, np.sqrt(np.maximum(variances, 1e-300)), np.inf)  # an infinite scale removes the input
    grams = covariances[:, 1:-1, 1:-1] / (scales[:, :, None] * scales[:, None, :]) * weights[:, None, None]
    targets = covariances[:, 1:-1, -1] / scales * weights[:, None]
    slopes = np.zeros((len(matrices_S), len(alphas), num_inputs))
    for index, alpha in enumerate(alphas):
        if alpha is not None:
            penalised = grams + alpha * np.eye(num_inputs)
            slopes[:, index] = np.linalg.solve(penalised, targets[:, :, None])[:, :, 0] / scales
    return means[:, None, -1] - (slopes @ means[:, 1:-1, None])[:, :, 0], slopes


def _errors(matrices_S: Doubles, intercepts_SA: Doubles, slopes_SAp: Doubles) -> Doubles:
    """Return Σ ω·(r − b)² of unclipped regressions on the moments of each step, [S, A]."""
    ones = np.ones_like(intercepts_SA)[:, :, None]
    residuals = np.concatenate([-intercepts_SA[:, :, None], -slopes_SAp, ones], axis=2)
    errors: Doubles = np.maximum(0.0, ((residuals @ matrices_S) * residuals).sum(axis=2))
    return errors


@dataclass(frozen=True, slots=True, eq=False)
class StepFit:
    """A regression fitted on successive steps, with the errors that it would have made on them."""

    intercept: float
    """c of the baseline c + β·φ of the next step."""
    slopes: Doubles
    """β, [p]."""
    error: float
    """Mean ω·(r − b)² of the newest steps, each predicted from those before it with the penalty that was best until
    then. Later steps count more. NaN before the second step with weight."""


def fit_steps(
    matrices_S: Doubles,
    num_samples_S: Doubles,
    half_life_steps: float = HALF_LIFE_STEPS,
    penalties: Sequence[float | None] = (None, *ALPHAS),
) -> StepFit:
    """Fit to the moment matrices of successive steps, oldest first, [S, p + 2, p + 2].

    Weights are scaled by step, see `step_factors`, and halve every `half_life_steps`. Each step is predicted from the
    steps before it, with every penalty. The penalty with the smallest discounted error is used for the next step; at a
    tie it is the first one. None is a constant. Only the newest five half lives of steps are predicted: earlier errors
    would count less than 1/32.
    """
    num_steps, discount = len(matrices_S), 0.5 ** (1 / half_life_steps)
    normalised = matrices_S * step_factors(matrices_S, num_samples_S)[:, None, None]
    before = _discounted_sums(normalised, discount)
    first = max(0, num_steps - round(5 * half_life_steps))
    judged = first + np.flatnonzero(before[first:-1, 0, 0] > 0)
    errors = _errors(normalised[judged], *_ridges(before[judged], penalties))
    sums, error, total = np.zeros(len(penalties)), 0.0, 0.0
    for weight, own in zip(normalised[judged, 0, 0].tolist(), errors, strict=True):
        error = discount * error + float(own[np.argmin(sums)])
        total = discount * total + weight
        sums = discount * sums + own
    intercepts, slopes = _ridges(before[-1:], [penalties[int(np.argmin(sums))]])
    return StepFit(float(intercepts[0, 0]), slopes[0, 0], error / total if total else math.nan)


def step_factors(matrices_S: Doubles, num_samples_S: Doubles) -> Doubles:
    """Return the factor of each step's weights that makes their sum its number of samples, [S]; 1 without weight.

    Tokens of a response share its reward, so the samples are the responses: then penalties do not depend on lengths.
    """
    weights = matrices_S[:, 0, 0]
    return np.divide(num_samples_S, weights, out=np.ones(len(weights)), where=weights > 0)


def _discounted_sums(numbers_S: Doubles, discount: float) -> Doubles:
    """Return for each step, and for the next one, the discounted sum of those before it, [S + 1, …]."""
    sums = np.zeros((len(numbers_S) + 1, *numbers_S.shape[1:]))
    for step in range(len(numbers_S)):
        sums[step + 1] = discount * sums[step] + numbers_S[step]
    return sums


def prompt_trackers(
    prompts_n: NDArray[np.intp], weights_n: Doubles, rewards_n: Floats, starts_S: Sequence[int], half_life_steps: float
) -> tuple[Doubles, Doubles]:
    """Return how much better each prompt did in earlier steps than its domain: for each response, [n], and now, [P].

    It is (Σ ωr − m·Σ ω) / (Σ ω + w), with discounted sums over the prompt's earlier responses, the domain's mean reward
    m, and the mean weight w of one response, which shrinks it. It is 0 for a new or unknown prompt.

    Args:
        prompts_n: the prompt of each response, numbered from 0; -1 if unknown.
        weights_n: Σ ω of each response, normalised by step.
        rewards_n: rewards of the responses.
        starts_S: index of the first response of each step.
        half_life_steps: steps after which a response counts half.
    """
    discount = 0.5 ** (1 / half_life_steps)
    inputs = np.zeros(len(prompts_n))
    # Σ ω and Σ ωr of each prompt; the last entry collects unknown prompts.
    weights, weighted = np.zeros(prompts_n.max(initial=-1) + 2), np.zeros(prompts_n.max(initial=-1) + 2)
    number = 0.0

    def now() -> Doubles:
        total = weights.sum()
        if total <= 0:
            return np.zeros(len(weights))
        trackers: Doubles = (weighted - weighted.sum() / total * weights) / (weights + total / number)
        trackers[-1] = 0.0
        return trackers

    for start, end in zip(starts_S, [*starts_S[1:], len(prompts_n)], strict=True):
        rows = slice(start, end)
        inputs[rows] = now()[prompts_n[rows]]
        weights, weighted, number = discount * weights, discount * weighted, discount * number + end - start
        np.add.at(weights, prompts_n[rows], weights_n[rows])
        np.add.at(weighted, prompts_n[rows], weights_n[rows] * rewards_n[rows])
    return inputs, now()[:-1]


def joint_moments(
    matrices_S: Doubles, packed_n: Doubles, rewards_n: Floats, starts_S: Sequence[int], inputs_nk: Doubles
) -> Doubles:
    """Return each step's moment matrix of (1, φ, q, r), for inputs q that are constant within a response.

    Args:
        matrices_S: `step_moments` of (1, φ, r).
        packed_n: `packed_moments` of the responses.
        rewards_n: rewards of the responses.
        starts_S: index of the first response of each step.
        inputs_nk: q of each response.
    """
    size, num_inputs = 1 + len(PREFIX_INPUTS), inputs_nk.shape[1]
    others = [*range(size), size + num_inputs]  # 1, φ and r
    joint = np.empty((len(matrices_S), size + num_inputs + 1, size + num_inputs + 1))
    joint[np.ix_(range(len(matrices_S)), others, others)] = matrices_S
    weighted = np.column_stack([packed_n[:, :size], packed_n[:, 0] * rewards_n])
    for matrix, start, end in zip(joint, starts_S, [*starts_S[1:], len(packed_n)], strict=True):
        inputs = inputs_nk[start:end]
        matrix[size:-1, others] = inputs.T @ weighted[start:end]
        matrix[others, size:-1] = matrix[size:-1, others].T
        matrix[size:-1, size:-1] = (inputs * packed_n[start:end, :1]).T @ inputs
    return joint
