"""A training run on the three services, step by step: sample, baselines, publish, train."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from poise_client._generation import AsyncGenerationClient
from poise_client._learner import AsyncLearnerClient
from poise_client._value import AsyncValueClient
from poise_client.errors import StepOrderError
from poise_client.types import (
    DEFAULT_DOMAIN,
    Batch,
    Floats,
    Group,
    Prompt,
    PromptContent,
    Rollout,
    Sampling,
    StepBaselines,
    StepResult,
)

Bootstrap = Literal["rloo", "batch_mean", "none"]
"""Baseline until the first fit: the mean reward of the siblings, that of the step's other prompts, or 0."""


class AsyncRun:
    """A training run. Each step calls `sample`, `baselines`, `publish` and `train`, in this order."""

    run_id: str
    """Name of the run."""

    def __init__(
        self,
        run_id: str,
        generation: AsyncGenerationClient,
        value: AsyncValueClient,
        learner: AsyncLearnerClient,
        *,
        domain: str | None,
        bootstrap: Bootstrap,
    ) -> None:
        self.run_id = run_id
        self._generation, self._value, self._learner = generation, value, learner
        self._domain = domain
        self._bootstrap: Bootstrap = bootstrap
        self._temperatures: dict[int, float] = {}
        self._published: set[int] = set()
        self._has_critic: bool | None = None

    async def sample(
        self,
        step: int,
        prompts: Sequence[Prompt | PromptContent],
        *,
        num_rollouts: int = 2,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        timeout_s: float | None = None,
    ) -> list[Group]:
        """Sample rollouts of each prompt and return the groups in the order of `prompts`.

        Args:
            step: step of the run, from 0.
            prompts: `Prompt`s, or their contents. Contents get the group ids "g0", "g1", ...
            num_rollouts: responses of each prompt, 1 to 256.
            sampling: how tokens are sampled.
            timeout_s: deadline; 30 minutes by default.

        Raises:
            PoiseClientError: see `poise_client.errors`.
        """
        named = [
            prompt if isinstance(prompt, Prompt) else Prompt(f"g{index}", prompt)
            for index, prompt in enumerate(prompts)
        ]
        stream = self._generation.stream_trajectories(
            self.run_id, step, named, num_rollouts=num_rollouts, sampling=sampling, timeout_s=timeout_s
        )
        async with aclosing(stream):
            groups = {group.group_id: group async for group in stream}
        self._temperatures[step] = sampling.temperature
        return [groups[prompt.group_id] for prompt in named]

    async def baselines(
        self,
        groups: Sequence[Group],
        rewards: Sequence[ArrayLike],
        *,
        wait_for_labels_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> StepBaselines:
        """Return the baselines of one step's rollouts. Call it before `publish` of the same step.

        The value service's `estimator` decides whether there is one baseline per rollout or per token. Until its first
        fit for a domain, `bootstrap` selects the baselines. A single rollout has no siblings: `rloo` then gives the
        mean reward of the step's other prompts.

        Args:
            groups: all groups of the step to train on, from `sample`.
            rewards: rewards of each group, [n] each, in [0, 1]. For a group of one rollout, a number is enough.
            wait_for_labels_s: see `AsyncValueClient.estimate_baselines`.
            timeout_s: deadline; a minute by default.

        Raises:
            StepOrderError: the groups are from several steps or another run, or `publish` was called for their step.
            ValueError: the number of rewards differs from the number of rollouts.
            PoiseClientError: see `poise_client.errors`.
        """
        if len(groups) != len(rewards):
            raise ValueError(f"there are {len(groups)} groups but rewards of {len(rewards)}. Pass one array per group.")
        domain = self._domain
        scored = [
            group.scored(r, domain if domain and group.domain == DEFAULT_DOMAIN else None)
            for group, r in zip(groups, rewards, strict=True)
        ]
        step = self._step_of(scored)
        if step in self._published:
            raise StepOrderError(
                f"run.publish was called for step {step} of run {self.run_id!r}, so baselines would leak its labels. "
                "Call run.baselines before run.publish."
            )
        estimates = await self._value.estimate_baselines(
            self.run_id, step, scored, wait_for_labels_s=wait_for_labels_s, timeout_s=timeout_s
        )
        values = [np.array([rollout.reward for rollout in group.rollouts], np.float32) for group in scored]
        chosen: list[Floats | tuple[Floats, ...]] = []
        for index, estimate in enumerate(estimates):
            own = estimate.token_baselines if estimate.baselines is None else estimate.baselines
            chosen.append(self._fallback(values, index) if own is None else own)
        return StepBaselines(self.run_id, step, tuple(scored), tuple(chosen), tuple(estimates))

    async def publish(self, baselines: StepBaselines, *, timeout_s: float | None = None) -> int:
        """Publish the rewards of a step for the estimator to learn from; return the number of groups.

        The labels are durable on return. Repeating the call is safe.

        Args:
            baselines: result of `baselines` for the step.
            timeout_s: deadline; a minute by default.

        Raises:
            StepOrderError: the baselines are from another run.
            PoiseClientError: see `poise_client.errors`.
        """
        step = self._step_of(baselines.groups)
        self._published.add(step)  # before the call, which may fail after the labels arrived
        return await self._value.publish_labels(baselines.groups, timeout_s=timeout_s)

    async def train(
        self,
        baselines: StepBaselines,
        *,
        advantages: Sequence[Sequence[ArrayLike] | Floats] | None = None,
        temperature: float | None = None,
        timeout_s: float | None = None,
    ) -> StepResult:
        """Train the policy on a step, and return after the learner tried to push the weights to every replica.

        Repeating the call is safe: the learner trains on a step once and returns the stored result.

        Args:
            baselines: result of `baselines` for the step.
            advantages: your own advantages by group: for each rollout a number, or [T], one per token. By default
                reward − baseline.
            temperature: sampling temperature. By default that of `sample`, or 1 if another process sampled the step.
            timeout_s: deadline; 30 minutes by default.

        Raises:
            StepOrderError: the step was sampled greedily, or belongs to another run.
            ValueError: `advantages` do not match the rollouts, or the learner has a critic and computes its own.
            PoiseClientError: see `poise_client.errors`.
        """
        step = self._step_of(baselines.groups)
        if temperature is None:
            temperature = self._temperatures.get(step, 1.0)
        if temperature == 0:
            raise StepOrderError(
                f"step {step} was sampled with temperature 0, which cannot be trained on. Sample it with 0.01 to 100."
            )
        if self._has_critic is None:
            self._has_critic = (await self._learner.get_status()).has_critic
        if self._has_critic and advantages is not None:
            raise ValueError("the learner's critic computes advantages. Call run.train without `advantages`.")
        signals = baselines.advantages if advantages is None else advantages
        rollouts = [
            rollout
            for group, signal in zip(baselines.groups, signals, strict=True)
            for rollout in _for_training(group, signal, has_critic=self._has_critic)
        ]
        batch = Batch(self.run_id, f"step-{step:08d}", step, tuple(rollouts), temperature)
        return await self._learner.submit_advantages(batch, timeout_s=timeout_s)

    def _step_of(self, groups: Sequence[Group]) -> int:
        """Return the step that all groups belong to."""
        runs, steps = {group.run_id for group in groups}, {group.step for group in groups}
        if runs != {self.run_id} or len(steps) != 1:
            raise StepOrderError(
                f"expected groups of one step of run {self.run_id!r}, found runs {sorted(runs)} and steps "
                f"{sorted(steps)}. Pass the groups that run.sample returned for one step."
            )
        return steps.pop()

    def _fallback(self, rewards: Sequence[Floats], index: int) -> Floats:
        """Return the bootstrap baselines of the group at `index`, [n]."""
        if self._bootstrap == "none":
            return np.zeros_like(rewards[index])
        own, others = rewards[index], [group for position, group in enumerate(rewards) if position != index]
        if own.size > 1 and (self._bootstrap == "rloo" or not others):
            # Omit the rollout's own reward instead of subtracting it: no bit of the baseline may depend on it.
            means = [np.delete(own, position).mean(dtype=np.float64) for position in range(own.size)]
            return np.array(means, np.float32)
        mean = np.concatenate(others).mean(dtype=np.float64) if others else 0.0
        return np.full_like(own, mean)


def _for_training(group: Group, advantages: Sequence[ArrayLike] | Floats, *, has_critic: bool) -> Sequence[Rollout]:
    """Return the rollouts of a group with their advantages, or for a critic with their rewards."""
    if has_critic:
        return group.rollouts
    if len(advantages) != len(group.rollouts):
        raise ValueError(
            f"group {group.group_id!r} has {len(group.rollouts)} rollouts but {len(advantages)} advantages. "
            "Pass a number, or one array, for each rollout."
        )
    rollouts = []
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        values = np.asarray(advantage, np.float32)
        if values.shape not in ((), rollout.token_ids.shape):
            raise ValueError(
                f"rollout {rollout.id.rollout_index} of group {group.group_id!r} has {rollout.token_ids.size} tokens "
                f"but advantages of shape {values.shape}. Pass a number, or one advantage for each token."
            )
        is_number = values.ndim == 0
        rollouts.append(
            dataclasses.replace(
                rollout,
                advantage=float(values) if is_number else None,
                advantages=None if is_number else values,
                reward=None,
            )
        )
    return rollouts
