"""Batches that the learner trains on, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from poise_client.types._rollouts import Floats, Ints, RolloutId, VersionSpan


@dataclass(frozen=True, slots=True)
class TrainingRollout:
    """One rollout with its advantage; or with its reward, for a learner whose critic makes the advantages."""

    id: RolloutId
    prompt_token_ids: Ints
    token_ids: Ints
    logprobs: Floats
    advantage: float
    """0 where the learner has a critic."""
    version_spans: tuple[VersionSpan, ...]
    reward: float | None = None
    """Required where the learner has a critic, and refused where it has none: see `LearnerStatus.has_critic`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step consumes."""

    run_id: str
    batch_id: str
    step: int
    rollouts: tuple[TrainingRollout, ...]
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class BatchHeader:
    """What opens a batch on the wire: all of it but its rollouts."""

    run_id: str
    batch_id: str
    step: int
    num_rollouts: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Numbers of one training step; means over trained response tokens unless said otherwise."""

    loss: float = 0.0
    entropy: float = 0.0
    mismatch_logprob: float = 0.0
    mismatch_kl: float = 0.0
    clip_share: float = 0.0
    truncated_share: float = 0.0
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    num_tokens: int = 0
    num_rollouts: int = 0
    num_updates: int = 0
    staleness: Mapping[int, int] = field(default_factory=dict)
    train_s: float = 0.0
    publish_s: float = 0.0
    reference_kl: float = 0.0
    """To the model that training started from; 0 where it is not in the loss."""
    clip_low_share: float = 0.0
    clip_high_share: float = 0.0
    dual_clip_share: float = 0.0
    num_skipped_updates: int = 0
    """Mini-batches that changed nothing, because their loss or gradient was not finite."""
    num_model_tokens: int = 0
    """That went through the model: responses, and prompts once for the siblings of a row."""
    tokens_per_s: float = 0.0
    """Of these, while training."""
    mfu: float = 0.0
    """Share of the device's peak arithmetic; 0 where the peak is not known."""
    value_loss: float = 0.0
    """Of the critic; 0 without one."""
    explained_variance: float = 0.0
    """1 − Var(returns − values) / Var(returns), by the critic before the step; NaN where the returns do not vary, 0
    without a critic."""
    critic_gradient_norm: float = 0.0
    """0 without a critic."""
    gradient_variance: float = 0.0
    """Trace of the covariance of a mini-batch's policy gradient, from two halves of it; NaN where no mini-batch has two
    prompts, 0 where it is not measured."""


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """How the publishing to one replica went."""

    address: str
    policy_version: int
    current: bool
    error: str
    push_s: float
    pause_s: float
    digest: bytes = b""
    """Of the weights it serves, as far as known; empty before its first push."""
    sent_bytes: int = 0
    """Of the last push: a delta's are few; 0 where a file was named instead."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a batch."""

    policy_version: int
    duplicate: bool
    metrics: StepMetrics
    rejected: tuple[tuple[RolloutId, str], ...]
    """Rollouts left out, and why: "stale", "duplicate", "future_version", or "failed" where training on the
    batch failed again and again."""
    replicas: tuple[ReplicaResult, ...]


@dataclass(frozen=True, slots=True)
class LearnerStatus:
    """What the learner holds and does."""

    lineage_id: str
    policy_version: int
    checkpoint_version: int
    state: str
    num_batches: int
    num_rollouts: int
    num_rejected: Mapping[str, int]
    model: str
    max_staleness: int
    replicas: tuple[ReplicaResult, ...]
    digest: bytes
    last_batch_id: str
    has_critic: bool = False
    """Whether a critic makes the advantages: rollouts then come with rewards and without advantages."""


@dataclass(frozen=True, slots=True)
class ModelExport:
    """A Hugging Face folder on the learner's file system."""

    path: str
    policy_version: int
