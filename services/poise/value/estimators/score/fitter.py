"""Fits score-weighted estimators to a window of labels.

A fit depends only on the labels in the window, to the last bit, not on the order in which those of a run arrived: they
are sorted by run, step and group first. Runs are in the order of their first labels in the window. Every input of a
label comes from earlier steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from poise.algorithms.score_weighted import (
    HALF_LIFE_STEPS,
    PREFIX_INPUTS,
    StepFit,
    fit_steps,
    joint_moments,
    prompt_trackers,
    step_factors,
    step_moments,
)
from poise.value.estimators.features import Doubles, Floats, Label
from poise.value.estimators.probe.subspace import NEGLIGIBLE_VARIANCE, affordable_components
from poise.value.estimators.score.model import FittedScore
from poise_client.types import Estimator

_MAX_PCA_ROWS = 256
"""The newest prompts whose hidden states determine the principal components: more would cost more than they add."""

_COMPARED: Mapping[Estimator, tuple[Estimator, ...]] = {
    "score_mean": ("score_mean",),
    "score_prefix": ("score_mean", "score_prefix"),
    "score_prompt": ("score_mean", "score_prompt"),
    "auto": ("score_mean", "score_prefix", "score_prompt"),
}
"""The estimators that a fit compares, from simple to complex."""


class ScoreFitter:
    """Fits the score-weighted estimators of one domain. It keeps nothing between fits."""

    def __init__(self, estimator: Estimator, prompt_components: int, rows_per_component: int) -> None:
        self._estimator = estimator
        self._prompt_components = prompt_components
        self._rows_per_component = rows_per_component
        self._threads = ThreadpoolController()

    def fit(self, groups: Sequence[Label]) -> FittedScore:
        """See `Fitter.fit`. `auto` chooses the estimator with the smallest error, the simplest one at a tie."""
        with self._threads.limit(limits=1):  # their number could change the last bit
            return self._fit(_Steps.of(groups))

    def _fit(self, steps: _Steps) -> FittedScore:
        fitted = {name: self._fit_one(name, steps) for name in _COMPARED[self._estimator]}
        errors = {name: one.error for name, (one, _) in fitted.items() if not math.isnan(one.error)}
        chosen = self._estimator
        if chosen == "auto":
            chosen = min(errors, key=errors.__getitem__, default="score_mean")
        fit, prompts = fitted[chosen]
        if not np.isfinite([fit.intercept, *fit.slopes]).all():
            raise ArithmeticError("the fit gave parameters that are not finite")
        of_tokens, of_prompts = np.split(fit.slopes, [len(PREFIX_INPUTS)])
        coefficients = np.array([fit.intercept, *of_tokens])
        if prompts is None:
            return FittedScore(chosen, coefficients, errors)
        weights = prompts.directions @ of_prompts[:-1]
        offsets = {name: float(of_prompts[-1] * tracker) for name, tracker in prompts.trackers.items()}
        bias = -float(prompts.origin @ weights)
        return FittedScore(chosen, coefficients, errors, weights, bias, offsets)

    def _fit_one(self, name: Estimator, steps: _Steps) -> tuple[StepFit, _Prompts | None]:
        if name == "score_mean":
            return fit_steps(steps.matrices, steps.num_responses, penalties=(None,)), None
        if name == "score_prefix":
            return fit_steps(steps.matrices, steps.num_responses), None
        prompts = self._prompts(steps)
        matrices = joint_moments(steps.matrices, steps.packed, steps.rewards, steps.starts, prompts.inputs)
        return fit_steps(matrices, steps.num_responses), prompts

    def _prompts(self, steps: _Steps) -> _Prompts:
        """Return the prompt's inputs of each response: principal components of its hidden state, and its tracker."""
        known = [index for index, group in enumerate(steps.groups) if group.features.width]
        origin, directions = np.zeros(0), np.zeros((0, 0))
        components = np.zeros((len(steps.groups), 0))
        if len(known) > 1:
            hidden = [steps.groups[index].features.prompt_hidden for index in known]
            origin, directions = self._reduce(hidden)
            components = np.zeros((len(steps.groups), directions.shape[1]))
            # Single precision suffices near the origin.
            centred = np.concatenate(hidden) - origin.astype(np.float32)
            components[known] = centred @ directions.astype(np.float32)
        ids = list(dict.fromkeys(group.prompt_id for group in steps.groups if group.prompt_id))
        numbers = {prompt_id: number for number, prompt_id in enumerate(ids)} | {"": -1}
        prompts = np.array([numbers[group.prompt_id] for group in steps.groups], np.intp)
        sizes = [group.rewards.size for group in steps.groups]
        trackers, now = prompt_trackers(
            np.repeat(prompts, sizes), steps.weights, steps.rewards, steps.starts, HALF_LIFE_STEPS
        )
        inputs = np.column_stack([np.repeat(components, sizes, axis=0), trackers])
        return _Prompts(inputs, origin, directions, dict(zip(ids, now.tolist(), strict=True)))

    def _reduce(self, hidden: Sequence[Floats]) -> tuple[Doubles, Doubles]:
        """Return the origin [d] and the leading principal components of hidden states, as columns, [d, k]."""
        newest = np.concatenate(hidden[-_MAX_PCA_ROWS:]).astype(np.float64)
        origin = newest.mean(axis=0)
        newest -= origin
        variances, vectors = np.linalg.eigh(newest @ newest.T)  # few rows: cheaper than the covariance of d columns
        leading = variances[::-1][
            : affordable_components(self._prompt_components, len(hidden), self._rows_per_component)
        ]
        num_kept = int((leading > NEGLIGIBLE_VARIANCE * max(variances[-1], 0.0)).sum())
        return origin, newest.T @ vectors[:, ::-1][:, :num_kept] / np.sqrt(leading[:num_kept])


@dataclass(frozen=True, slots=True, eq=False)
class _Prompts:
    """The inputs of `score_prompt` that are constant within a response."""

    inputs: Doubles
    """[n, k + 1]: components and tracker."""
    origin: Doubles
    """[d]"""
    directions: Doubles
    """[d, k]"""
    trackers: Mapping[str, float]
    """The tracker of each prompt now."""


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """The labels of a window by step."""

    groups: list[Label]
    """By run, step and id."""
    packed: Doubles
    """[n, packed]"""
    rewards: Floats
    """[n]"""
    starts: list[int]
    """Index of the first response of each step."""
    matrices: Doubles
    """[S, p + 2, p + 2]"""
    num_responses: Doubles
    """[S]. Steps count by responses, not tokens: those of a response share its reward."""
    weights: Doubles
    """[n]: Σ ω, normalised by step."""

    @classmethod
    def of(cls, groups: Sequence[Label]) -> _Steps:
        runs = {run_id: number for number, run_id in enumerate(dict.fromkeys(group.run_id for group in groups))}
        ordered = sorted(groups, key=lambda group: (runs[group.run_id], group.step, group.group_id))
        packed = np.concatenate([group.moments for group in ordered if group.moments is not None])
        rewards = np.concatenate([group.rewards for group in ordered])
        starts: list[int] = []
        row, previous = 0, ("", -1)
        for group in ordered:
            if previous != (previous := (group.run_id, group.step)):
                starts.append(row)
            row += group.rewards.size
        sizes = np.diff([*starts, row])
        num_responses = sizes.astype(np.float64)
        matrices = step_moments(packed, rewards, starts)
        factors = np.repeat(step_factors(matrices, num_responses), sizes)
        return cls(ordered, packed, rewards, starts, matrices, num_responses, packed[:, 0] * factors)
