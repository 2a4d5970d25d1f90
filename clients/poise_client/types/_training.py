"""Batches for the learner, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from poise_client.types._rollouts import Rollout, RolloutId

LearnerState = Literal["idle", "training", "publishing", "recovering", "paused"]
RejectionReason = Literal["stale", "duplicate", "future_version", "failed"]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one training step."""

    run_id: str
    batch_id: str
    """Id of the batch within the run."""
    step: int
    rollouts: tuple[Rollout, ...]
    """With advantages; with rewards instead if the learner has a critic."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one training step. Means are over trained response tokens unless stated otherwise."""

    loss: float = 0.0
    """Policy loss."""
    entropy: float = 0.0
    """Entropy of the learner's distribution, in nats."""
    mismatch_logprob: float = 0.0
    """Mean absolute difference of the log-probabilities of learner and rollout engine, in nats."""
    mismatch_kl: float = 0.0
    """KL(rollout engine || learner before the update), in nats."""
    clip_share: float = 0.0
    """Share of tokens whose ratio was clipped, by any bound."""
    truncated_share: float = 0.0
    """Share of tokens whose importance weight was truncated."""
    gradient_norm: float = 0.0
    """Gradient norm before clipping, averaged over mini-batches."""
    learning_rate: float = 0.0
    """Learning rate of the last mini-batch."""
    num_tokens: int = 0
    """Response tokens trained on."""
    num_rollouts: int = 0
    """Rollouts trained on."""
    num_updates: int = 0
    """Optimizer steps."""
    staleness: Mapping[int, int] = field(default_factory=dict)
    """Number of rollouts by age in versions."""
    train_s: float = 0.0
    """Seconds spent training."""
    publish_s: float = 0.0
    """Seconds spent publishing the weights."""
    reference_kl: float = 0.0
    """KL(learner || initial model), in nats; 0 if the loss has no KL term."""
    clip_low_share: float = 0.0
    """Share of tokens clipped at the lower bound of the ratio."""
    clip_high_share: float = 0.0
    """Share of tokens clipped at the upper bound of the ratio."""
    dual_clip_share: float = 0.0
    """Share of tokens clipped by the dual clip."""
    num_skipped_updates: int = 0
    """Mini-batches skipped because their loss or gradient was not finite."""
    num_model_tokens: int = 0
    """Tokens that went through the model: all responses, and each prompt once per packed row."""
    tokens_per_s: float = 0.0
    """num_model_tokens / train_s"""
    mfu: float = 0.0
    """The model's FLOP/s divided by the device's peak; 0 if the peak is unknown."""
    value_loss: float = 0.0
    """Loss of the critic; 0 without a critic."""
    explained_variance: float = 0.0
    """1 − Var(returns − values) / Var(returns) of the critic before the step; NaN if the returns do not vary, 0 without
    a critic."""
    critic_gradient_norm: float = 0.0
    """Gradient norm of the critic before clipping; 0 without a critic."""
    gradient_variance: float = 0.0
    """Trace of the covariance of a mini-batch's policy gradient; NaN if no mini-batch has two prompts, 0 if it is not
    measured."""


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """The last push to one generation replica."""

    address: str
    policy_version: int
    """The last version that it is known to serve."""
    current: bool
    """Whether it serves the learner's current version."""
    error: str
    """The last failure; empty if there is none."""
    push_s: float
    """Duration of the push, in seconds."""
    pause_s: float
    """Time for which sampling was paused, in seconds."""
    digest: bytes = b""
    """Digest of the weights that it is known to serve; empty before its first push."""
    sent_bytes: int = 0
    """Size of the last push as sent; 0 if its payload was a shared file."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of training on a batch."""

    policy_version: int
    """The version after the batch."""
    duplicate: bool
    """Whether the learner trained on this batch before and returned the stored result."""
    metrics: StepMetrics
    rejected: tuple[tuple[RolloutId, str], ...]
    """Rollouts excluded from training, each with its `RejectionReason`."""
    replicas: tuple[ReplicaResult, ...]


@dataclass(frozen=True, slots=True)
class LearnerStatus:
    """State of the learner."""

    lineage_id: str
    """Id of the sequence of versions."""
    policy_version: int
    """The current version."""
    checkpoint_version: int
    """The version of the last durable checkpoint."""
    state: LearnerState
    num_batches: int
    """Batches trained on since the state was created."""
    num_rollouts: int
    """Rollouts trained on since the state was created."""
    num_rejected: Mapping[str, int]
    """Rejected rollouts since the state was created, by `RejectionReason`."""
    model: str
    """Folder of the initial model."""
    max_staleness: int
    """Maximum age of a rollout, in versions."""
    replicas: tuple[ReplicaResult, ...]
    digest: bytes
    """Digest of the current weights."""
    last_batch_id: str
    """The last batch trained on; empty before the first."""
    has_critic: bool = False
    """Whether a critic computes advantages. Rollouts then carry rewards and no advantages."""
    loss_aggregation: str = ""
    """The learner's setting `loss.aggregation`: "token_mean", "sequence_mean" or "constant"; empty if unknown."""


@dataclass(frozen=True, slots=True)
class ModelExport:
    """A Hugging Face folder on the learner's file system."""

    path: str
    policy_version: int
