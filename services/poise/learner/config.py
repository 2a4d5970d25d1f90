"""The settings of the learner service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from poise.runtime.config.settings import AdminConfig, GrpcConfig, ServiceConfig, StrictModel
from poise.runtime.network.discovery import parse_name


class OptimizerConfig(StrictModel):
    """AdamW."""

    learning_rate: float = Field(1e-6, gt=0)
    """After the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay."""
    warmup_updates: int = Field(10, ge=0)
    """Updates over which the learning rate rises linearly."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""


class LossConfig(StrictModel):
    """The policy loss. poise.learner.training.losses has the formulas."""

    policy: Literal["ppo", "gspo", "cispo"] = "ppo"
    """`ppo`: clip-higher and dual clip, token by token; `gspo`: one ratio for a rollout, clipped as a whole: take
    `sequence_mean`, and bounds of about 3e-4 and 4e-4; `cispo`: a clipped ratio as a constant weight, so that every
    token keeps its gradient: take a `clip_low` of 1, which bounds nothing."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """The mean of a mini-batch: over its tokens; over its rollouts, of the means over their tokens; or over its
    rollouts, of the sums over their tokens divided by `normaliser_tokens`."""
    normaliser_tokens: int = Field(1024, ge=1)
    """What `constant` divides by: the most tokens that a response may have."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """What ratios are taken to. `rollout`: what the engine said when it sampled, without another forward pass: the
    ratio corrects for the engine's own arithmetic and for staleness at once, and the clip bounds both. `recompute`: the
    policy before the step's first update, by another forward pass where a step has several mini-batches; the clip
    bounds the step alone, and a weight of at most `importance_cap` corrects for the rest."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(0.28, gt=0)
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: float = Field(10.0, gt=1)
    """Bound c of the `ppo` loss at negative advantages: at most -c x advantage."""
    importance_cap: float = Field(2.0, gt=0)
    """Cap C of learner/rollout probability with `recompute`."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the model that training started from; above 0 that model is held beside the
    policy, and computes every batch once more."""


class LoraSettings(StrictModel):
    """Train low-rank adapters, and hold the model itself still."""

    rank: int = Field(32, ge=1)
    """Columns of an adapter's matrices."""
    alpha: int = Field(64, ge=1)
    """What an adapter adds is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get one; `all-linear` is all but the head."""


class CriticConfig(StrictModel):
    """A critic as large as the policy: a second model, loaded from `model` with a head of one value, whose generalised
    advantage estimates (GAE) take the place of the rollouts' advantages. Betas, weight decay and the bound of the
    gradient are those of `optimizer`."""

    learning_rate: float = Field(1e-5, gt=0)
    """After the warm-up."""
    warmup_updates: int = Field(10, ge=0)
    """Updates over which the learning rate rises linearly."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: 1 takes a token's advantage from the reward alone, 0 from the value of the next token alone."""
    discount: float = Field(1.0, gt=0, le=1)
    """γ: what a reward counts, a token earlier."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far the loss follows a value from what it was before the step; null follows it anywhere."""
    whiten_advantages: bool = True
    """Bring the advantages of a batch's tokens to mean 0 and variance 1."""


def _default_shared_dir() -> Path:
    shared_memory = Path("/dev/shm")  # noqa: S108 (files in it are made with unguessable names)
    return shared_memory if shared_memory.is_dir() else Path("/tmp")  # noqa: S108


class PushConfig(StrictModel):
    """Publishing weights to the generation replicas."""

    transport: Literal["grpc", "shared", "lora", "nccl"] = "grpc"
    """How weights travel: `grpc` in chunks to anywhere; `shared` through a file, written once for all replicas of this
    host, which must allow `shared_dir` in their `shared_dirs`; `lora` as `grpc`, but the adapters alone, to replicas
    that set `lora` and started from the same `model`; `nccl` from GPU to GPU, to replicas that set `nccl`, and as
    `grpc` to others and where that breaks. It needs vllm beside torch."""
    shared_dir: Path = Field(default_factory=_default_shared_dir)
    """Where `shared` writes: memory-backed is fastest. Holds two versions of the model while they change."""
    deltas: bool = True
    """Send only what changed, without loss, to replicas that keep the version before: in bfloat16 a hundredth of the
    bytes at the usual learning rates. In float32 nearly everything changes, and everything is sent."""
    timeout_s: float = Field(60.0, gt=0)
    """How long a step waits for its replicas, s. One that takes longer catches up behind it, and no step waits for it
    again until it has; its pushes may then take up to eight times as long."""
    reconcile_every_s: float = Field(1.0, gt=0)
    """How often each replica is asked what it serves, s."""


