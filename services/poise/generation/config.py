"""The settings of the generation service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from poise.algorithms.features import POOL_TOKENS
from poise.runtime.config.settings import AdminConfig, GrpcConfig, ServiceConfig, StrictModel


class VllmConfig(StrictModel):
    """Settings of the `vllm` engine."""

    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the KV cache on a CPU, in GiB. On GPUs, `gpu_memory_utilization` decides."""
    enforce_eager: bool = True
    """Run without torch.compile and CUDA graphs. Starts minutes sooner; decodes slower on GPUs."""
    prefix_caching: bool = True
    """Cache the common beginning of prompts, such as those of siblings, until the next push. The cache has blocks of
    16 tokens, or 128 on a CPU. Blocks with any of a prompt's last `prompt_pool_tokens` tokens are always computed."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per replica."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Fraction of each GPU's memory that vLLM may use."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the worker; null lets vLLM choose."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Maximum time to load the model, in seconds."""


class TorchConfig(StrictModel):
    """Settings of the `torch` engine."""

    threads: int = Field(1, ge=1)
    """CPU threads."""
    device: str = "cpu"
    """Torch device, such as `cpu` or `cuda:0`."""


class LoraConfig(StrictModel):
    """Serve low-rank adapters over the model, for learners with `push.transport: lora`."""

    max_rank: int = Field(32, ge=1, le=512)
    """Largest rank of an adapter."""


class GenerationConfig(ServiceConfig):
    """Settings of the generation service."""

    model_config = SettingsConfigDict(env_prefix="POISE_GENERATION_")

    grpc: GrpcConfig = GrpcConfig(port=50051)
    """Address of the gRPC service."""
    admin: AdminConfig = AdminConfig(port=8051)
    """Address of the admin app."""
    model: str
    """Model folder in Hugging Face format, or the model's name on the Hugging Face hub."""
    engine: Literal["vllm", "torch"] = "vllm"
    """`vllm` is fast. `torch` (transformers) is exact and slow: the reference for tests and tiny models."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Element type of weights and activations; `auto` uses the checkpoint's."""
    max_model_len: int | None = Field(None, ge=2)
    """Maximum tokens of prompt plus response; null uses the model's own limit, or 8192 if it has none."""
    max_num_seqs: int = Field(64, ge=1)
    """Maximum number of rollouts sampled at once."""
    max_queued_rollouts: int = Field(65536, ge=1)
    """Maximum number of accepted, unfinished rollouts. Further requests fail with BUSY."""
    default_max_tokens: int = Field(256, ge=1)
    """Maximum response tokens for requests that set no limit."""
    feature_layer: int | None = Field(None, ge=0)
    """Decoder layer, 0-based, whose output is pooled; null uses `round(0.53 x layers)`."""
    prompt_pool_tokens: int = Field(POOL_TOKENS, ge=1)
    """Number of last prompt tokens that `prompt_hidden` averages. Probes fitted with another value become invalid: also
    rename the domain when you change it."""
    response_pool_tokens: int = Field(POOL_TOKENS, ge=1, le=256)
    """Number of response tokens that `response_hidden` averages. `vllm` stores 22 more states per rollout."""
    wait_for_learner: bool = False
    """Become ready only after the first push. Set it for training, where replica and learner must have the same
    policy."""
    staging_dir: Path | None = None
    """Folder that stores a push before it is applied; fastest in memory. It needs space for one model during a push.
    With `keep_base`, it needs space for two during a push, and for one at other times. Null uses `/dev/shm` or the
    temporary folder: the first with space for two models, else the one with more free space."""
    keep_base: bool = True
    """Keep the applied weights in `staging_dir` so that the next push can be a delta. They are kept only if the learner
    sends deltas and the next version fits beside them."""
    shared_dirs: tuple[Path, ...] = ()
    """Folders from which learners on this host may push files (`push.transport: shared`). An empty list rejects such
    pushes. If `staging_dir` is on the same disk, files are hard-linked instead of copied."""
    in_flight: Literal["keep", "abort"] = "keep"
    """What a push does to running rollouts. `keep` continues them under the new version; their version spans show
    the change. `abort` ends them with the tokens sampled so far and finish_reason "abort"."""
    max_update_bytes: int = Field(64 * 2**30, ge=1)
    """Maximum size of a push, in bytes."""
    lora: LoraConfig | None = None
    """Accept adapters instead of whole parameters, and sample from the model with the unmerged adapter."""
    nccl: bool = False
    """Accept pushes from learners with `push.transport: nccl`, from GPU to GPU. On CPUs of one host, gloo replaces
    NCCL."""
    vllm: VllmConfig = VllmConfig()
    """The `vllm` engine."""
    torch: TorchConfig = TorchConfig()
    """The `torch` engine."""
