"""Questions to the probes, their answers, the labels that they learn from, and what they are worth.

Shapes: n siblings of a prompt, d the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise_client.types._rollouts import Features, Floats


@dataclass(frozen=True, slots=True)
class GroupFeatures:
    """The features of one prompt's siblings, to be valued."""

    group_id: str
    domain: str
    rollouts: tuple[Features, ...]
    rewards: Floats | None = None
    """[n], in [0, 1]: for probes with `sibling_reward` among their inputs; others do not use them."""


@dataclass(frozen=True, slots=True)
class GroupBaselines:
    """The answer for one group; the arrays are None while the domain has no probe."""

    group_id: str
    probe_version: int
    values: Floats | None
    """[n], in [0, 1]: g_k(z_i)."""
    baselines: Floats | None
    """[n]: b_i = mean over j ≠ i of g_k(z_j); None with a single rollout too."""
    up_to_date: bool = False
    """Whether the probe is known to be fitted on every label published before the first call for the step.

    See `wait_for_labels_s` of `estimate_baselines`. All groups of a domain in a step have the same value.
    """


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """The state of a prompt that has no rollouts yet, to be valued."""

    group_id: str
    domain: str
    prompt_hidden: Floats
    """[d]"""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What a prompt's rollouts are expected to get."""

    group_id: str
    probe_version: int
    value: float | None
    """In [0, 1]; None while the domain has no probe."""


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """A group whose rewards are known."""

    run_id: str
    step: int
    group_id: str
    domain: str
    rollouts: tuple[Features, ...]
    rewards: Floats
    """[n], in [0, 1]."""
    num_rollouts: int
    """n as it was when the group was sampled: a group that has lost rollouts since is refused."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Rollouts whose rewards were predicted alike, and what became of them."""

    predicted: float
    """Mean value."""
    realised: float
    """Mean reward of their siblings."""
    count: int


@dataclass(frozen=True, slots=True)
class ProbeQuality:
    """How good the values of a domain were, over the last rollouts valued before their labels were learnt.

    Values are held against the mean reward of the siblings. NaN where a number is not defined, as before the first row.
    """

    num_rows: int
    pearson: float
    """Correlation."""
    brier: float
    """Mean squared difference."""
    brier_skill: float
    """1 − brier / brier of always predicting the mean: 1 is perfect, below 0 is worse than that constant."""
    bias: float
    """Mean of value − reward: above 0, too much was expected."""
    share_clipped: float
    """Share of values at 0 or 1."""
    variance_vs_none: float
    """Mean squared advantage, as a share of that without a baseline."""
    variance_vs_rloo: float
    """The same, of that with the siblings' mean reward as baseline."""
    variance_vs_batch_mean: float
    """The same, of that with the mean reward of the step's other prompts as baseline."""
    calibration: tuple[CalibrationBin, ...]
    """By value, in tenths of [0, 1]; empty ones left out."""


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """One domain's probe."""

    domain: str
    probe_version: int
    num_groups: int
    num_rows: int
    num_steps_seen: int
    warmup_steps: int
    last_fit_s: float
    label_lag_s: float
    """From publishing to the durable state, of the label learnt last; NaN before the first since the start."""
    quality: ProbeQuality


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All probes, and what became of the labels."""

    probes: tuple[ProbeStatus, ...]
    num_groups_consumed: int
    num_duplicates: int
    num_dead_letters: int
    num_pending: int