class LearnerConfig(ServiceConfig):
    """The learner service."""

    model_config = SettingsConfigDict(env_prefix="POISE_LEARNER_")

    RENAMED: ClassVar[Mapping[str, str]] = {"optimiser": "optimizer"}

    grpc: GrpcConfig = GrpcConfig(port=50053)
    """Where the gRPC service listens."""
    admin: AdminConfig = AdminConfig(port=8053)
    """Where the admin app listens."""
    model: str
    """Hugging Face folder of the model to start from, or its name on the hub."""
    state_dir: Path
    """Folder of the durable state: checkpoints and the journal of batches. One service at a time may use it."""
    export_dir: Path | None = None
    """Where exports go; null takes `<state_dir>/exports`."""
    replicas: tuple[str, ...] = ()
    """Generation replicas that get every version: `host:port`, or `dns:///name:port` for all addresses that a name has,
    looked up again every `push.reconcile_every_s`."""
    replica_token_file: Path | None = None
    """File holding the bearer token of the replicas."""
    replica_ca_file: Path | None = None
    """PEM of the authorities that sign the replicas' certificates; set it to speak TLS to them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type that the policy computes in, and is pushed in. The optimizer moves float32 weights all the same: in
    bfloat16 its steps would round to nothing."""
    device: str = "cpu"
    """A torch device, such as `cpu` or `cuda:0`."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null leaves it to torch."""
    rank_timeout_s: float = Field(30.0, ge=1)
    """Used with several processes (torchrun): how long one may be silent, or keep the others waiting in a collective,
    before all of them restart, s. Raise it for a slow network or uneven hosts."""
    seed: int = 0
    """Seeds torch's random numbers: those that adapters start from, and dropout's."""
    max_staleness: int = Field(0, ge=0)
    """Versions a rollout may be old; 0 is on-policy."""
    lora: LoraSettings | None = None
    """Train adapters instead of the whole model: a fraction of the memory for moments and checkpoints. Replicas get the
    model with the adapters merged, or with `push.transport: lora` the adapters alone; an export holds the merged model
    and, in `adapter`, the adapters. Takes learning rates ten to a hundred times those of whole models."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Prompts an optimizer step trains on."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Tokens that go through the model at once, packed without padding; a longer rollout goes alone. Bounds memory and
    changes nothing else."""
    logprob_chunk_tokens: int = Field(256, ge=1)
    """Tokens whose logits are held at once. Bounds memory and changes nothing else."""
    dropout: bool = False
    """Apply the dropout of the model's config.json in policy and critic. By default there is none: the policy that is
    trained is then exactly the one that sampled. With it, the mismatch of each step includes its noise."""
    gradient_checkpointing: bool = False
    """Keep the inputs of the layers alone, and compute the rest again for the gradient: a fraction of the memory for
    about a third more time."""
    peak_flops: float | None = Field(None, gt=0)
    """Operations a second that a device does at most, for the MFU among the numbers of a step; null takes what is known
    of common GPUs in bfloat16."""
    max_nonfinite_in_a_row: int = Field(3, ge=1)
    """Updates in a row, skipped because their loss or gradient was not finite, after which the learner trains on
    nothing until it is started with other settings."""
    keep_nonfinite: int = Field(8, ge=1)
    """Batches with such updates kept for inspection in `<state_dir>/nonfinite`."""
    checkpoint_every_steps: int = Field(10, ge=1)
    """Batches between checkpoints, which are copied and then written beside training; those after the last one are
    trained again at a restart, to the same weights."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    loss: LossConfig = LossConfig()
    """The policy loss."""
    critic: CriticConfig | None = None
    """Learn a critic beside the policy (PPO): about twice the memory. Rollouts must then come with rewards and without
    advantages. With `lora` it is trained whole all the same."""
    measure_gradient_variance: bool = False
    """Tell how the policy's gradient scatters: each mini-batch is computed in two halves of its prompts, and a copy of
    the gradient is held in between."""
    push: PushConfig = PushConfig()
    """Publishing weights."""

    @model_validator(mode="after")
    def _adapters_can_travel(self) -> Self:
        if self.push.transport == "lora" and self.lora is None:
            raise ValueError("push.transport is `lora`, and there are no adapters: set `lora`, or take `grpc`")
        return self

    @field_validator("replicas")
    @classmethod
    def _replicas_can_be_found(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for target in replicas:
            parse_name(target)
        return replicas
