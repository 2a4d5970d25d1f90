"""The nouns of the protocol as plain, immutable dataclasses: numpy in, numpy out. Protobuf never shows.

Shapes: P prompt tokens, T response tokens, n siblings of a prompt, d the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

FinishReason = Literal["stop", "length", "abort"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


PromptContent = str | Sequence[Message] | Sequence[int]
"""Text as it stands, a conversation to be rendered with the chat template, or token ids."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, whose rollouts form a group."""

    group_id: str
    content: PromptContent


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logprobs, entropies and the loss refer to the distribution after it. 0 is greedy, for evaluation only."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    max_tokens: int = 0
    """0 means the service's default."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; they stay in it."""
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutId:
    """Names one rollout for ever."""

    run_id: str
    step: int
    group_id: str
    rollout_index: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start_token, end_token) that one policy version sampled."""

    start_token: int
    end_token: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class EntropyStats:
    """Token entropies over a stretch, nats; zeros for an empty one."""

    mean: float = 0.0
    last: float = 0.0
    max: float = 0.0
    min: float = 0.0


@dataclass(frozen=True, slots=True)
class Features:
    """What the probe sees of one rollout."""

    prompt_hidden: Floats
    """[d]"""
    response_hidden: Floats
    """[d]"""
    output_entropy: EntropyStats = EntropyStats()
    reasoning_entropy: EntropyStats = EntropyStats()
    answer_entropy: EntropyStats = EntropyStats()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished rollout."""

    id: RolloutId
    token_ids: Ints
    """[T], the stop token included when one was sampled."""
    logprobs: Floats
    """[T], nats, under the full-vocabulary distribution after temperature."""
    features: Features
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str
    token_entropies: Floats | None = None
    """[T], nats; only when asked for."""
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """The finished siblings of one prompt."""

    group_id: str
    prompt_token_ids: Ints
    """[P]"""
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's state, from one pass through the model without sampling."""

    group_id: str
    num_prompt_tokens: int
    prompt_hidden: Floats
    """[d]: what it would be in the features of the prompt's rollouts."""
    policy_version: int
    """Whose state it is."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a generation replica serves."""

    instance_id: str
    lineage_id: str
    policy_version: int
    digest: bytes
    ready: bool
    not_ready_reason: str
    engine: str
    model: str
    hidden_size: int
    feature_layer: int
    max_model_len: int
    num_running: int
    keeps_base: bool = False
    """Whether the weights last pushed are kept, for a delta to build on."""
    group_backend: str = ""
    """Of the groups through which it takes the bodies of pushes, `nccl` or `gloo`; empty where it takes none."""


@dataclass(frozen=True, slots=True)
class WeightArray:
    """One parameter. bfloat16 is held as its raw uint16 bits."""

    array: NDArray[np.generic]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Says that weights are a low-rank adapter's, named as in peft's files, and what they are served over."""

    rank: int
    alpha: float
    """What it adds, lora_B·lora_A, is scaled by alpha / rank."""
    base_digest: bytes
    """Of the model that it was trained on, as its files hold it."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What became of a push."""

    policy_version: int
    already_applied: bool
    receive_s: float
    pause_s: float


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
    settled: bool = False
    """Whether the probes are known to have been fitted on every label published before the question that pinned the
    step: see `estimate_baselines`' settle_s. The same for all groups of a step."""


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
