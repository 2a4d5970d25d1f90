"""Baselines, prompt scores and the state of the probes.

Shapes: n rollouts of a group, d the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise_client.types._rollouts import Floats, Group


@dataclass(frozen=True, slots=True)
class GroupBaselines:
    """The baselines of one group. The arrays are None while the domain has no fitted probe."""

    group_id: str
    probe_version: int
    values: Floats | None
    """[n], in [0, 1]: g_k(z_i), the predicted rewards."""
    baselines: Floats | None
    """[n]: b_i = mean over j ≠ i of g_k(z_j). Also None for a single rollout."""
    up_to_date: bool = False
    """True only if the probe is known to be fitted on every label published before the first call for the step.

    See `wait_for_labels_s` of `estimate_baselines`. All groups of a domain in a step have the same value.
    """


@dataclass(frozen=True, slots=True)
class StepBaselines:
    """The baselines of one step: the result of `run.baselines`, and the argument of `run.publish` and `run.train`."""

    run_id: str
    step: int
    groups: tuple[Group, ...]
    """The groups with their rewards."""
    baselines: tuple[Floats, ...]
    """[n] for each group, from the probe, or from the bootstrap if the probe has none."""
    estimates: tuple[GroupBaselines, ...]
    """The answer of the value service, by group."""

    @property
    def rewards(self) -> tuple[Floats, ...]:
        """[n] for each group."""
        return tuple(np.array([rollout.reward for rollout in group.rollouts], np.float32) for group in self.groups)

    @property
    def advantages(self) -> tuple[Floats, ...]:
        """reward − baseline, [n] for each group."""
        return tuple(reward - baseline for reward, baseline in zip(self.rewards, self.baselines, strict=True))

    @property
    def is_bootstrap(self) -> bool:
        """Whether no baseline comes from a probe yet."""
        return all(estimate.baselines is None for estimate in self.estimates)


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """Hidden state of a prompt that has no rollouts yet."""

    group_id: str
    domain: str
    """Selects the probe."""
    prompt_hidden: Floats
    """[d]"""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Predicted mean reward of a prompt's rollouts."""

    group_id: str
    probe_version: int
    value: float | None
    """In [0, 1]; None while the domain has no fitted probe."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Rollouts with similar predictions."""

    predicted: float
    """Mean prediction."""
    realised: float
    """Mean reward of their siblings."""
    count: int
    """Number of rollouts."""


@dataclass(frozen=True, slots=True)
class ProbeQuality:
    """Quality of a domain's recent predictions, each made before the probe learnt the label.

    Predictions are compared with the mean reward of the siblings. Undefined numbers are NaN.
    """

    num_rows: int
    """Number of rollouts compared."""
    pearson: float
    """Correlation."""
    brier: float
    """Mean squared difference."""
    brier_skill: float
    """1 − brier / (brier of always predicting the mean). 1 is perfect; below 0 is worse than that constant."""
    bias: float
    """Mean of prediction − reward. Above 0, predictions are too high."""
    share_clipped: float
    """Share of predictions at exactly 0 or 1."""
    variance_vs_none: float
    """Mean squared advantage, divided by the same without a baseline."""
    variance_vs_rloo: float
    """Mean squared advantage, divided by the same with the siblings' mean reward as baseline."""
    variance_vs_batch_mean: float
    """Mean squared advantage, divided by the same with the mean reward of the step's other prompts as baseline."""
    calibration: tuple[CalibrationBin, ...]
    """Predictions in tenths of [0, 1]; empty tenths are omitted."""


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """State of one domain's probe."""

    domain: str
    probe_version: int
    """0 before the first fit."""
    num_groups: int
    """Groups in the sliding window."""
    num_rows: int
    """Rollouts in the sliding window."""
    num_steps_seen: int
    """Distinct steps seen so far."""
    warmup_steps: int
    """Steps before the first fit."""
    last_fit_s: float
    """Duration of the last fit, in seconds."""
    label_lag_s: float
    """Seconds from publishing to durable state of the label learnt last; NaN before the first since the start."""
    quality: ProbeQuality


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """State of the probes and of the label queue."""

    probes: tuple[ProbeStatus, ...]
    num_groups_consumed: int
    """Groups learnt since the state was created, without duplicates."""
    num_duplicates: int
    """Groups that were ignored because they were delivered again."""
    num_dead_letters: int
    """Queue entries that could not be learnt from."""
    num_pending: int
    """Published groups that are not yet in the durable state."""
