"""Baselines, prompt scores and the state of the probes.

Shapes: n rollouts of a group, T tokens of a response, d the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from poise_client.types._rollouts import _NO_HALVES, Features, Floats, Group

Estimator = Literal["probe", "score_mean", "score_prefix", "score_prompt", "auto"]
"""A way to compute baselines: the paper's probe, or a score-weighted mean or regression. "auto" chooses one of the
latter; answers name the chosen one."""


@dataclass(frozen=True, slots=True)
class GroupBaselines:
    """The baselines of one group. The arrays are None while the domain has no fitted estimator."""

    group_id: str
    probe_version: int
    """Version of the fitted estimator."""
    values: Floats | None
    """[n], in [0, 1]: the predicted rewards. From the probe they are g_k(z_i). From a score-weighted estimator they are
    the means of each rollout's baselines, weighted by the squared score norms."""
    baselines: Floats | None
    """[n]: one baseline per rollout. From the probe it is the mean over j ≠ i of g_k(z_j); None for a single rollout.
    Also None if `token_baselines` is set."""
    up_to_date: bool = False
    """True only if the probe is known to be fitted on every label published before the first call for the step.

    See `wait_for_labels_s` of `estimate_baselines`. All groups of a domain in a step have the same value.
    """
    estimator: Estimator | Literal[""] = ""
    """The estimator that answered; empty if none is fitted."""
    token_baselines: tuple[Floats, ...] | None = None
    """[T] for each rollout: one baseline per token. Set by score_prefix and score_prompt."""


@dataclass(frozen=True, slots=True)
class StepBaselines:
    """The baselines of one step: the result of `run.baselines`, and the argument of `run.publish` and `run.train`."""

    run_id: str
    step: int
    groups: tuple[Group, ...]
    """The groups with their rewards."""
    baselines: tuple[Floats | tuple[Floats, ...], ...]
    """By group: [n], one per rollout; or [T] for each rollout, one per token, if the estimator answers so. From the
    bootstrap if the estimator has none."""
    estimates: tuple[GroupBaselines, ...]
    """The answer of the value service, by group."""

    @property
    def rewards(self) -> tuple[Floats, ...]:
        """[n] for each group."""
        return tuple(np.array([rollout.reward for rollout in group.rollouts], np.float32) for group in self.groups)

    @property
    def advantages(self) -> tuple[Floats | tuple[Floats, ...], ...]:
        """reward − baseline, in the shapes of `baselines`."""
        return tuple(
            tuple(r - b for r, b in zip(rewards, own, strict=True)) if isinstance(own, tuple) else rewards - own
            for rewards, own in zip(self.rewards, self.baselines, strict=True)
        )

    @property
    def is_bootstrap(self) -> bool:
        """Whether no baseline comes from the value service yet."""
        return all(each.baselines is None and each.token_baselines is None for each in self.estimates)


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
    """Mean squared advantage, relative to that without a baseline."""
    variance_vs_rloo: float
    """Mean squared advantage, relative to that with the siblings' mean reward as baseline."""
    variance_vs_batch_mean: float
    """Mean squared advantage, relative to that with the mean reward of the step's other prompts as baseline."""
    calibration: tuple[CalibrationBin, ...]
    """Predictions in tenths of [0, 1]; empty tenths are omitted."""
    weighted_variance_vs_none: float = float("nan")
    """Mean squared advantage, relative to that without a baseline; both weighted by the squared score norms.

    It predicts the variance of the gradient.
    """
    weighted_variance_vs_batch_mean: float = float("nan")
    """As `weighted_variance_vs_none`, but relative to the mean reward of the step's other prompts as baseline."""


@dataclass(frozen=True, slots=True)
class EstimatorError:
    """The error of one score-weighted estimator on earlier steps."""

    estimator: Estimator
    weighted_error: float
    """Mean squared difference of reward and baseline, weighted by the squared score norms. Each step was predicted from
    the steps before it; later steps count more."""


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
    """Seconds from publishing the newest learnt label to saving it; NaN until the process has learnt a label."""
    quality: ProbeQuality
    configured: Estimator = "probe"
    """The estimator that the configuration selects for the domain."""
    estimator: Estimator | Literal[""] = ""
    """The current estimator: for "auto" the one it chose. Empty before the first fit."""
    errors: tuple[EstimatorError, ...] = ()
    """The score-weighted estimators that were compared; empty before two steps."""


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
    estimator: Estimator = "probe"
    """The configured estimator of domains without one of their own."""
    domain_estimators: Mapping[str, Estimator] = field(default_factory=dict)
    """The configured estimators of individual domains."""

    def needed_inputs(self, group: Group) -> Group:
        """Return the group with only the hidden states and token statistics that the estimator of its domain uses."""
        estimator = self.domain_estimators.get(group.domain, self.estimator)
        if estimator == "probe":
            rollouts = [replace(each, sum_squared_probs=_NO_HALVES) for each in group.rollouts]
        elif estimator in ("score_mean", "score_prefix"):
            rollouts = [replace(each, features=Features()) for each in group.rollouts]
        else:  # they use the prompt's hidden state, not the response's
            rollouts = [replace(each, features=Features(each.features.prompt_hidden)) for each in group.rollouts]
        return replace(group, rollouts=tuple(rollouts))
