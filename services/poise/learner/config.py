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
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    warmup_updates: int = Field(10, ge=0)
    """Updates over which the learning rate rises linearly."""
    gradient_clip: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""


class LossConfig(StrictModel):
    """The policy loss. `poise.learner.training.losses` has the formulas."""

    RENAMED: ClassVar[Mapping[str, str]] = {"normaliser_tokens": "normalizer_tokens"}

    policy: Literal["ppo", "gspo", "cispo"] = "ppo"
    """`ppo`: clip-higher and dual clip for each token. `gspo`: one clipped ratio for each rollout; use it with
    `sequence_mean` and clips of about 3e-4 and 4e-4. `cispo`: a clipped ratio as a constant weight, so that every token
    keeps its gradient; use it with `clip_low` 1, which disables the lower clip."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How token losses are averaged over a mini-batch. `token_mean`: over all tokens. `sequence_mean`: over the means
    of its rollouts. `constant`: over the sums of its rollouts, each divided by `normalizer_tokens`."""
    normalizer_tokens: int = Field(1024, ge=1)
    """The divisor of `constant`: the maximum response length in tokens."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """The old policy in ratios. `rollout`: the engine's log-probabilities from sampling, without another forward pass.
    The ratio then covers engine mismatch and staleness too, and the clip bounds both. `recompute`: the policy before
    the step's first update, with another forward pass if a step has several mini-batches. The clip then bounds only the
    step, and an importance weight of at most `importance_cap` corrects for the rest."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(0.28, gt=0)
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: float = Field(10.0, gt=1)
    """With a negative advantage, the `ppo` loss is at most -dual_clip x advantage."""
    importance_cap: float = Field(2.0, gt=0)
    """Maximum importance weight (learner / rollout probability) with `recompute`."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the model that training started from. Above 0, that model stays in memory and
    does one more forward pass over every batch."""


class LoraSettings(StrictModel):
    """Train low-rank adapters and freeze the model."""

    rank: int = Field(32, ge=1)
    """Rank of an adapter's matrices."""
    alpha: int = Field(64, ge=1)
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get an adapter; `all-linear` means all linear layers but the head."""


class CriticConfig(StrictModel):
    """A critic as large as the policy: a second copy of `model` with a value head. Its generalized advantage estimates
    (GAE) replace the rollouts' advantages. It uses the betas, weight decay and gradient clip of `optimizer`."""

    learning_rate: float = Field(1e-5, gt=0)
    """Learning rate after the warm-up."""
    warmup_updates: int = Field(10, ge=0)
    """Updates over which the learning rate rises linearly."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: with 1 an advantage depends on the reward only, with 0 on the next token's value only."""
    discount: float = Field(1.0, gt=0, le=1)
    """γ: discount of the reward per token."""
    value_clip: float | None = Field(0.2, gt=0)
    """Clip range of a value around its prediction before the step; null disables clipping."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the tokens of a batch."""


def _default_shared_dir() -> Path:
    shared_memory = Path("/dev/shm")  # noqa: S108 (its files get unguessable names)
    return shared_memory if shared_memory.is_dir() else Path("/tmp")  # noqa: S108


class PushConfig(StrictModel):
    """Pushing weights to the generation replicas."""

    transport: Literal["grpc", "shared", "lora", "nccl"] = "grpc"
    """How weights are sent. `grpc`: in chunks to any host. `shared`: through one file for all replicas on this host,
    which must list `shared_dir` in their `shared_dirs`. `lora`: like `grpc`, but only the adapters, to replicas with
    `lora` set and the same `model`. `nccl`: from GPU to GPU, to replicas with `nccl` set; it falls back to `grpc`, and
    needs vllm beside torch."""
    shared_dir: Path = Field(default_factory=_default_shared_dir)
    """Folder of `shared`; memory-backed is fastest. It needs space for two versions of the model."""
    deltas: bool = True
    """Send lossless deltas to replicas that keep the previous version: in bfloat16 about a hundredth of the bytes at
    usual learning rates. In float32 nearly every element changes, so everything is sent."""
    timeout_s: float = Field(60.0, gt=0)
    """Maximum time that a step waits for its replicas, in seconds. A slower replica catches up in the background, where
    its pushes may take up to eight times as long. Steps do not wait for it meanwhile."""
    reconcile_every_s: float = Field(1.0, gt=0)
    """Interval of checking each replica's version, in seconds."""


class LearnerConfig(ServiceConfig):
    """The learner service."""

    model_config = SettingsConfigDict(env_prefix="POISE_LEARNER_")

    RENAMED: ClassVar[Mapping[str, str]] = {"optimiser": "optimizer"}

    grpc: GrpcConfig = GrpcConfig(port=50053)
    """Address of the gRPC service."""
    admin: AdminConfig = AdminConfig(port=8053)
    """Address of the admin app."""
    model: str
    """Folder of the Hugging Face model to start from, or its name on the hub."""
    state_dir: Path
    """Folder for checkpoints and the journal of batches. Only one service at a time can use it."""
    export_dir: Path | None = None
    """Folder for exports; null means `<state_dir>/exports`."""
    replicas: tuple[str, ...] = ()
    """Generation replicas that get every version: `host:port`, or `dns:///name:port` for all addresses of a name,
    looked up every `push.reconcile_every_s`."""
    replica_token_file: Path | None = None
    """File with the bearer token of the replicas."""
    replica_ca_file: Path | None = None
    """PEM file of the authorities that sign the replicas' certificates. Setting it enables TLS to them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type of the policy's computation and of pushes. The optimizer always updates float32 weights, because in
    bfloat16 its updates would round to zero."""
    device: str = "cpu"
    """A torch device, such as `cpu` or `cuda:0`."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null uses torch's default."""
    rank_timeout_s: float = Field(30.0, ge=1)
    """With several ranks (torchrun): all ranks restart if one sends no heartbeat, or delays a collective, for this many
    seconds. Raise it for a slow network or uneven hosts."""
    seed: int = 0
    """Seed of torch's random numbers, used for new adapters and dropout."""
    max_staleness: int = Field(0, ge=0)
    """Maximum staleness of rollouts in versions; 0 is on-policy."""
    lora: LoraSettings | None = None
    """Train adapters instead of the whole model: moments and checkpoints take a fraction of the memory. Replicas get
    the model with adapters merged, or with `push.transport: lora` only the adapters. An export has the merged model
    and, in `adapter`, the adapters. Use a learning rate 10 to 100 times that of a whole model."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Number of prompts per optimizer step."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Maximum tokens of a packed row, which goes through the model at once; a longer rollout gets its own row. Limits
    memory and does not change results."""
    logprob_chunk_tokens: int = Field(256, ge=1)
    """Tokens whose logits are computed at once. Limits memory and does not change results."""
    dropout: bool = False
    """Apply the dropout of the model's config.json in policy and critic. Without it the trained policy is exactly the
    one that sampled; with it, the reported mismatch includes dropout noise."""
    gradient_checkpointing: bool = False
    """Save only layer inputs; recompute activations in the backward pass. Takes a fraction of the memory and about a
    third more time."""
    peak_flops: float | None = Field(None, gt=0)
    """Peak FLOP/s of the device, for the MFU metric; null uses the known bfloat16 peak of common GPUs."""
    max_nonfinite_in_a_row: int = Field(3, ge=1)
    """Training stops after this many updates in a row with a loss or gradient that is not finite. Restart the learner
    with other settings to continue."""
    keep_nonfinite: int = Field(8, ge=1)
    """Number of batches with non-finite updates kept in `<state_dir>/nonfinite` for inspection."""
    checkpoint_every_steps: int = Field(10, ge=1)
    """Batches between checkpoints, which are written while training continues. A restart replays the batches after the
    last checkpoint, with the same resulting weights."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints kept."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    loss: LossConfig = LossConfig()
    """The policy loss."""
    critic: CriticConfig | None = None
    """Train a critic beside the policy (PPO). It takes about as much memory as the policy, and needs rollouts with
    rewards and without advantages. With `lora` the critic is still trained whole."""
    measure_gradient_variance: bool = False
    """Report the variance of the policy's gradient. Computes each mini-batch in two halves, and keeps a copy of the
    first half's gradient in memory."""
    push: PushConfig = PushConfig()
    """Pushing weights to replicas."""

    @model_validator(mode="after")
    def _lora_push_needs_adapters(self) -> Self:
        if self.push.transport == "lora" and self.lora is None:
            raise ValueError(
                "push.transport is `lora`, but `lora` is not set. Set `lora`, or use push.transport `grpc`"
            )
        return self

    @field_validator("replicas")
    @classmethod
    def _replicas_are_addresses(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for target in replicas:
            parse_name(target)
        return replicas
